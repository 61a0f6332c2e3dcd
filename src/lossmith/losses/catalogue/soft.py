"""Losses that keep a gradient where a clip would stop it."""

from lossmith.losses.advantage import Group, GroupStd
from lossmith.losses.aggregate import TokenMean
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.policy_loss import PolicyLoss
from lossmith.losses.trust import SgClip

ENTRIES = [
    Entry(
        name="cispo",
        year=2025,
        paper="arXiv:2506.13585; cap from arXiv:2510.13786",
        summary="REINFORCE weighted by the ratio, capped and without gradient: no token loses its gradient.",
        build=lambda: PolicyLoss(
            advantage=Group(), scale=GroupStd(), trust=SgClip(low=1.0, cap=5.0), aggregate=TokenMean()
        ),
    ),
]
