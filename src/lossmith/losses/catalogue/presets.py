"""Library presets, `name@library`: what a library's defaults are under its own name for the loss.

Versions: TRL 1.16.0, verl 0.9.1, OpenRLHF 0.11.2, SkyRL 0.3.0, AReaL 1.0.4, Liger 0.8.5, ms-swift 4.6.0,
torchtune 0.6.1, rlax 0.1.9; read in source: NeMo-RL 7ea279a, slime 624b824, prime-rl 559b447, ROLL 8eb27cc,
open-instruct e6c3044, torchforge 6e77f0b. Each line: the loss it starts from, and every value in which it differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lossmith.errors import quiet_traps
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.flat import AXES
from lossmith.losses.composition.house import House
from lossmith.losses.composition.policy_loss import PolicyLoss
from lossmith.losses.loss import Loss

__all__ = ["PRESETS", "entries"]

INF = float("inf")
GROUPED = {"advantage": "group", "advantage_scale": "group_std"}
STM, TOKEN = {"aggregate": "seq_mean_token_mean"}, {"aggregate": "token_mean"}
NO_CRITIC = {"value_coef": 0.0}
OFF = {"beta": 0.0}
PLAIN_DAPO = {"shaping": [], "group_filter": "none"}
K1_REWARD = {"kl_estimator": "k1", "kl_place": "reward"}

TRL = {
    **GROUPED,
    "masked": "keep",
    "eps": 1e-4,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "beta": 0.0,
    "kl_ratio_weight": True,
}
TRL_SOFT = {k: v for k, v in TRL.items() if not k.startswith("clip")}
VERL = {**GROUPED, "masked": "keep", "eps": 1e-6, "singleton": "raw", "beta": 0.0}
VERL_CLIP = {**VERL, "clip_low": 0.2, "clip_high": 0.2}
VERL_PPO = {"gamma": 1.0, "lam": 1.0, "advantage_scale": "whiten", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
OPENRLHF = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.01, **K1_REWARD, **TOKEN}

# name -> (base, where, what differs, a word on it)
PRESETS: dict[str, tuple[str, str, Mapping[str, Any], str]] = {
    # -- TRL
    "grpo@trl": ("grpo", "grpo_config.py", {**TRL, **TOKEN}, "its default, loss_type 'dapo'"),
    "dapo@trl": (
        "dapo",
        "grpo_trainer.py",
        {**TRL, **PLAIN_DAPO},
        "loss_type 'dapo': token mean, nothing else of DAPO",
    ),
    "bnpo@trl": (
        "bnpo",
        "grpo_trainer.py",
        TRL,
        "token mean of each micro-batch by itself: four updates in micro-batches of 4 or 16 end max|dθ| 6.9e-2 apart",
    ),
    "dr_grpo@trl": ("dr_grpo", "grpo_trainer.py", TRL, "divides by the standard deviation unless told not to"),
    "grpo_classic@trl": ("grpo", "grpo_trainer.py", {**TRL, **STM}, "loss_type 'grpo'"),
    "cispo@trl": ("cispo", "grpo_config.py", {**TRL_SOFT, "clip_low": 1.0, "cap": 0.2}, "its default cap is 0.2"),
    "sapo@trl": ("sapo", "grpo_trainer.py", TRL_SOFT, ""),
    "vespo@trl": ("vespo", "grpo_trainer.py", {**TRL_SOFT, "kl_ratio_weight": False}, ""),
    "luspo@trl": ("luspo", "grpo_trainer.py", TRL, "clip bounds of the token ratio on the completion's"),
    "gspo@trl": ("gspo", "grpo_trainer.py", TRL, "clip bounds of the token ratio on the completion's"),
    "gmpo@trl": (
        "gmpo",
        "gmpo_trainer.py",
        {**TRL_SOFT, "clip_low": 0.4, "clip_high": 0.4, "kl_ratio_weight": False},
        "no factor for vLLM either",
    ),
    "rloo@trl": ("rloo", "rloo_config.py", {"beta": 0.05}, "groups of 2 by default"),
    "online_dpo@trl": ("online_dpo", "online_dpo_trainer.py", {"beta": 0.1}, "pairs: two completions a prompt"),
    "ipo@trl": ("ipo", "dpo_trainer.py", {"per_token": True}, "loss_type 'ipo': log-ratios are means over tokens"),
    "online_ipo@trl": ("online_ipo", "online_dpo_trainer.py", {"beta": 0.1}, "loss_type 'ipo'"),
    "distillation@trl": ("reverse_kl", "distillation_config.py", {}, "its DistillationTrainer, beta = 1"),
    "gkd@trl": ("gkd", "gkd_trainer.py", {}, ""),
    "sdpo@trl": (
        "opd",
        "sdpo_trainer.py",
        {"trust": "truncate", "cap": 2.0, **STM},
        "sampled tokens; its log-ratio is of the policy now, here of the one that sampled",
    ),
    "sdft@trl": ("gkd", "sdft_config.py", {"distil_top_k": 100, "distil_tail": False, **STM}, "nothing for the rest"),
    "iw_opd@trl": ("iw_opd", "iw_opd_trainer.py", {}, ""),
    # -- verl
    "ppo@verl": ("ppo_dual_clip", "core_algos.py", {**VERL_PPO, "value_clip": 0.5}, "the dual clip is always on"),
    "grpo@verl": ("grpo", "core_algos.py", {**VERL_CLIP, "dual_clip": 3.0, **TOKEN}, "the dual clip is always on"),
    "dr_grpo@verl": (
        "dr_grpo",
        "core_algos.py",
        {**VERL_CLIP, "advantage_scale": "none", "dual_clip": 3.0},
        "the dual clip is always on",
    ),
    "gspo@verl": ("gspo_token", "core_algos.py", {**VERL_CLIP, **TOKEN}, "token mean unless set"),
    "cispo@verl": ("cispo", "core_algos.py", {**VERL, "clip_low": 0.2, "cap": 1.2}, "bounded from below, too"),
    "sapo@verl": ("sapo", "core_algos.py", {**VERL, **STM}, "this aggregation whatever the configuration says"),
    "dppo_tv@verl": ("dppo_tv", "core_algos.py", {"cap": 3.0, "singleton": "raw"}, "cap 3 in force, documented as 20"),
    "dppo_kl@verl": (
        "dppo_kl",
        "core_algos.py",
        {"delta_low": 0.2, "delta_high": 0.2, "cap": 3.0, "singleton": "raw"},
        "cap 3 in force, documented as 20",
    ),
    "gmpo@verl": (
        "gmpo",
        "core_algos.py",
        VERL_CLIP,
        "bounds 0.2 in log space; there, 4 micro-batches make the gradient 4.00 times as large",
    ),
    "reinforce@verl": ("gpg", "core_algos.py", {"singleton": "raw"}, "its loss 'gpg'"),
    "dro@verl": ("dro", "core_algos.py", {"singleton": "raw"}, "its coefficient must be given"),
    "kl_cov@verl": ("kl_cov", "core_algos.py", {**VERL, "fraction": 2e-4, "coef": 0.1}, ""),
    "clip_cov@verl": (
        "clip_cov",
        "core_algos.py",
        {**VERL_CLIP, "fraction": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
        "",
    ),
    # -- OpenRLHF
    "ppo@openrlhf": (
        "ppo",
        "train_ppo_ray.py",
        {**OPENRLHF, "gamma": 1.0, "lam": 1.0, "advantage_scale": "whiten", "value_clip": 0.5},
        "k1 taken off the reward",
    ),
    "grpo@openrlhf": ("grpo", "experience_maker.py", {**OPENRLHF, "eps": 1e-9}, "k1 taken off the reward"),
    "rloo@openrlhf": ("rloo_token", "experience_maker.py", OPENRLHF, "not whitened"),
    "reinforce@openrlhf": ("reinforce_pp", "experience_maker.py", OPENRLHF, "REINFORCE++"),
    "reinforce_baseline@openrlhf": ("reinforce_pp_baseline", "experience_maker.py", OPENRLHF, ""),
    "dr_grpo@openrlhf": (
        "grpo",
        "experience_maker.py",
        {**OPENRLHF, "advantage_scale": "none"},
        "the token mean keeps the length bias",
    ),
    "gspo@openrlhf": (
        "gspo",
        "models/loss.py",
        {**OPENRLHF, "eps": 1e-9, **STM, "kl_aggregate": "token_mean"},
        "this aggregation is forced, but not on the KL term",
    ),
    "flash_reinforce@openrlhf": (
        "reinforce",
        "experience_maker.py",
        {
            "trust": "clip",
            **OPENRLHF,
        },
        "batch mean as baseline; its gate for completions far off the sampler is off unless set",
    ),
    # -- SkyRL
    "grpo@skyrl": (
        "grpo",
        "config.py",
        {"eps": 1e-6, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.001, "kl_aggregate": "seq_mean_token_mean", **TOKEN},
        "KL in the loss by default, a mean over completions",
    ),
    "cispo@skyrl": ("cispo", "config.py", {"clip_low": 0.0, "cap": 6.0}, "raises every ratio below 1 to 1 (the wheel)"),
    "dppo@skyrl": (
        "dppo_tv",
        "ppo_utils.py",
        {**GROUPED, "surrogate": "ratio", "denominator": "behavior", "cap": None},
        "no cap",
    ),
    # -- AReaL
    "ppo@areal": (
        "ppo",
        "cli_args.py",
        {"gamma": 1.0, "lam": 1.0, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, **K1_REWARD},
        "k1 taken off the reward",
    ),
    "sapo@areal": ("sapo", "functional.py", TOKEN, ""),
    # -- NeMo-RL
    "grpo@nemo_rl": (
        "grpo",
        "grpo_math_1B.yaml",
        {"advantage": "nemo_loo", "advantage_scale": "none", "beta": 0.01, "kl_straight_through": True, **TOKEN},
        "leave-one-out, and only the losers of [1, 0, 0, 0] are scaled",
    ),
    # -- slime
    "grpo@slime": ("grpo", "arguments.py", {**OFF, "kl_estimator": "k1"}, "k1 in the loss, once its KL is switched on"),
    # -- prime-rl
    "dppo@prime_rl": ("dppo_square", "trainer.py", {}, "its default"),
    "ipo@prime_rl": ("ipo_mask", "loss.py", {}, ""),
    # -- Tinker
    "importance_sampling@tinker": ("importance_sampling", "docs", {"denominator": "behavior"}, "group centered"),
    "ppo@tinker": (
        "importance_sampling",
        "docs",
        {"trust": "clip", "clip_low": 0.2, "clip_high": 0.2, "denominator": "behavior"},
        "group centered, no critic",
    ),
    "cispo@tinker": ("cispo", "docs", {"cap": 4.0, "advantage_scale": "none", "denominator": "behavior"}, ""),
    "dro@tinker": ("dro", "docs", {"denominator": "behavior"}, ""),
    # -- ROLL
    "ppo@roll": ("ppo", "base_config.py", {"clip_low": 0.2, "clip_high": 0.2, **STM}, ""),
    "topr@roll": ("topr", "actor_pg_worker.py", {"cap": 1.0, **STM}, ""),
    "tis@roll": ("tis_pg", "actor_pg_worker.py", {"cap": 1.0, **STM}, ""),
    "kimi15@roll": ("kimi_opmd", "actor_pg_worker.py", {"tau": 0.1, **STM}, ""),
    "cispo@roll": ("cispo", "actor_pg_worker.py", {"clip_low": 0.1, "cap": 1.1, **STM}, ""),
    # -- open-instruct
    "grpo@open_instruct": (
        "grpo",
        "grpo_utils.py",
        {
            "advantage_scale": "none",
            "clip_low": 0.2,
            "clip_high": 0.272,
            "beta": 0.05,
            "mismatch": "tis",
            "mismatch_low": 0.0,
            "mismatch_high": 2.0,
            "group_filter": "zero_variance",
            **TOKEN,
        },
        "weights of sampler mismatch on by default",
    ),
    "cispo@open_instruct": ("cispo", "grpo_utils.py", {"advantage_scale": "none", "cap": 1.272}, ""),
    # -- torchforge
    "grpo@torchforge": (
        "grpo",
        "grpo_loss.py",
        {"trust": "none", "denominator": "self", "beta": 0.1},
        "old log-probabilities are not used: weight 1 at any ratio",
    ),
    # -- Liger, ms-swift, torchtune, rlax
    "grpo@liger": ("grpo", "grpo_loss.py", {**TOKEN, "beta": 0.04}, "its loss_type is 'dapo'"),
    "grpo@ms_swift": (
        "grpo",
        "args_mixin.py",
        {"eps": 1e-4, "beta": 0.04, "mask_kl": True, **TOKEN},
        "weights multiply KL",
    ),
    "gkd@ms_swift": ("gkd", "gkd_loss.py", {}, ""),
    "rlsd@ms_swift": ("rlsd", "rl_core/advantage.py", {"eps": 1e-4, "beta": 0.04, "mask_kl": True}, ""),
    "sdar@ms_swift": (
        "sdar",
        "rl_core/advantage.py",
        {"eps": 1e-4, "beta": 0.04, "mask_kl": True},
        "its coefficient must be given: 0.1 here",
    ),
    "ppo@torchtune": ("ppo", "rlhf/loss/ppo.py", {"clip": 0.1, "value_clip": 0.2, "value_coef": 0.1}, ""),
    "ppo@rlax": ("importance_sampling", "policy_gradients.py", {"trust": "clip", "advantage": "given"}, "loss alone"),
    "gae@rlax": ("a2c", "multistep.py", {"advantage": "gae"}, "plain generalized advantages"),
}


# Where vLLM samples, TRL's GRPOTrainer weights each completion by the product of its ratios learner/sampler, and drops
# it beyond 3. With use_vllm=False, its default, there is no such factor; in VESPO it is a part of W, and its default
# mode is refused; GMPO's trainer has none.
VLLM = {"mismatch": "icepop", "mismatch_level": "sequence", "mismatch_low": 0.0, "mismatch_high": 3.0}
WITH_VLLM = ("grpo", "dapo", "bnpo", "dr_grpo", "grpo_classic", "cispo", "sapo", "luspo", "gspo")


def _with_vllm(name: str) -> tuple[str, str, Mapping[str, Any], str]:
    base, where, changes, _ = PRESETS[name]
    return base, where, {**changes, **VLLM}, f"{name} with use_vllm=True"


PRESETS |= {f"{name}@trl_vllm": _with_vllm(f"{name}@trl") for name in WITH_VLLM}


def entries(catalogue: Mapping[str, Entry]) -> Iterator[Entry]:
    """The presets as entries, on top of the named losses."""
    for name, (base, where, changes, note) in PRESETS.items():
        library = _library(name)
        of = catalogue[base]
        yield Entry(
            name=name,
            year=of.year,
            paper=f"{library}, {where}",
            summary=f"{base} with {library}'s defaults" + (f": {note}." if note else "."),
            build=_build(of, changes, library, catalogue),
            fixed=of.fixed,
            demonstration=of.demonstration,
            example=of.example,
            preset_of=base,
        )


def _library(name: str) -> str:
    return name.partition("@")[2].removesuffix("_vllm")


def _build(of: Entry, changes: Mapping[str, Any], library: str, catalogue: Mapping[str, Entry]) -> Callable[[], Loss]:
    def build() -> Loss:
        made = of.build().replace(**changes)
        return dataclasses.replace(made, house=_house(library, catalogue)) if isinstance(made, PolicyLoss) else made

    return build


_HOUSES: dict[str, House] = {}


def _house(library: str, catalogue: Mapping[str, Entry]) -> House:
    """The pieces of all presets of a library, in the order of the table."""
    if library not in _HOUSES:
        with quiet_traps():
            losses = [
                catalogue[base].build().replace(**x)
                for name, (base, _, x, _) in PRESETS.items()
                if _library(name) == library
            ]
        composed = [loss for loss in losses if isinstance(loss, PolicyLoss)]
        _HOUSES[library] = House(tuple((axis, getattr(x, axis)) for x in composed for axis in AXES))
    return _HOUSES[library]
