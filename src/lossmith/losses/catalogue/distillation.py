"""Distillation: the policy learns from a teacher's probabilities, on completions of its own.

The teacher is another model, or the policy itself that was told more than its prompt: feedback, a demonstration.
"""

from lossmith.losses.axes.advantage import (
    EarlyTeacherGap,
    Group,
    GroupStd,
    TeacherGap,
    TeacherMix,
    TeacherReweighted,
    Zero,
)
from lossmith.losses.axes.aggregate import TokenMean
from lossmith.losses.axes.extra.divergence import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
from lossmith.losses.axes.extra.teacher import GatedTeacher
from lossmith.losses.axes.trust import Clip, LogP, NoTrust
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.policy_loss import PolicyLoss


def _of(divergence: Divergence) -> PolicyLoss:
    return PolicyLoss(advantage=Zero(), extra=divergence, aggregate=TokenMean())


ENTRIES = [
    Entry(
        name="reverse_kl",
        year=2023,
        paper="arXiv:2306.08543, 2306.13649",
        summary="KL(policy || teacher) over the vocabulary at every token of the policy's completions.",
        build=lambda: _of(ReverseKL()),
        aliases=("reverse_kl_distillation", "on_policy_distillation"),
    ),
    Entry(
        name="forward_kl",
        year=2015,
        paper="arXiv:1503.02531, on the policy's completions as in 2306.13649",
        summary="KL(teacher || policy) over the vocabulary at every token of the policy's completions.",
        build=lambda: _of(ForwardKL()),
        aliases=("forward_kl_distillation", "knowledge_distillation"),
    ),
    Entry(
        name="gkd",
        year=2023,
        paper="arXiv:2306.13649",
        summary="The generalized Jensen-Shannon divergence between teacher and policy, over the vocabulary.",
        build=lambda: _of(JSD(beta=0.5)),
        aliases=("generalized_jsd", "jsd"),
    ),
    Entry(
        name="skew_kl",
        year=2024,
        paper="arXiv:2402.03898 (DistiLLM)",
        summary="KL from the teacher to a mixture of the policy with a tenth of the teacher, over the vocabulary.",
        build=lambda: _of(SkewKL(skew=0.1)),
        aliases=("skl", "distillm"),
    ),
    Entry(
        name="skew_reverse_kl",
        year=2024,
        paper="arXiv:2402.03898 (DistiLLM)",
        summary="KL from the policy to a mixture of the teacher with a tenth of the policy, over the vocabulary.",
        build=lambda: _of(SkewReverseKL(skew=0.1)),
        aliases=("srkl",),
    ),
    Entry(
        name="sdpo",
        year=2026,
        paper="arXiv:2601.20802, after the authors' code",
        summary="Self-distillation: Jensen-Shannon divergence from the policy that was told feedback, on the 100 "
        "likeliest tokens and one for the rest.",
        build=lambda: _of(JSD(beta=0.5, top_k=100, support="policy", tail=True)),
        example={"distil_top_k": 2},
    ),
    Entry(
        name="sdft",
        year=2026,
        paper="arXiv:2601.19897",
        summary="Self-distillation: reverse KL to the policy that was shown a demonstration, over the vocabulary.",
        build=lambda: _of(ReverseKL()),
    ),
    Entry(
        name="opd",
        year=2025,
        paper="on-policy distillation; losses of this kind in PRIME-RL and Tinker",
        summary="The reverse KL to the teacher, sampled: the log-ratio of teacher and policy as a token's advantage.",
        build=lambda: PolicyLoss(advantage=TeacherGap(), trust=NoTrust(), aggregate=TokenMean()),
        aliases=("sampled_reverse_kl",),
    ),
    Entry(
        name="iw_opd",
        year=2026,
        paper="arXiv:2606.22600, after TRL 1.16.0",
        summary="On-policy distillation in which tokens before the policy has left the teacher count more.",
        build=lambda: PolicyLoss(advantage=EarlyTeacherGap(), trust=LogP(), aggregate=TokenMean()),
    ),
    Entry(
        name="sdpo_grpo",
        year=2026,
        paper="arXiv:2601.20802 (the share is not settled: 0.9 here)",
        summary="GRPO's advantage and on-policy distillation's, added up in shares, in PPO's clip.",
        build=lambda: PolicyLoss(advantage=TeacherMix(), trust=Clip(0.2, 0.2), aggregate=TokenMean()),
        aliases=("opd_grpo",),
    ),
    Entry(
        name="rlsd",
        year=2026,
        paper="arXiv:2604.03128, after ms-swift 4.6.0",
        summary="GRPO whose advantage is moved between the tokens of a completion by a teacher that knows the answer.",
        build=lambda: PolicyLoss(advantage=TeacherReweighted(), trust=Clip(0.2, 0.2), aggregate=TokenMean()),
    ),
    Entry(
        name="sdar",
        year=2026,
        paper="arXiv:2605.15155, after ms-swift 4.6.0",
        summary="GRPO, and imitation of sampled tokens that the teacher holds likelier, through a gate.",
        build=lambda: PolicyLoss(
            advantage=Group(),
            advantage_scale=GroupStd(),
            trust=Clip(0.2, 0.2),
            extra=GatedTeacher(),
            aggregate=TokenMean(),
        ),
    ),
]
