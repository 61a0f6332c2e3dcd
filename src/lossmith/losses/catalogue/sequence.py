"""Losses whose ratio belongs to the whole completion."""

from lossmith.losses.advantage import Group, GroupStd
from lossmith.losses.aggregate import SeqMeanTokenMean
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.policy_loss import PolicyLoss
from lossmith.losses.ratio import SequenceRatio
from lossmith.losses.trust import Clip

ENTRIES = [
    Entry(
        name="gspo",
        year=2025,
        paper="arXiv:2507.18071",
        summary="GRPO's advantages with one clipped ratio a completion: the geometric mean over its tokens.",
        build=lambda: PolicyLoss(
            advantage=Group(),
            scale=GroupStd(),
            ratio=SequenceRatio(),
            trust=Clip(3e-4, 4e-4),
            aggregate=SeqMeanTokenMean(),
        ),
    ),
]
