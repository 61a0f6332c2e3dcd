"""The one list of detectors, and what they find together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lossmith.detectors import policy, ratios, scores, signal, texts, weights
from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import LEVELS, Detector, Finding, at_least
from lossmith.detectors.words import paragraph, wrapped

__all__ = ["DETECTORS", "FAMILIES", "Action", "Diagnosis", "action_of", "examine"]

Action = Literal["warn", "stop", "off"]

FAMILIES: Mapping[str, tuple[Detector, ...]] = {
    "Signal": tuple(signal.DETECTORS),
    "Scorer": tuple(scores.DETECTORS),
    "Policy": tuple(policy.DETECTORS),
    "Completions": tuple(texts.DETECTORS),
    "Ratios": tuple(ratios.DETECTORS),
    "Gradients and weights": tuple(weights.DETECTORS),
}
DETECTORS: dict[str, Detector] = {d.name: d for family in FAMILIES.values() for d in family}


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the worst first; what was looked for in vain; and why the rest was not looked for."""

    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    not_checked: Mapping[str, str]
    steps: int
    subject: str = ""  # what was looked at
    notes: tuple[str, ...] = ()  # what could not be read

    def __str__(self) -> str:
        return in_words(self)

    def at_least(self, level: str) -> tuple[Finding, ...]:
        """The findings of this level or worse."""
        return tuple(f for f in self.findings if at_least(f.level, level))

    def as_dict(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "notes": list(self.notes),
            "steps": self.steps,
            "findings": [f.as_dict() for f in self.findings],
            "passed": list(self.passed),
            "not_checked": dict(self.not_checked),
        }


def action_of(guards: Mapping[str, str], name: str, settings: Mapping[str, Any] = {}) -> str:
    """What a recipe's guards say of a detector: warn, stop or off; "" where its own level decides.

    What a setting of its own asks for (a KL budget) is not meant by `all`.
    """
    asked = DETECTORS[name].asked_by
    return guards.get(name, "" if asked and settings.get(asked) else guards.get("all", ""))


def examine(evidence: Evidence, guards: Mapping[str, str] | None = None) -> Diagnosis:
    """Every detector over the evidence.

    guards: `warn` makes of a stop a warning, `stop` of a warning a stop, and `off` leaves a detector out.
    """
    findings: list[Finding] = []
    passed: list[str] = []
    not_checked: dict[str, str] = {}
    for name, detector in DETECTORS.items():
        action = action_of(guards or {}, name, evidence.settings)
        if action == "off":
            not_checked[name] = "it is off"
            continue
        found = detector(evidence)
        if found is None:
            passed.append(name)
        elif isinstance(found, Finding):
            as_told = found.level == "note" or action == ""
            findings.append(found if as_told else replace(found, level=action))  # type: ignore[arg-type]
        else:
            not_checked[name] = found.reason
    findings.sort(key=lambda f: -LEVELS.index(f.level))
    return Diagnosis(tuple(findings), tuple(passed), not_checked, len(evidence.steps))


def in_words(diagnosis: Diagnosis) -> str:
    """All of it: what was found with why and what to try, what was not, and what could not be looked at."""
    found = diagnosis.findings
    lines = [f"{diagnosis.subject}: {diagnosis.steps} step{'s' * (diagnosis.steps != 1)} looked at".removeprefix(": ")]
    lines += [f"note: {note}" for note in diagnosis.notes]
    for finding in found:
        lines += ["", *paragraph(finding)]
    counts = [f"{sum(f.level == level for f in found)} {level}" for level in reversed(LEVELS)]
    lines += ["", f"found: {', '.join(counts)}"]
    lines += wrapped(f"passed ({len(diagnosis.passed)}): ", ", ".join(diagnosis.passed) or "none")
    if diagnosis.not_checked:
        why = "; ".join(f"{name} ({reason})" for name, reason in diagnosis.not_checked.items())
        lines += wrapped(f"not checked ({len(diagnosis.not_checked)}): ", why)
    return "\n".join(lines)
