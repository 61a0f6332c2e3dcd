"""Preferences among completions, given or the policy's own, and regressions of its log-ratio on the reward."""

from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.completion.completion_loss import CompletionLoss
from lossmith.losses.completion.preferences import (
    CPO,
    KTO,
    ORPO,
    Hinge,
    OnlineDPO,
    OnlineIPO,
    OnlineKTO,
    RobustDPO,
    SimPO,
    SLiC,
)
from lossmith.losses.completion.regressions import A2PO, GVPO, SPPO

ENTRIES = [
    Entry(
        name="dpo",
        year=2023,
        paper="arXiv:2305.18290",
        summary="DPO on given pairs, or on all pairs of a group: which of the two is better, by their log-ratios.",
        build=lambda: CompletionLoss("dpo", OnlineDPO(pairs="all")),
    ),
    Entry(
        name="cdpo",
        year=2023,
        paper="Mitchell 2023, A note on DPO with noisy preferences",
        summary="Conservative DPO: every label is taken as wrong with a small probability.",
        build=lambda: CompletionLoss("cdpo", OnlineDPO(pairs="all", label_smoothing=0.1)),
    ),
    Entry(
        name="robust_dpo",
        year=2024,
        paper="arXiv:2403.00409",
        summary="DPO without the bias of labels that were flipped with a known probability.",
        build=lambda: CompletionLoss("robust_dpo", RobustDPO()),
        aliases=("rdpo",),
    ),
    Entry(
        name="ipo",
        year=2023,
        paper="arXiv:2310.12036",
        summary="IPO on given pairs: a margin of log-ratios to reach, not to exceed.",
        build=lambda: CompletionLoss("ipo", OnlineIPO(pairs="all")),
    ),
    Entry(
        name="kto",
        year=2024,
        paper="arXiv:2402.01306",
        summary="KTO on completions that are good or bad; no pairs needed. Its reference point is of mismatched pairs.",
        build=lambda: CompletionLoss("kto", KTO()),
        example={"threshold": 0.7},  # the proofs' rewards are no labels: some lie on either side of this
    ),
    Entry(
        name="dpo_hinge",
        year=2023,
        paper="arXiv:2309.06657",
        summary="The hinge of RSO on DPO's margin: nothing is learned beyond it.",
        build=lambda: CompletionLoss("dpo_hinge", Hinge()),
        aliases=("hinge", "rso_hinge"),
    ),
    Entry(
        name="slic",
        year=2023,
        paper="arXiv:2305.10425",
        summary="SLiC-HF: a hinge on the margin of log-probabilities, and imitation of the winner; no reference.",
        build=lambda: CompletionLoss("slic", SLiC()),
        aliases=("slic_hf",),
    ),
    Entry(
        name="cpo",
        year=2024,
        paper="arXiv:2401.08417",
        summary="DPO without its reference, and imitation of the winner.",
        build=lambda: CompletionLoss("cpo", CPO()),
    ),
    Entry(
        name="simpo",
        year=2024,
        paper="arXiv:2405.14734",
        summary="The margin of mean token log-probabilities, beyond a target; no reference.",
        build=lambda: CompletionLoss("simpo", SimPO()),
    ),
    Entry(
        name="orpo",
        year=2024,
        paper="arXiv:2403.07691",
        summary="Imitation of the winner, and the ratio of the odds of both; no reference.",
        build=lambda: CompletionLoss("orpo", ORPO()),
    ),
    Entry(
        name="online_dpo",
        year=2024,
        paper="arXiv:2305.18290, 2402.04792",
        summary="DPO on pairs of the policy's own completions, the best against the worst of each group.",
        build=lambda: CompletionLoss("online_dpo", OnlineDPO()),
        aliases=("oaif",),
    ),
    Entry(
        name="online_ipo",
        year=2023,
        paper="arXiv:2310.12036",
        summary="IPO on pairs of the policy's own completions: a margin to reach, not to exceed.",
        build=lambda: CompletionLoss("online_ipo", OnlineIPO()),
    ),
    Entry(
        name="online_kto",
        year=2024,
        paper="arXiv:2402.01306 (its reference point taken on-policy)",
        summary="KTO on the policy's own completions, good or bad by a threshold; no pairs needed.",
        build=lambda: CompletionLoss("online_kto", OnlineKTO()),
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
