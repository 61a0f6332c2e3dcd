"""Terms that are used with others, as losses of their own: the KL penalty, the critic's loss."""

from lossmith.losses.axes.advantage import Zero
from lossmith.losses.axes.aggregate import TokenMean
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss

ENTRIES = [
    Entry(
        name="kl_only",
        year=2020,
        paper="Schulman 2020, Approximating KL divergence",
        summary="The KL penalty alone, without a policy term.",
        build=lambda: PolicyLoss(advantage=Zero(), kl=KL(1.0, "k3", "loss"), aggregate=TokenMean()),
        fixed=("advantage",),
    ),
    Entry(
        name="value_clipped",
        year=2017,
        paper="arXiv:1707.06347, as in OpenAI baselines; book eq. 4.32",
        summary="The critic's loss alone, its move bounded.",
        build=lambda: PolicyLoss(advantage=Zero(), value=ValueLoss(1.0, 0.2), aggregate=TokenMean()),
        fixed=("advantage",),
    ),
]
