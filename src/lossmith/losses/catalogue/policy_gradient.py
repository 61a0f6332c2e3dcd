"""REINFORCE and its baselines: the log-probability times an advantage."""

from lossmith.losses.advantage import TD, BatchMean, LeaveOneOut, Return, Whiten
from lossmith.losses.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, TokenMean
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.kl import KL
from lossmith.losses.policy_loss import PolicyLoss
from lossmith.losses.ratio import SequenceSumRatio
from lossmith.losses.trust import Clip, LogP
from lossmith.losses.value import ValueLoss

ENTRIES = [
    Entry(
        name="reinforce",
        year=1992,
        paper="Williams 1992; book eq. 4.44",
        summary="The policy gradient itself: log-probability times reward minus the batch mean.",
        build=lambda: PolicyLoss(advantage=BatchMean(), trust=LogP(), aggregate=TokenMean()),
    ),
    Entry(
        name="a2c",
        year=2016,
        paper="arXiv:1602.01783; book eq. 4.27, 4.31, 4.32",
        summary="Log-probability times the temporal-difference error of a critic that is trained along.",
        build=lambda: PolicyLoss(
            advantage=TD(gamma=1.0), trust=LogP(), value=ValueLoss(coef=0.5), aggregate=SeqMeanTokenSum()
        ),
    ),
    Entry(
        name="rloo",
        year=2024,
        paper="arXiv:2402.14740",
        summary="Leave-one-out baseline; the clipped ratio of whole completions; KL taken off the reward.",
        build=lambda: PolicyLoss(
            advantage=LeaveOneOut(),
            ratio=SequenceSumRatio(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.05, "k1", "reward"),
            aggregate=SeqMeanTokenMean(),
        ),
        fixed=("aggregate",),  # one number a completion, averaged over completions
    ),
    Entry(
        name="reinforce_pp",
        year=2025,
        paper="arXiv:2501.03262",
        summary="REINFORCE++: reward-to-go whitened over the batch, PPO's clip, KL taken off the reward.",
        build=lambda: PolicyLoss(
            advantage=Return(gamma=1.0),
            scale=Whiten(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.01, "k1", "reward"),
            aggregate=TokenMean(),
        ),
    ),
]
