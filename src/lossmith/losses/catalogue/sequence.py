"""Losses whose ratio belongs to the whole completion."""

from lossmith.losses.axes.advantage import Group, GroupStd
from lossmith.losses.axes.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, TokenMean
from lossmith.losses.axes.ratio import SequenceRatio, SequenceSumRatio, SequenceTokenRatio
from lossmith.losses.axes.trust import Clip, Gamma, LogClip
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.completion.completion_loss import CompletionLoss
from lossmith.losses.completion.regressions import REAL
from lossmith.losses.composition.policy_loss import PolicyLoss


def _gspo(**more: object) -> PolicyLoss:
    fields = {"ratio_level": SequenceRatio(), "trust": Clip(3e-4, 4e-4), "aggregate": SeqMeanTokenMean()}
    return PolicyLoss(advantage=Group(), advantage_scale=GroupStd(), **{**fields, **more})  # type: ignore[arg-type]


ENTRIES = [
    Entry(
        name="gspo",
        year=2025,
        paper="arXiv:2507.18071",
        summary="GRPO's advantages with one clipped ratio a completion: the geometric mean over its tokens.",
        build=_gspo,
    ),
    Entry(
        name="gspo_token",
        year=2025,
        paper="arXiv:2507.18071, eq. 13 to 15",
        summary="GSPO's ratio with a gradient for each token, so that advantages may differ within a completion.",
        build=lambda: _gspo(ratio_level=SequenceTokenRatio()),
    ),
    Entry(
        name="luspo",
        year=2026,
        paper="arXiv:2602.05261",
        summary="GSPO with each completion weighted by its length.",
        build=lambda: _gspo(aggregate=SeqMeanTokenSum()),
    ),
    Entry(
        name="gmpo",
        year=2025,
        paper="arXiv:2507.20673",
        summary="The geometric mean of token ratios that are clipped one by one in log space.",
        build=lambda: PolicyLoss(
            advantage=Group(), advantage_scale=GroupStd(), trust=LogClip(0.4, 0.4), aggregate=SeqMeanTokenMean()
        ),
        fixed=("aggregate",),  # one number a completion, averaged over completions
    ),
    Entry(
        name="vespo",
        year=2026,
        paper="arXiv:2602.10693",
        summary="Log-probability weighted by a gamma-shaped function of the completion's ratio.",
        build=lambda: PolicyLoss(
            advantage=Group(),
            advantage_scale=GroupStd(),
            ratio_level=SequenceSumRatio(),
            trust=Gamma(),
            aggregate=TokenMean(),
        ),
    ),
    Entry(
        name="real",
        year=2026,
        paper="arXiv:2602.05630",
        summary="Tells the good completions of a group from the bad ones by their mean log-ratio.",
        build=lambda: CompletionLoss("real", REAL()),
    ),
]
