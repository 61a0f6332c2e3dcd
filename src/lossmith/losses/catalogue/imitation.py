"""Imitation of completions that were chosen by their reward."""

from lossmith.losses.axes.advantage import Ones
from lossmith.losses.axes.aggregate import SeqMeanTokenSum, TokenMean
from lossmith.losses.axes.masks import Above, Best, GroupFilter
from lossmith.losses.axes.trust import LogP
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss


def _imitate(group_filter: GroupFilter) -> PolicyLoss:
    return PolicyLoss(advantage=Ones(), trust=LogP(), group_filter=group_filter, aggregate=SeqMeanTokenSum())


ENTRIES = [
    Entry(
        name="sft",
        year=2022,
        paper="arXiv:2203.02155, first stage",
        summary="Imitates every completion, whatever its reward.",
        build=lambda: PolicyLoss(advantage=Ones(), trust=LogP(), aggregate=TokenMean()),
        aliases=("nll", "supervised"),
        demonstration=True,
    ),
    Entry(
        name="rejection_sampling",
        year=2021,
        paper="arXiv:2112.09332",
        summary="Imitates the completions whose reward is above a threshold.",
        build=lambda: _imitate(Above()),
        aliases=("rft", "filtered_bc"),
        example={"threshold": 0.5},
    ),
    Entry(
        name="best_of_n",
        year=2023,
        paper="arXiv:2304.06767 (RAFT)",
        summary="Imitates the best completion of each group.",
        build=lambda: _imitate(Best()),
        aliases=("raft", "best_of_n_distillation", "bond"),
    ),
]
