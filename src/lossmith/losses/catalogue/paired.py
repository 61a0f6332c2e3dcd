"""Preferences among the policy's own completions, and regressions of its log-ratio on the reward."""

from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.completion_loss import CompletionLoss
from lossmith.losses.completion_terms import A2PO, GVPO, SPPO, OnlineDPO, OnlineIPO, OnlineKTO

ENTRIES = [
    Entry(
        name="online_dpo",
        year=2024,
        paper="arXiv:2305.18290, 2402.04792",
        summary="DPO on pairs of the policy's own completions, the best against the worst of each group.",
        build=lambda: CompletionLoss("online_dpo", OnlineDPO()),
        aliases=("dpo", "oaif"),
    ),
    Entry(
        name="online_ipo",
        year=2023,
        paper="arXiv:2310.12036",
        summary="IPO on pairs of the policy's own completions: a margin to reach, not to exceed.",
        build=lambda: CompletionLoss("online_ipo", OnlineIPO()),
        aliases=("ipo",),
    ),
    Entry(
        name="online_kto",
        year=2024,
        paper="arXiv:2402.01306 (its reference point taken on-policy)",
        summary="KTO on the policy's own completions, good or bad by a threshold; no pairs needed.",
        build=lambda: CompletionLoss("online_kto", OnlineKTO()),
        aliases=("kto",),
    ),
    Entry(
        name="a2po",
        year=2025,
        paper="arXiv:2505.20686",
        summary="A*-PO: regresses the log-ratio on reward minus the optimal value, estimated from the reference.",
        build=lambda: CompletionLoss("a2po", A2PO()),
        aliases=("a*-po", "a_star_po", "astar_po"),
    ),
    Entry(
        name="gvpo",
        year=2025,
        paper="arXiv:2504.19599",
        summary="Regresses the centred log-ratio of a group on its centred reward.",
        build=lambda: CompletionLoss("gvpo", GVPO()),
    ),
    Entry(
        name="sppo",
        year=2024,
        paper="arXiv:2405.00675",
        summary="Regresses the log-ratio on the win rate of each completion.",
        build=lambda: CompletionLoss("sppo", SPPO()),
        example={"eta": 0.5},
    ),
]
