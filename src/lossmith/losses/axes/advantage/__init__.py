"""Advantage: how a score becomes the number that multiplies a token. No gradient passes through here.

An estimator maps rewards to advantages [N, T]; a scale then divides them. Group statistics follow the group
numbers on the rows, never their positions, and see only completions with a valid token.
Singleton groups and constant groups give exactly 0 (losses.md conventions), whatever rounding says.
"""

from lossmith.losses.axes.advantage.baseline import (
    GDPO,
    GFPO,
    GPG,
    LOO,
    OPO,
    Baseline,
    BatchMean,
    Given,
    Group,
    MaxRL,
    NemoLOO,
    Ones,
    PassAtK,
    Raw,
    Zero,
)
from lossmith.losses.axes.advantage.per_token import (
    GAE,
    MC,
    OTB,
    TD,
    VAPO,
    Critic,
    ReferenceGap,
    ReMax,
    Return,
)
from lossmith.losses.axes.advantage.scale import (
    SCALE,
    BatchStd,
    GroupStd,
    GroupStdBiased,
    LOOStd,
    NoScale,
    Scale,
    Whiten,
)
from lossmith.losses.axes.advantage.signal import Estimator, Groups, Signal
from lossmith.losses.piece import options

__all__ = [
    "ADVANTAGE",
    "GAE",
    "GDPO",
    "GFPO",
    "GPG",
    "LOO",
    "MC",
    "OPO",
    "OTB",
    "SCALE",
    "TD",
    "VAPO",
    "Baseline",
    "BatchMean",
    "BatchStd",
    "Critic",
    "Estimator",
    "Given",
    "Group",
    "GroupStd",
    "GroupStdBiased",
    "Groups",
    "LOOStd",
    "MaxRL",
    "NemoLOO",
    "NoScale",
    "Ones",
    "PassAtK",
    "Raw",
    "ReMax",
    "ReferenceGap",
    "Return",
    "Scale",
    "Signal",
    "Whiten",
    "Zero",
]  # fmt: skip

ADVANTAGE: dict[str, type[Estimator]] = options(
    Raw, BatchMean, Group, LOO, NemoLOO, OPO, GPG, PassAtK, MaxRL, GFPO,
    GDPO, Baseline, ReMax, Return, OTB, TD, MC, GAE, VAPO, ReferenceGap, Ones, Zero,
    Given,
)  # fmt: skip
