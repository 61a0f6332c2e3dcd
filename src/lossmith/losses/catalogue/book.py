"""The book's forms as printed, to be looked at (numbering follows NLPBook ch. 10, arXiv:2501.09223)."""

from lossmith.losses.axes.advantage import Raw
from lossmith.losses.axes.aggregate import SeqMeanTokenSum
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.trust import BookClip, LogP
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss

ENTRIES = [
    Entry(
        name="book_reinforce",
        year=2025,
        paper="book eq. 4.44",
        summary="The book's policy gradient: log-probability times the utility as it is.",
        build=lambda: PolicyLoss(advantage=Raw(), trust=LogP(), aggregate=SeqMeanTokenSum()),
    ),
    Entry(
        name="book_clip",
        year=2025,
        paper="book eq. 4.49, 4.50",
        summary="Demonstration: the clip as printed, min(ratio, 1 + ε)·A; the lower bound never binds.",
        build=lambda: PolicyLoss(advantage=Raw(), trust=BookClip(0.2), aggregate=SeqMeanTokenSum()),
        demonstration=True,
    ),
    Entry(
        name="book_ppo_clip",
        year=2025,
        paper="book eq. 4.53 to 4.56",
        summary="Demonstration: the clip and the log-ratio penalty as printed; the penalty regularizes nothing.",
        build=lambda: PolicyLoss(
            advantage=Raw(), trust=BookClip(0.2), kl=KL(0.1, "k1", "loss"), aggregate=SeqMeanTokenSum()
        ),
        demonstration=True,
    ),
]
