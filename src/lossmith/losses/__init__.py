"""The heart: losses as values. Imports torch and nothing else, so any trainer can use it.

import lossmith.losses as L
loss = L.get_loss("grpo", beta=0.04)
out = loss(L.Batch(logp, mask, old_logp=..., ref_logp=..., reward=..., group=...))
out.loss.backward()
"""

from functools import partial
from typing import Any

from lossmith.errors import LossError, TrapWarning
from lossmith.losses.axes.advantage import (
    GAE,
    GDPO,
    GFPO,
    GPG,
    LOO,
    MC,
    OPO,
    OTB,
    TD,
    VAPO,
    Baseline,
    BatchMean,
    BatchStd,
    Given,
    Group,
    GroupStd,
    GroupStdBiased,
    LOOStd,
    MaxRL,
    NemoLOO,
    NoScale,
    Ones,
    PassAtK,
    Raw,
    ReferenceGap,
    ReMax,
    Return,
    Whiten,
    Zero,
)
from lossmith.losses.axes.aggregate import (
    PromptMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from lossmith.losses.axes.extra import SFT, NLLPositive, NoExtra, SquareLogRatio
from lossmith.losses.axes.kl import KL, adapt_coefficient, kl_estimate
from lossmith.losses.axes.masks import OPSM, Above, Best, NoFilter, Staleness, TopEntropy, ZeroVariance
from lossmith.losses.axes.mismatch import TIS, Gate, IcePop, NoMismatch
from lossmith.losses.axes.ratio import SequenceRatio, SequenceSumRatio, SequenceTokenRatio, TokenRatio
from lossmith.losses.axes.shaping import ClipReward, Overlong, Potential, ScaleReward, WeightedSum
from lossmith.losses.axes.trust import (
    BalancedClip,
    Band,
    BookClip,
    Clip,
    CovDrop,
    CovKL,
    DynamicClip,
    Gamma,
    Influence,
    KLMask,
    LogClip,
    LogP,
    Luffy,
    M2Mask,
    NoTrust,
    Preserve,
    Quadratic,
    ScaledLogP,
    SgClip,
    Sigmoid,
    Taper,
    Truncate,
    TVMask,
    TVMaskSymmetric,
)
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.catalogue import CATALOGUE, Entry, example_loss, find_entry, get_loss, list_losses
from lossmith.losses.catalogue.parse import loss_from_dict, parse_loss
from lossmith.losses.catalogue.user import register_loss
from lossmith.losses.completion.completion_loss import CompletionLoss
from lossmith.losses.completion.preferences import (
    CPO,
    KTO,
    ORPO,
    Hinge,
    OnlineDPO,
    OnlineIPO,
    OnlineKTO,
    RobustDPO,
    SimPO,
    SLiC,
)
from lossmith.losses.completion.regressions import A2PO, GVPO, SPPO, GroupClassification
from lossmith.losses.composition.flat import all_parameters, describe
from lossmith.losses.composition.policy_loss import PolicyLoss
from lossmith.losses.function_loss import FunctionLoss
from lossmith.losses.loss import Credit, Loss, LossOutput

__all__ = [
    "A2PO",
    "CATALOGUE",
    "CPO",
    "GAE",
    "GDPO",
    "GFPO",
    "GPG",
    "GVPO",
    "KL",
    "KTO",
    "LOO",
    "MC",
    "OPO",
    "OPSM",
    "ORPO",
    "OTB",
    "SFT",
    "SPPO",
    "TD",
    "TIS",
    "VAPO",
    "Above",
    "BalancedClip",
    "Band",
    "Baseline",
    "Batch",
    "BatchMean",
    "BatchStd",
    "Best",
    "BookClip",
    "Clip",
    "ClipReward",
    "CompletionLoss",
    "CovDrop",
    "CovKL",
    "Credit",
    "DynamicClip",
    "Entry",
    "FunctionLoss",
    "Gamma",
    "Gate",
    "Given",
    "Group",
    "GroupClassification",
    "GroupStd",
    "GroupStdBiased",
    "Hinge",
    "IcePop",
    "Influence",
    "KLMask",
    "LOOStd",
    "LogClip",
    "LogP",
    "Loss",
    "LossError",
    "LossOutput",
    "Luffy",
    "M2Mask",
    "MaxRL",
    "NLLPositive",
    "NemoLOO",
    "NoExtra",
    "NoFilter",
    "NoMismatch",
    "NoScale",
    "NoTrust",
    "Normalizer",
    "Ones",
    "OnlineDPO",
    "OnlineIPO",
    "OnlineKTO",
    "Overlong",
    "PassAtK",
    "PolicyLoss",
    "Potential",
    "Preserve",
    "PromptMean",
    "Quadratic",
    "Raw",
    "ReMax",
    "ReferenceGap",
    "Return",
    "RobustDPO",
    "SLiC",
    "ScaleReward",
    "ScaledLogP",
    "SeqMeanTokenMean",
    "SeqMeanTokenSum",
    "SeqMeanTokenSumNorm",
    "SequenceRatio",
    "SequenceSumRatio",
    "SequenceTokenRatio",
    "SgClip",
    "Sigmoid",
    "SimPO",
    "SquareLogRatio",
    "Staleness",
    "TVMask",
    "TVMaskSymmetric",
    "Taper",
    "TokenMean",
    "TokenRatio",
    "TokenSum",
    "TopEntropy",
    "TrapWarning",
    "Truncate",
    "ValueLoss",
    "WeightedSum",
    "Whiten",
    "Zero",
    "ZeroVariance",
    "adapt_coefficient",
    "all_parameters",
    "describe",
    "example_loss",
    "find_entry",
    "get_loss",
    "kl_estimate",
    "list_losses",
    "loss_from_dict",
    "parse_loss",
    "register_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`losses.grpo(beta=0.04)` is `get_loss("grpo", beta=0.04)`, for every name of the catalogue."""
    if name in CATALOGUE:
        return partial(get_loss, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
