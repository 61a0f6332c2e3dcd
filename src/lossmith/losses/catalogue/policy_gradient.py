"""REINFORCE and its baselines: the log-probability times an advantage."""

from lossmith.losses.axes.advantage import (
    GPG,
    LOO,
    OPO,
    TD,
    Asymmetric,
    BatchMean,
    Group,
    MaxRL,
    Raw,
    ReMax,
    Return,
    Whiten,
)
from lossmith.losses.axes.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, TokenMean
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.ratio import SequenceSumRatio
from lossmith.losses.axes.trust import Clip, LogP, NoTrust, Taper, Truncate
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss

ENTRIES = [
    Entry(
        name="reinforce",
        year=1992,
        paper="Williams 1992; book eq. 4.44",
        summary="The policy gradient itself: log-probability times reward minus the batch mean, summed over tokens.",
        build=lambda: PolicyLoss(advantage=BatchMean(), trust=LogP(), aggregate=SeqMeanTokenSum()),
        aliases=("policy_gradient", "pg", "vanilla_policy_gradient", "vpg"),
    ),
    Entry(
        name="a2c",
        year=2016,
        paper="arXiv:1602.01783; book eq. 4.27, 4.31, 4.32",
        summary="Log-probability times the temporal-difference error of a critic that is trained along.",
        build=lambda: PolicyLoss(
            advantage=TD(gamma=1.0), trust=LogP(), value=ValueLoss(coef=0.5), aggregate=SeqMeanTokenSum()
        ),
        aliases=("actor_critic", "a3c"),
    ),
    Entry(
        name="remax",
        year=2023,
        paper="arXiv:2310.10505",
        summary="Log-probability times reward-to-go minus the reward of the greedy completion.",
        build=lambda: PolicyLoss(advantage=ReMax(), trust=LogP(), aggregate=SeqMeanTokenSum()),
    ),
    Entry(
        name="rloo",
        year=2024,
        paper="arXiv:2402.14740",
        summary="Leave-one-out baseline; the clipped ratio of whole completions; KL taken off the reward.",
        build=lambda: PolicyLoss(
            advantage=LOO(),
            ratio_level=SequenceSumRatio(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.05, "k1", "reward"),
            aggregate=SeqMeanTokenMean(),
        ),
        fixed=("aggregate",),  # one number a completion, averaged over completions
    ),
    Entry(
        name="rloo_token",
        year=2024,
        paper="arXiv:2402.14740, with PPO's clip per token",
        summary="Leave-one-out baseline with the clipped ratio of each token.",
        build=lambda: PolicyLoss(advantage=LOO(), trust=Clip(0.2, 0.2), aggregate=TokenMean()),
    ),
    Entry(
        name="reinforce_pp",
        year=2025,
        paper="arXiv:2501.03262",
        summary="REINFORCE++: reward-to-go whitened over the batch, PPO's clip, KL taken off the reward.",
        build=lambda: PolicyLoss(
            advantage=Return(gamma=1.0),
            advantage_scale=Whiten(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.01, "k1", "reward"),
            aggregate=TokenMean(),
        ),
        aliases=("reinforce++", "reinforce_plus_plus"),
    ),
    Entry(
        name="reinforce_pp_baseline",
        year=2025,
        paper="arXiv:2501.03262 (its default KL coefficient is not settled: 0 here)",
        summary="REINFORCE++ with the group's mean as baseline, whitened over the batch.",
        build=lambda: PolicyLoss(
            advantage=Group(),
            advantage_scale=Whiten(),
            trust=Clip(0.2, 0.2),
            kl=KL(0.0, "k2", "loss"),
            aggregate=TokenMean(),
        ),
        aliases=("reinforce++_baseline", "reinforce_plus_plus_baseline"),
    ),
    Entry(
        name="importance_sampling",
        year=2025,
        paper="book eq. 4.45",
        summary="The ratio times the advantage, with no bound.",
        build=lambda: PolicyLoss(advantage=Group(), trust=NoTrust(), aggregate=TokenMean()),
        aliases=("is", "is_pg"),
    ),
    Entry(
        name="tis_pg",
        year=2025,
        paper="ROLL; truncated importance sampling, Ionides 2008",
        summary="Log-probability times advantage, weighted by the ratio truncated at 1.",
        build=lambda: PolicyLoss(advantage=Group(), trust=Truncate(cap=1.0), aggregate=TokenMean()),
        aliases=("truncated_importance_sampling",),
    ),
    Entry(
        name="topr",
        year=2025,
        paper="arXiv:2503.14286",
        summary="Rewarded completions in full, the others weighted by the ratio truncated at 1.",
        build=lambda: PolicyLoss(advantage=Group(), trust=Taper(cap=1.0), aggregate=TokenMean()),
    ),
    Entry(
        name="gpg",
        year=2025,
        paper="arXiv:2504.02546",
        summary="Reward minus the group's mean, scaled up by the share of completions without reward.",
        build=lambda: PolicyLoss(advantage=GPG(), trust=LogP(), aggregate=TokenMean()),
    ),
    Entry(
        name="opo",
        year=2025,
        paper="arXiv:2505.23585",
        summary="Log-probability times reward minus the group's mean, completions weighted by length in that mean.",
        build=lambda: PolicyLoss(advantage=OPO(), trust=LogP(), aggregate=TokenMean()),
    ),
    Entry(
        name="asymre",
        year=2025,
        paper="arXiv:2506.20520 (the shift is Trinity-RFT's default)",
        summary="Log-probability times reward minus a baseline below the group's mean: the good count more.",
        build=lambda: PolicyLoss(advantage=Asymmetric(shift=-0.1), trust=LogP(), aggregate=SeqMeanTokenSum()),
    ),
    Entry(
        name="maxrl",
        year=2026,
        paper="arXiv:2602.02710",
        summary="Reward minus the group's mean, divided by the mean: rare successes count more.",
        build=lambda: PolicyLoss(advantage=MaxRL(), trust=LogP(), aggregate=TokenMean()),
    ),
    Entry(
        name="reward_only",
        year=2025,
        paper="book, utility U = r",
        summary="Log-probability times the bare reward, no baseline.",
        build=lambda: PolicyLoss(advantage=Raw(), trust=LogP(), aggregate=SeqMeanTokenSum()),
    ),
]
