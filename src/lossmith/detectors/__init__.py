"""Detectors: what can be wrong with a run, told from its metrics and rollouts.

One list (`diagnosis.py`), a file a family. A run looks after every step, `lossmith doctor` afterwards. Each has a fault
in `faults.py` that it must find, and healthy runs in which it must stay silent.
"""

from lossmith.detectors.diagnosis import DETECTORS, FAMILIES, Diagnosis, action_of, examine
from lossmith.detectors.evidence import Completion, Evidence, Place, StepSeen
from lossmith.detectors.finding import LEVELS, Detector, Finding, Level, NotChecked, at_least
from lossmith.detectors.measuring import measure

__all__ = [
    "DETECTORS",
    "FAMILIES",
    "LEVELS",
    "Completion",
    "Detector",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Level",
    "NotChecked",
    "Place",
    "StepSeen",
    "action_of",
    "at_least",
    "examine",
    "measure",
]
