"""PPO and its descendants: a clipped ratio per token."""

from lossmith.losses.advantage import GAE, Group, GroupStd
from lossmith.losses.aggregate import SeqMeanTokenMean, SeqMeanTokenSumNorm, TokenMean
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.kl import KL
from lossmith.losses.policy_loss import PolicyLoss
from lossmith.losses.shaping import Overlong
from lossmith.losses.trust import Clip
from lossmith.losses.value import ValueLoss

ENTRIES = [
    Entry(
        name="ppo",
        year=2017,
        paper="arXiv:1707.06347",
        summary="Clipped ratio, generalised advantages of a critic that is trained along.",
        build=lambda: PolicyLoss(
            advantage=GAE(gamma=1.0, lam=0.95), trust=Clip(0.2, 0.2), value=ValueLoss(coef=0.5), aggregate=TokenMean()
        ),
    ),
    Entry(
        name="grpo",
        year=2024,
        paper="arXiv:2402.03300",
        summary="Reward minus the group's mean over its standard deviation; clipped ratio; k3 in the loss.",
        build=lambda: PolicyLoss(
            advantage=Group(),
            scale=GroupStd(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.04, "k3", "loss"),
            aggregate=SeqMeanTokenMean(),
        ),
    ),
    Entry(
        name="dr_grpo",
        year=2025,
        paper="arXiv:2503.20783",
        summary="GRPO without its two biases: no standard deviation, tokens divided by a constant length.",
        build=lambda: PolicyLoss(advantage=Group(), trust=Clip(0.2, 0.2), aggregate=SeqMeanTokenSumNorm()),
    ),
    Entry(
        name="dapo",
        year=2025,
        paper="arXiv:2503.14476",
        summary="GRPO with a higher upper clip, token mean, soft overlong punishment, no groups of equal rewards.",
        build=lambda: PolicyLoss(
            shaping=(Overlong(),),
            advantage=Group(),
            scale=GroupStd(),
            trust=Clip(0.2, 0.28),
            group_filter="zero_variance",
            aggregate=TokenMean(),
        ),
    ),
]
