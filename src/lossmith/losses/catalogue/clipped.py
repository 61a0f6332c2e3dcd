"""PPO and its descendants: a clipped ratio per token."""

from lossmith.losses.axes.advantage import GAE, GFPO, VAPO, BatchStd, Group, GroupStd, Optimistic, PassAtK
from lossmith.losses.axes.aggregate import SeqMeanTokenMean, SeqMeanTokenSumNorm, TokenMean
from lossmith.losses.axes.extra.terms import NLLPositive
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.masks import OPSM, TopEntropy, ZeroVariance
from lossmith.losses.axes.mismatch import TIS
from lossmith.losses.axes.shaping import Overlong
from lossmith.losses.axes.trust import (
    BalancedClip,
    Clip,
    CovDrop,
    CovKL,
    DynamicClip,
    Influence,
    M2Mask,
    PrefixBudget,
    Preserve,
    QuadraticPenalty,
    Reciprocal,
    Unbounded,
)
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss

INF = float("inf")


def _critic(trust: Clip, **more: object) -> PolicyLoss:
    """PPO's generalized advantages with a critic that is trained along."""
    fields = {"advantage": GAE(gamma=1.0, lam=0.95), "value": ValueLoss(coef=0.5), "aggregate": TokenMean()}
    return PolicyLoss(trust=trust, **{**fields, **more})  # type: ignore[arg-type]


def _grouped(**more: object) -> PolicyLoss:
    """GRPO's advantages, every token counting the same."""
    fields: dict[str, object] = {"advantage": Group(), "advantage_scale": GroupStd(), "aggregate": TokenMean()}
    return PolicyLoss(**{**fields, **more})  # type: ignore[arg-type]


def _grpo(**more: object) -> PolicyLoss:
    fields: dict[str, object] = {"trust": Clip(0.2, 0.2), "kl": KL(0.04, "k3", "loss"), "aggregate": SeqMeanTokenMean()}
    return _grouped(**{**fields, **more})


def _dapo(**more: object) -> PolicyLoss:
    fields = {"shaping": (Overlong(),), "trust": Clip(0.2, 0.28), "group_filter": ZeroVariance()}
    return _grouped(**{**fields, **more})


ENTRIES = [
    Entry(
        name="ppo",
        year=2017,
        paper="arXiv:1707.06347",
        summary="Clipped ratio, generalized advantages of a critic that is trained along.",
        build=lambda: _critic(Clip(0.2, 0.2)),
        aliases=("ppo_clip",),
    ),
    Entry(
        name="ppo_dual_clip",
        year=2019,
        paper="arXiv:1912.09729",
        summary="PPO that also bounds the ratio of bad actions from above.",
        build=lambda: _critic(Clip(0.2, 0.2, dual=3.0)),
        aliases=("dual_clip_ppo", "dual_clip"),
    ),
    Entry(
        name="two_sided_ppo",
        year=2025,
        paper="arXiv:2505.07291 (INTELLECT-2); `delta` of TRL is dual_clip here",
        summary="The dual clip under its other name, with a bound of 4.",
        build=lambda: _critic(Clip(0.2, 0.2, dual=4.0)),
        aliases=("two_sided_clip", "two_sided_grpo"),
    ),
    Entry(
        name="grpo",
        year=2024,
        paper="arXiv:2402.03300",
        summary="Reward minus the group's mean over its standard deviation; clipped ratio; k3 in the loss.",
        build=_grpo,
    ),
    Entry(
        name="bnpo",
        year=2025,
        paper="TRL, loss_type 'bnpo'",
        summary="GRPO with the token mean of each micro-batch by itself: depends on how the batch is cut.",
        build=lambda: _grouped(trust=Clip(0.2, 0.2), local_normalizer=True),
        demonstration=True,
    ),
    Entry(
        name="dr_grpo",
        year=2025,
        paper="arXiv:2503.20783",
        summary="GRPO without its two biases: no standard deviation, tokens divided by a constant length.",
        build=lambda: PolicyLoss(advantage=Group(), trust=Clip(0.2, 0.2), aggregate=SeqMeanTokenSumNorm()),
        aliases=("dr.grpo", "drgrpo", "grpo_done_right"),
    ),
    Entry(
        name="dapo",
        year=2025,
        paper="arXiv:2503.14476",
        summary="GRPO with a higher upper clip, token mean, soft overlong punishment, no groups of equal rewards.",
        build=_dapo,
    ),
    Entry(
        name="lite_ppo",
        year=2025,
        paper="arXiv:2508.08221",
        summary="Reward minus the group's mean over the batch's standard deviation; clipped ratio; token mean.",
        build=lambda: _grouped(advantage_scale=BatchStd(), trust=Clip(0.2, 0.28)),
    ),
    Entry(
        name="gfpo",
        year=2025,
        paper="arXiv:2508.09726 (its KL coefficient is not settled: 0.001 here)",
        summary="Only the shortest (or most efficient) completions of each group get an advantage.",
        build=lambda: PolicyLoss(
            advantage=GFPO(), trust=Clip(0.2, 0.2), kl=KL(0.001, "k3", "loss"), aggregate=TokenMean()
        ),
        example={"keep": 2},
    ),
    Entry(
        name="pass_at_k",
        year=2025,
        paper="arXiv:2503.19595",
        summary="Only the best completion of a group counts, by its lead over the second best.",
        build=lambda: _grouped(advantage=PassAtK(), trust=Clip(0.2, 0.2)),
        aliases=("pass@k",),
    ),
    Entry(
        name="decoupled_ppo",
        year=2025,
        paper="arXiv:2505.24298 (AReaL)",
        summary="PPO's clip against the old policy, weighted by the ratio of old policy and sampler.",
        build=lambda: _critic(Clip(0.2, 0.2), mismatch=TIS(high=INF)),
    ),
    Entry(
        name="vapo",
        year=2025,
        paper="arXiv:2504.05118 (its likelihood coefficient is not settled: 0.1 here)",
        summary="PPO whose generalized advantages follow the length, and imitation of what went well.",
        build=lambda: _critic(Clip(0.2, 0.28), advantage=VAPO(), extra=NLLPositive(0.1)),
    ),
    Entry(
        name="m2po",
        year=2025,
        paper="arXiv:2510.01161",
        summary="Drops the tokens furthest off the sampler until their second moment is small, then clips.",
        build=lambda: _grouped(trust=M2Mask()),
        example={"m2_threshold": 0.04},
    ),
    Entry(
        name="fipo",
        year=2026,
        paper="arXiv:2603.19835",
        summary="PPO's clip weighted by how the tokens that follow have moved.",
        build=lambda: _grouped(trust=Influence()),
    ),
    Entry(
        name="gppo",
        year=2025,
        paper="arXiv:2508.07629",
        summary="PPO's clip whose bounds keep a gradient of their own size.",
        build=lambda: _grouped(trust=Preserve(0.2, 0.28)),
    ),
    Entry(
        name="ce_gppo",
        year=2025,
        paper="arXiv:2509.20712",
        summary="GPPO with scaled gradients at the bounds and a dual clip.",
        build=lambda: _grouped(trust=Preserve(0.2, 0.28, beta_low=0.75, beta_high=1.0, dual=3.0)),
    ),
    Entry(
        name="dcpo",
        year=2025,
        paper="arXiv:2509.02333 (without its stateful advantages; the paper sums over responses)",
        summary="PPO's clip with bounds that widen for rare tokens.",
        build=lambda: _grouped(trust=DynamicClip(0.16, 0.2, dual=10.0), aggregate=SeqMeanTokenMean()),
    ),
    Entry(
        name="bapo",
        year=2025,
        paper="arXiv:2510.18927, after the authors' code (step sizes are not settled)",
        summary="PPO's clip with bounds that move until good actions carry their share.",
        build=lambda: _grouped(trust=BalancedClip()),
        example={"low_step": 0.05, "high_step": 0.1},
    ),
    Entry(
        name="clip_cov",
        year=2025,
        paper="arXiv:2505.22317",
        summary="PPO's clip without a random few of the tokens that lower entropy most.",
        build=lambda: _grouped(trust=CovDrop()),
        aliases=("clip-cov",),
    ),
    Entry(
        name="kl_cov",
        year=2025,
        paper="arXiv:2505.22317",
        summary="The unclipped ratio, with a pull on the tokens that lower entropy most.",
        build=lambda: _grouped(trust=CovKL()),
        aliases=("kl-cov",),
    ),
    Entry(
        name="ngrpo",
        year=2025,
        paper="arXiv:2509.18851, after the authors' code",
        summary="GRPO with one more completion of the largest reward in each group, so that failures alone teach too.",
        build=lambda: PolicyLoss(advantage=Optimistic(), trust=Clip(0.16, 0.24), aggregate=TokenMean()),
    ),
    Entry(
        name="up_grpo",
        year=2026,
        paper="arXiv:2607.06987, after slime",
        summary="GRPO whose good tokens are not bounded: log-probability for A > 0, PPO's clip for the others.",
        build=lambda: _grouped(trust=Unbounded(0.2)),
        aliases=("up",),
    ),
    Entry(
        name="aspo",
        year=2025,
        paper="arXiv:2510.06062, after slime",
        summary="GRPO whose good tokens weigh 1/r: those that were left behind count more.",
        build=lambda: _grouped(trust=Reciprocal(0.2, 0.2)),
    ),
    Entry(
        name="cfpo",
        year=2026,
        paper="arXiv:2601.22801; the term is SPO's, 2401.16025",
        summary="GRPO with a quadratic penalty of the ratio in place of a clip: a gradient at every token.",
        build=lambda: _grouped(trust=QuadraticPenalty(0.2)),
        aliases=("spo", "simple_policy_optimization"),
    ),
    Entry(
        name="cppo",
        year=2026,
        paper="arXiv:2606.10968, eq. 8 and 9, with the sampled token's move",
        summary="Drops tokens that move on where they, or the tokens before them, have moved too far already.",
        build=lambda: _grouped(trust=PrefixBudget()),
    ),
    Entry(
        name="grpo_opsm",
        year=2025,
        paper="arXiv:2512.02556",
        summary="GRPO without bad completions that the policy has already left behind.",
        build=lambda: _grpo(sequence_mask=OPSM()),
        example={"opsm_delta": 0.1},
    ),
    Entry(
        name="grpo_top_entropy",
        year=2025,
        paper="arXiv:2506.01939",
        summary="DAPO on the fifth of the tokens where the policy is least sure.",
        build=lambda: _dapo(token_mask=TopEntropy(0.2)),
        aliases=("high_entropy_tokens", "beyond_80_20"),
    ),
]
