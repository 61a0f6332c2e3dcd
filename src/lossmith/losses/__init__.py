"""The heart: losses as values. Imports torch and nothing else, so any trainer can use it.

import lossmith.losses as L
loss = L.get_loss("grpo", beta=0.04)
out = loss(L.Batch(logp, mask, old_logp=..., ref_logp=..., reward=..., group=...))
out.loss.backward()
"""

from functools import partial
from typing import Any

from lossmith.errors import LossError, TrapWarning
from lossmith.losses.advantage import (
    GAE,
    TD,
    BatchMean,
    BatchStd,
    Group,
    GroupStd,
    GroupStdBiased,
    LeaveOneOut,
    LooStd,
    MonteCarlo,
    NoScale,
    Raw,
    Return,
    Whiten,
)
from lossmith.losses.aggregate import (
    PromptMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.catalogue import CATALOGUE, Entry, get_loss, list_losses
from lossmith.losses.catalogue.parse import parse_loss
from lossmith.losses.correction import Gate, IcePop, NoMismatch, TruncatedIS
from lossmith.losses.flat import all_parameters, describe
from lossmith.losses.kl import KL, adapt_coefficient, kl_estimate
from lossmith.losses.policy_loss import Credit, LossOutput, PolicyLoss
from lossmith.losses.ratio import SequenceRatio, SequenceSumRatio, SequenceTokenRatio, TokenRatio
from lossmith.losses.shaping import Affine, ClipReward, Overlong
from lossmith.losses.trust import BookClip, Clip, LogP, NoTrust, SgClip, Truncate
from lossmith.losses.value import ValueLoss

__all__ = [
    "CATALOGUE", "GAE", "KL", "TD", "Affine", "Batch", "BatchMean", "BatchStd", "BookClip", "Clip", "ClipReward",
    "Credit", "Entry", "Gate", "Group", "GroupStd", "GroupStdBiased", "IcePop", "LeaveOneOut", "LogP", "LooStd",
    "LossError", "LossOutput", "MonteCarlo", "NoMismatch", "NoScale", "NoTrust", "Normalizer", "Overlong", "PolicyLoss",
    "PromptMean", "Raw", "Return", "SeqMeanTokenMean", "SeqMeanTokenSum", "SeqMeanTokenSumNorm", "SequenceRatio",
    "SequenceSumRatio", "SequenceTokenRatio", "SgClip", "TokenMean", "TokenRatio", "TokenSum", "TrapWarning",
    "Truncate", "TruncatedIS", "ValueLoss", "Whiten", "adapt_coefficient", "all_parameters", "describe",
    "get_loss", "kl_estimate",
    "list_losses", "parse_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`losses.grpo(beta=0.04)` is `get_loss("grpo", beta=0.04)`, for every name of the catalogue."""
    if name in CATALOGUE:
        return partial(get_loss, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
