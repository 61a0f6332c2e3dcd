"""Stop-gradient weights, soft gates, and trust regions in probability space."""

from lossmith.losses.axes.advantage import Group, GroupStd
from lossmith.losses.axes.aggregate import SeqMeanTokenMean, SeqMeanTokenSumNorm, TokenMean
from lossmith.losses.axes.extra.terms import SquareLogRatio
from lossmith.losses.axes.ratio import TokenRatio
from lossmith.losses.axes.trust import (
    Band,
    KLMask,
    Luffy,
    Quadratic,
    RecOneSide,
    RecRing,
    RecTwoSide,
    ScaledLogP,
    SgClip,
    Sigmoid,
    Trust,
    TVMask,
    TVMaskSymmetric,
)
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss


def _scaled(trust: Trust, **more: object) -> PolicyLoss:
    """GRPO's advantages under another trust region, every token counting the same."""
    fields: dict[str, object] = {"advantage_scale": GroupStd(), "aggregate": TokenMean()}
    return PolicyLoss(advantage=Group(), trust=trust, **{**fields, **more})  # type: ignore[arg-type]


def _centered(trust: Trust, **more: object) -> PolicyLoss:
    """Reward minus the group's mean, every token counting the same."""
    return PolicyLoss(advantage=Group(), trust=trust, aggregate=TokenMean(), **more)  # type: ignore[arg-type]


SAMPLER = TokenRatio(denominator="behavior")

ENTRIES = [
    Entry(
        name="cispo",
        year=2025,
        paper="arXiv:2506.13585; cap from arXiv:2510.13786",
        summary="REINFORCE weighted by the ratio, capped and without gradient: no token loses its gradient.",
        build=lambda: _scaled(SgClip(low=1.0, cap=5.0)),
        aliases=("minimax_m1", "scalerl"),
    ),
    Entry(
        name="sapo",
        year=2025,
        paper="arXiv:2511.20347",
        summary="A sigmoid gate around ratio 1 instead of a clip; steeper for bad actions.",
        build=lambda: _scaled(Sigmoid(1.0, 1.05), aggregate=SeqMeanTokenMean()),
    ),
    Entry(
        name="rec_one_side",
        year=2025,
        paper="arXiv:2509.24203, after Trinity-RFT 0.6.0",
        summary="REINFORCE weighted by the ratio, without tokens past the bound that their advantage pushes to.",
        build=lambda: _centered(RecOneSide()),
    ),
    Entry(
        name="rec_two_side",
        year=2025,
        paper="arXiv:2509.24203, after Trinity-RFT 0.6.0",
        summary="REINFORCE weighted by the ratio, without tokens outside its bounds.",
        build=lambda: _centered(RecTwoSide()),
    ),
    Entry(
        name="rec_ring",
        year=2025,
        paper="arXiv:2509.24203, after Trinity-RFT 0.6.0",
        summary="REINFORCE weighted by the ratio, without tokens in two rings beside its bounds.",
        build=lambda: _centered(RecRing()),
    ),
    Entry(
        name="dppo_tv",
        year=2026,
        paper="arXiv:2602.04879",
        summary="Drops tokens whose probability moved too far where their advantage pushes.",
        build=lambda: _centered(TVMask(0.2, 0.2, cap=20.0)),
        aliases=("dppo",),
    ),
    Entry(
        name="dppo_kl",
        year=2026,
        paper="arXiv:2602.04879 (no agreed threshold: 0.05 here)",
        summary="DPPO that measures the move by the KL divergence of the sampled token.",
        build=lambda: _centered(KLMask(0.05, 0.05, cap=20.0)),
    ),
    Entry(
        name="dppo_square",
        year=2026,
        paper="arXiv:2602.04879, 2602.02276; PRIME-RL's default",
        summary="DPPO on the ratio to the sampler, with a squared pull towards the sampler.",
        build=lambda: _centered(
            TVMask(0.2, 0.2, cap=None, surrogate="ratio"), ratio_level=SAMPLER, extra=SquareLogRatio(1e-3)
        ),
    ),
    Entry(
        name="ipo_mask",
        year=2026,
        paper="PRIME-RL, loss 'ipo'",
        summary="Drops every token whose probability moved, with a squared pull towards the sampler.",
        build=lambda: _centered(TVMaskSymmetric(0.1), ratio_level=SAMPLER, extra=SquareLogRatio(1e-3)),
    ),
    Entry(
        name="rollout_is",
        year=2025,
        paper="SkyRL; the band of arXiv:2510.18855",
        summary="Log-probability weighted by the ratio to the sampler, inside a band and nowhere else.",
        build=lambda: _centered(Band(0.2, 0.2), ratio_level=SAMPLER),
    ),
    Entry(
        name="dro",
        year=2024,
        paper="arXiv:2405.19107",
        summary="Log-probability times advantage, with a squared pull towards the old policy.",
        build=lambda: _centered(Quadratic(tau=0.05)),
    ),
    Entry(
        name="kimi_opmd",
        year=2025,
        paper="arXiv:2501.12599, in token form",
        summary="Kimi k1.5's mirror descent: reward minus the group's mean, squared pull to the old policy.",
        build=lambda: _centered(Quadratic(tau=0.1)),
        aliases=("kimi", "kimi_k1.5", "kimi_k15"),
    ),
    Entry(
        name="opmd",
        year=2025,
        paper="arXiv:2501.12599, as in Trinity-RFT",
        summary="Log-probability times advantage over 1 + τ.",
        build=lambda: _centered(ScaledLogP()),
        example={"tau": 0.5},
    ),
    Entry(
        name="luffy",
        year=2025,
        paper="arXiv:2504.14945, after the authors' code",
        summary="Learns from its own completions and from another policy's, whose rare tokens count more.",
        build=lambda: PolicyLoss(advantage=Group(), trust=Luffy(0.1), aggregate=SeqMeanTokenSumNorm()),
    ),
]
