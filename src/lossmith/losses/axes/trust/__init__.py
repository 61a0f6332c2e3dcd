"""Trust regions: the per-token policy term ℓ(r, A), and its weight w(r, A) = -(dℓ/dlogp)/A in closed form."""

from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.axes.trust.clipped import BalancedClip, BookClip, Clip, DynamicClip, Influence, Preserve
from lossmith.losses.axes.trust.completion import LogClip
from lossmith.losses.axes.trust.selective import CovDrop, CovKL, KLMask, Luffy, M2Mask, TVMask, TVMaskSymmetric
from lossmith.losses.axes.trust.soft import (
    Band,
    Gamma,
    LogP,
    NoTrust,
    Quadratic,
    ScaledLogP,
    SgClip,
    Sigmoid,
    Taper,
    Truncate,
)
from lossmith.losses.piece import options

__all__ = [
    "TRUST", "BalancedClip", "Band", "BookClip", "Clip", "CovDrop", "CovKL", "DynamicClip", "Gamma", "Influence",
    "KLMask", "LogClip", "LogP", "Luffy", "M2Mask", "NoTrust", "Preserve", "Quadratic", "ScaledLogP", "SgClip",
    "Sigmoid", "TVMask", "TVMaskSymmetric", "Taper", "Tokens", "Truncate", "Trust",
]  # fmt: skip

TRUST: dict[str, type[Trust]] = options(
    LogP, ScaledLogP, NoTrust, Clip, BookClip, Preserve, DynamicClip, BalancedClip, Influence, SgClip, Truncate, Taper,
    Band, Gamma, Sigmoid, Quadratic, LogClip, TVMask, KLMask, TVMaskSymmetric, M2Mask, CovDrop, CovKL, Luffy,
)  # fmt: skip
