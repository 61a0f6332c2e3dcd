"""SkyRL's configuration -> the loss of its trainer, read in `train/config/config.py`, `utils/ppo_utils.py` and
`workers/worker.py` of 0.3.0.

Advantages come divided by the normalizer and the loss is a sum, so that a policy loss which is not proportional to
the advantage is another one there: `clip_cov` and `kl_cov` are refused.
"""

from __future__ import annotations

import math
from typing import Any

from lossmith.adapters.configurations.reading import CRITIC, Settings, Trainer, ours
from lossmith.errors import quiet_traps
from lossmith.losses import Loss, get_loss

__all__ = ["TRAINER"]

HERE = "trainer.algorithm."

DEFAULTS: dict[str, Any] = {
    "trainer.algorithm.advantage_estimator": "grpo",
    "trainer.algorithm.grpo_norm_by_std": True,
    "trainer.algorithm.gamma": 1.0,
    "trainer.algorithm.lambd": 1.0,
    "trainer.algorithm.advantage_batch_normalize": False,
    "trainer.algorithm.policy_loss_type": "regular",
    "trainer.algorithm.eps_clip_low": 0.2,
    "trainer.algorithm.eps_clip_high": 0.2,
    "trainer.algorithm.clip_ratio_c": 3.0,
    "trainer.algorithm.value_clip": 0.2,
    "trainer.algorithm.sapo.tau_pos": 1.0,
    "trainer.algorithm.sapo.tau_neg": 1.05,
    "trainer.algorithm.cispo.cispo_eps_clip_low": 0.0,
    "trainer.algorithm.cispo.cispo_eps_clip_high": 5.0,
    "trainer.algorithm.dppo.dppo_type": "binary_tv",
    "trainer.algorithm.dppo.delta_low": 0.2,
    "trainer.algorithm.dppo.delta_high": 0.2,
    "trainer.algorithm.clip_cov.clip_ratio": 0.0002,
    "trainer.algorithm.clip_cov.clip_cov_lb": 1.0,
    "trainer.algorithm.clip_cov.clip_cov_ub": 5.0,
    "trainer.algorithm.kl_cov.kl_cov_frac": 0.2,
    "trainer.algorithm.kl_cov.ppo_kl_coef": 1.0,
    "trainer.algorithm.loss_reduction": "token_mean",
    "trainer.algorithm.max_seq_len": None,
    "trainer.algorithm.use_kl_loss": True,
    "trainer.algorithm.use_kl_in_reward": False,
    "trainer.algorithm.kl_loss_coef": 0.001,
    "trainer.algorithm.kl_estimator_type": "k3",
    "trainer.algorithm.kl_ctrl.type": "fixed",
    "trainer.algorithm.kl_ctrl.kl_target": 0.1,
    "trainer.algorithm.kl_ctrl.horizon": 10000,
    "trainer.algorithm.use_entropy_loss": False,
    "trainer.algorithm.entropy_loss_coef": 0.01,
    "trainer.algorithm.zero_variance_filter": False,
    "trainer.algorithm.zero_variance_filter_tol": 1e-6,
    "trainer.algorithm.dynamic_sampling.type": None,
    "trainer.algorithm.dynamic_sampling.max_sample_batches": 30,
    "trainer.algorithm.dynamic_sampling.min_replace_ratio": 0.3,
    "trainer.algorithm.use_tis": False,
    "trainer.algorithm.tis_imp_ratio_cap": -1.0,
    "trainer.algorithm.off_policy_correction.tis_ratio_type": None,
    "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high": 2.0,
    "trainer.algorithm.off_policy_correction.sequence_tis_ratio_clip_high": 5.0,
    "trainer.algorithm.off_policy_correction.sequence_mask_metric": None,
    "trainer.algorithm.off_policy_correction.geo_mask_high": 1.01,
    "trainer.algorithm.off_policy_correction.geo_mask_low": 0.99,
    "trainer.algorithm.off_policy_correction.product_mask_high": 2.0,
    "trainer.algorithm.off_policy_correction.product_mask_low": 0.5,
    "trainer.algorithm.off_policy_correction.outlier_token_is_threshold_low": None,
    "trainer.algorithm.off_policy_correction.outlier_token_is_threshold_high": None,
    "trainer.algorithm.off_policy_correction.token_mask_is_threshold_low": None,
    "trainer.algorithm.off_policy_correction.token_mask_is_threshold_high": None,
    "generator.apply_overlong_filtering": False,
}
ELSEWHERE = ("temperature", "value_head_prefix")  # of the table that chooses the loss
REJECTIONS = [name for name in DEFAULTS if name.endswith(("_threshold_low", "_threshold_high", "mask_metric"))]

LOSSES: tuple[str, ...] = ("regular", "dual_clip", "gspo", "sapo", "cispo", "rollout_is", "dppo", "importance_sampling")
LOSSES += ("clip_cov", "kl_cov")
ESTIMATORS = ("grpo", "rloo", "reinforce++", "gae", "maxrl")


def _loss(s: Settings) -> Loss:
    kind = s.word(f"{HERE}policy_loss_type", LOSSES)
    with quiet_traps():
        start = get_loss({"cispo": "cispo@skyrl", "dppo": "dppo@skyrl"}.get(kind, "grpo@skyrl"))
    changes = _advantage(s) | _bounds(s, kind) | _aggregation(s) | _kl(s) | _entropy(s) | _filter(s) | _mismatch(s)
    changes |= ours("apply_overlong_filtering", s.flag("generator.apply_overlong_filtering"))
    return s.build(start, changes)


def _advantage(s: Settings) -> dict[str, Any]:
    if s.flag(f"{HERE}advantage_batch_normalize"):
        why = "its mean is over the padding too, which no loss here has"
        s.refuse(f"{HERE}advantage_batch_normalize", why)
    estimator = s.word(f"{HERE}advantage_estimator", ESTIMATORS)
    if estimator == "grpo":
        scale = ours("grpo_norm_by_std", s.flag(f"{HERE}grpo_norm_by_std"))
        return {"advantage": "group", "singleton": "raw", "eps": 1e-6} | scale
    if estimator == "maxrl":
        return {"advantage": "maxrl", "advantage_scale": "none", "eps": 1e-6}
    if estimator == "rloo":
        return {"advantage": "loo", "advantage_scale": "none"}
    gamma = {"gamma": s.must(f"{HERE}gamma"), "advantage_scale": "whiten"}
    if estimator == "reinforce++":
        return gamma | {"advantage": "return"}
    s.note(CRITIC)
    if s.raw(f"{HERE}loss_reduction") != "sequence_mean":
        s.note(
            "The critic's loss is a mean over completions, whatever loss_reduction says; here it is as the policy's."
        )
    critic = {"value_coef": 1.0, "value_clip": s.number(f"{HERE}value_clip")}
    return gamma | {"advantage": "gae", "lam": s.must(f"{HERE}lambd")} | critic


def _bounds(s: Settings, kind: str) -> dict[str, Any]:
    if kind in ("clip_cov", "kl_cov"):
        s.refuse(
            f"{HERE}policy_loss_type",
            f"{kind} sees advantages that are divided by the normalizer, so that its bounds and its coefficient mean "
            "something else than in the paper or here",
        )
        return {}
    if kind == "sapo":
        taus = {"tau_pos": s.must(f"{HERE}sapo.tau_pos"), "tau_neg": s.must(f"{HERE}sapo.tau_neg")}
        return {"trust": "sigmoid"} | taus
    if kind == "cispo":
        cispo = f"{HERE}cispo.cispo_eps_clip_"
        return {"clip_low": s.must(f"{cispo}low"), "cap": 1 + s.must(f"{cispo}high")}
    if kind == "importance_sampling":
        return {"trust": "none"}
    if kind == "dppo":
        trust = {"binary_tv": "tv_mask", "binary_kl": "kl_mask"}[
            s.word(f"{HERE}dppo.dppo_type", ("binary_tv", "binary_kl"))
        ]
        deltas = {"delta_low": s.must(f"{HERE}dppo.delta_low"), "delta_high": s.must(f"{HERE}dppo.delta_high")}
        return {"trust": trust, "surrogate": "ratio", "cap": None} | deltas
    bounds = {"clip_low": s.must(f"{HERE}eps_clip_low"), "clip_high": s.must(f"{HERE}eps_clip_high")}
    if kind == "rollout_is":
        return bounds | {"trust": "band", "denominator": "behavior"}
    if kind == "gspo":
        return bounds | {"ratio_level": "sequence_token"}
    return bounds | {"dual_clip": s.must(f"{HERE}clip_ratio_c") if kind == "dual_clip" else None}


def _aggregation(s: Settings) -> dict[str, Any]:
    known = ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean")
    mean = s.word(f"{HERE}loss_reduction", known)
    if mean == "prompt_mean":
        return {"aggregate": "prompt_mean"}
    changes = ours("loss_reduction", mean)
    if mean == "seq_mean_token_sum_norm":
        changes["max_length"] = s.must(f"{HERE}max_seq_len")
    if mean == "token_mean_legacy":
        s.note("token_mean_legacy: the token mean of each micro-batch by itself; the loss depends on their size.")
        changes["local_normalizer"] = True
    return changes


def _kl(s: Settings) -> dict[str, Any]:
    in_loss, in_reward = s.flag(f"{HERE}use_kl_loss"), s.flag(f"{HERE}use_kl_in_reward")
    if not in_loss and not in_reward:
        return {"beta": 0.0}
    if in_loss and in_reward:
        s.refuse(f"{HERE}use_kl_in_reward", "it excludes use_kl_loss, which is on unless it is set to false")
    kinds = ("k1", "k2", "k3", "abs")
    changes = ours("kl_estimator_type", s.word(f"{HERE}kl_estimator_type", kinds))
    changes |= {"beta": s.must(f"{HERE}kl_loss_coef")}
    if in_loss:
        mean = s.raw(f"{HERE}loss_reduction")
        s.note("The KL term is a mean over completions, whatever loss_reduction says.")
        return changes | {
            "kl_place": "loss",
            "kl_aggregate": "same" if mean == "sequence_mean" else "seq_mean_token_mean",
        }
    if s.word(f"{HERE}kl_ctrl.type", ("fixed", "adaptive")) == "adaptive":
        s.asked |= dict.fromkeys((f"{HERE}kl_ctrl.kl_target", f"{HERE}kl_ctrl.horizon"))
        why = "kl_target is of the mean token there and of a completion here, so the coefficient moves otherwise"
        s.refuse(f"{HERE}kl_ctrl.type", why)
    return changes | {"kl_place": "reward"}


def _entropy(s: Settings) -> dict[str, Any]:
    if not s.flag(f"{HERE}use_entropy_loss"):
        return {"entropy_coef": 0.0}
    s.note("The entropy is a token mean of each micro-batch by itself, whatever loss_reduction says.")
    same = s.raw(f"{HERE}loss_reduction") in ("token_mean", "token_mean_legacy")
    aggregate = "same" if same else "token_mean"
    return {"entropy_coef": s.must(f"{HERE}entropy_loss_coef"), "entropy_aggregate": aggregate}


def _filter(s: Settings) -> dict[str, Any]:
    how = s.word(f"{HERE}dynamic_sampling.type", ("filter", "replace"), none=True)
    zero = s.flag(f"{HERE}zero_variance_filter")
    if how is not None:
        s.asked |= dict.fromkeys(name for name in DEFAULTS if name.startswith(f"{HERE}dynamic_sampling."))
        s.note(f"dynamic_sampling: groups of equal rewards are left out, and others take their place ({how}).")
    return {"group_filter": "zero_variance" if zero or how else "none"}


def _mismatch(s: Settings) -> dict[str, Any]:
    where = f"{HERE}off_policy_correction."
    for name in REJECTIONS:
        if s.raw(name) not in (None, "null", "None"):
            s.refuse(name, "it takes tokens or completions out of the mask by the sampler's ratio, normalizers aside")
    if s.flag(f"{HERE}use_tis"):
        level, high = "token", s.must(f"{HERE}tis_imp_ratio_cap")
    else:
        level = s.word(f"{where}tis_ratio_type", ("token", "sequence"), none=True)
        high = s.must(f"{where}{level}_tis_ratio_clip_high") if level else math.inf
    if level is None:
        return {"mismatch": "none"}
    return {"mismatch": "tis", "mismatch_level": level, "mismatch_low": 0.0, "mismatch_high": high}


def _elsewhere(name: str) -> bool:
    if name.startswith(HERE):
        return name.removeprefix(HERE) in ELSEWHERE
    return name.partition(".")[0] in ("trainer", "generator", "data", "environment")


TRAINER = Trainer(
    name="skyrl",
    version="0.3.0",
    title="SkyRL",
    defaults=DEFAULTS,
    elsewhere=_elsewhere,
    own=lambda name: name.startswith((HERE, "generator.", "environment.")),
    programs=("skyrl",),
    loss=_loss,
)
