"""Advantage: how a score becomes the number that multiplies a token. No gradient passes through here.

An estimator maps rewards to advantages [N, T]; a scale then divides them. Group statistics follow the group
numbers on the rows, never their positions, and see only completions with a valid token.
Singleton groups and constant groups give exactly 0 (losses.md conventions), whatever rounding says.
"""

from lossmith.losses.axes.advantage.baseline import (
    Baseline,
    BatchMean,
    Decoupled,
    Given,
    Group,
    LeaveOneOut,
    MaxRL,
    NemoLeaveOneOut,
    Ones,
    OptimalReward,
    PassAtK,
    Raw,
    ScaledGroup,
    Shortest,
    Zero,
)
from lossmith.losses.axes.advantage.per_token import (
    GAE,
    TD,
    Critic,
    LengthAdaptiveGAE,
    MonteCarlo,
    OptimalToken,
    ReferenceGap,
    ReMax,
    Return,
)
from lossmith.losses.axes.advantage.scale import (
    SCALE,
    BatchStd,
    GroupStd,
    GroupStdBiased,
    LooStd,
    NoScale,
    Scale,
    Whiten,
)
from lossmith.losses.axes.advantage.signal import Estimator, Groups, Signal
from lossmith.losses.piece import options

__all__ = [
    "ADVANTAGE", "GAE", "SCALE", "TD", "Baseline", "BatchMean", "BatchStd", "Critic", "Decoupled", "Estimator", "Given",
    "Group", "GroupStd", "GroupStdBiased", "Groups", "LeaveOneOut", "LengthAdaptiveGAE", "LooStd", "MaxRL",
    "MonteCarlo", "NemoLeaveOneOut", "NoScale", "Ones", "OptimalReward", "OptimalToken", "PassAtK", "Raw", "ReMax",
    "ReferenceGap", "Return", "Scale", "ScaledGroup", "Shortest", "Signal", "Whiten", "Zero",
]  # fmt: skip

ADVANTAGE: dict[str, type[Estimator]] = options(
    Raw, BatchMean, Group, LeaveOneOut, NemoLeaveOneOut, OptimalReward, ScaledGroup, PassAtK, MaxRL, Shortest,
    Decoupled, Baseline, ReMax, Return, OptimalToken, TD, MonteCarlo, GAE, LengthAdaptiveGAE, ReferenceGap, Ones, Zero,
    Given,
)  # fmt: skip
