"""`lossmith export verl RECIPE -o FOLDER`: a recipe as a folder that verl trains from, on Ray and its engines.

Lossmith says the loss and the scores, verl does the rest. What verl has no setting for is refused by name, and a KL or
entropy term of the loss becomes verl's own, which is the same term.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tomli_w

from lossmith.adapters.hooks import HOOKS
from lossmith.errors import RecipeError, quiet_traps
from lossmith.losses import KL, Loss, PolicyLoss
from lossmith.policy import ALL_LINEAR, adapter_base
from lossmith.prompts import Prompt, default_prompts_path, load_prompts
from lossmith.prompts.prompt import prompt_content
from lossmith.scorers import check_scorer
from lossmith.training import Recipe

__all__ = ["export", "loss_inside"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_KL = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "abs": "abs"}
_AGGREGATES = {"token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum"}
# What verl has nothing for, or has in its own way, and why; refused where it is not at its default.
_NOT_CARRIED = {
    "top_p": "verl's log-probabilities are of the whole distribution, and not of what was sampled from",
    "top_k": "verl's log-probabilities are of the whole distribution, and not of what was sampled from",
    "stop": "its completions end at end tokens and max_tokens alone",
    "special_tokens": "it shows scorers the text without special tokens",
    "scorer_errors": "every completion has a reward there",
    "watch": "it scores once",
    "watch_window": "it scores once",
    "kl_budget": "it does not stop by KL",
    "chat_template": "it takes the template of the tokenizer",
    "memory_gb": "its memory is set by its own settings",
    "device": "it runs on the GPUs that Ray gives it",
    "dtype": "its types are set by its own settings (actor.fsdp_config, rollout.dtype)",
    "float32_head": "its types are set by its own settings (actor.fsdp_config, rollout.dtype)",
    "compile": "actor.use_torch_compile is its own",
    "quantize": "beside an adapter it holds the base model's weights as they are",
    "value_learning_rate": "its critic is set by its own settings",
    "engine": "the folder is for verl",
    "engine_options": "they are TRL's; verl's settings follow ./launch.sh",
    "checkpoint_minutes": "it saves by steps: set checkpoint_every",
    "runs": "it writes beside the folder",
}

_REWARD = '''"""What verl calls for each completion: the scorer of recipe.toml, in this folder."""

from pathlib import Path

from lossmith.adapters.verl_reward import scorer_of

compute_score = scorer_of(Path(__file__).with_name("recipe.toml"))
'''
_LOSS = '''"""Loaded by verl in every process (VERL_USE_EXTERNAL_MODULES): recipe.toml's loss, as lossmith/recipe."""

from pathlib import Path

from lossmith.adapters.verl import register_loss
from lossmith.adapters.verl_export import loss_inside
from lossmith.training import Recipe

register_loss("recipe", loss_inside(Recipe.make("recipe.toml", **Recipe.read(Path(__file__).with_name("recipe.toml")))))
'''
_LAUNCH = """#!/usr/bin/env bash
# Trains with verl. More settings of verl may follow: ./launch.sh trainer.n_gpus_per_node=8
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VERL_USE_EXTERNAL_MODULES=lossmith_recipe
exec python -m verl.trainer.main_ppo --config-path "$PWD" --config-name verl \\
    data.train_files="$PWD/train.parquet" data.val_files="$PWD/held-out.parquet" \\
    reward.custom_reward_function.path="$PWD/reward.py" "$@"
"""


def export(recipe: Recipe, folder: str | Path, *, gpus: int = 1, max_prompt_tokens: int = 1024) -> Path:
    """Write what verl's trainer needs to run the recipe: verl.yaml, prompts as parquet, reward.py, lossmith_recipe.py,
    recipe.toml and launch.sh.

    folder: a new one, or an empty one. gpus: of one node. RecipeError: a setting that does not carry over, which, and
    why; LossError: the loss does not come through verl's hook.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty: give a new folder.")
    _check(recipe)
    loss = recipe.policy_loss()
    HOOKS["verl"].check(loss_inside(recipe), at_once=True)
    prompts = load_prompts(
        default_prompts_path() if isinstance(recipe.prompts, str) and recipe.prompts == "default" else recipe.prompts,
        pass_columns=recipe.pass_columns,
        column=recipe.prompt_column,
        split=recipe.prompt_split,
        limit=recipe.prompt_limit,
    )
    check_scorer(recipe.scorer, columns=prompts.columns)
    train, held_out = prompts.split(recipe.held_out, recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_prompts(folder / "train.parquet", train)
    _write_prompts(folder / "held-out.parquet", held_out)
    settings = _settings(recipe, loss, folder.resolve(), gpus, max_prompt_tokens)
    files = {
        "verl.yaml": _yaml(settings),
        "reward.py": _REWARD,
        "lossmith_recipe.py": _LOSS,
        "recipe.toml": tomli_w.dumps(recipe.written()),
        "launch.sh": _LAUNCH,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "launch.sh").chmod(0o755)
    return folder


def loss_inside(recipe: Recipe) -> Loss:
    """The loss of the recipe without the terms that verl adds itself."""
    loss = recipe.policy_loss()
    if not isinstance(loss, PolicyLoss):
        return loss
    with quiet_traps():
        return loss.replace(kl=KL(), entropy_coef=0.0, kl_aggregate="same", entropy_aggregate="same")


def _check(recipe: Recipe) -> None:
    """RecipeError: every setting that does not carry over, with the reason."""
    fields = type(recipe).model_fields
    wrong = {name: why for name, why in _NOT_CARRIED.items() if getattr(recipe, name) != fields[name].get_default()}
    if recipe.device == "cuda":
        wrong.pop("device", None)
    if recipe.schedule == "linear":
        wrong["schedule"] = "it has constant and cosine"
    if recipe.prompts_per_step % recipe.updates_per_step:
        wrong["updates_per_step"] = f"it cuts the {recipe.prompts_per_step} prompts of a step into equal parts"
    for name in ("scorer", "prompts"):
        if callable(getattr(recipe, name)):
            wrong[name] = "its workers are other processes: name a function by its file, 'file.py:function'"
    if isinstance(recipe.scorer, dict) and recipe.scorer.get("standardize"):
        wrong["scorer"] = "it asks for one completion at a time, and standardize compares those of a batch"
    if adapter_base(recipe.model) is not None:
        wrong["model"] = "it is a LoRA adapter: merge it first (lossmith merge)"
    wrong |= _terms(recipe.policy_loss())
    if wrong:
        said = "; ".join(f"{name} = {getattr(recipe, name)!r}: {why}" for name, why in wrong.items())
        raise RecipeError(f"verl cannot be told this. {said}. Change it, or train with `lossmith train`.")


def _terms(loss: Loss) -> dict[str, str]:
    """{"loss": why} where a KL or entropy term of the loss is not one that verl has."""
    if not isinstance(loss, PolicyLoss):
        return {}
    kl, why = loss.kl, []
    if kl.active and kl.estimator not in _KL:
        why.append(f"it has no kl_estimator={kl.estimator!r}")
    if kl.active and (kl.ratio_weight or kl.straight_through or kl.masked or kl.against != "ref"):
        why.append("its KL term has no ratio weight, no other gradient, no mask and no other target")
    if kl.active and kl.control != "fixed":
        why.append("its kl_control moves by its own rule")
    others = ((kl.in_loss, loss.kl_aggregate), (loss.entropy_coef > 0, loss.entropy_aggregate))
    for _there, how in (pair for pair in others if pair[0]):
        if (loss.aggregate.option if how == "same" else how) not in _AGGREGATES or how != "same":
            why.append("its KL and entropy terms are aggregated by loss_agg_mode, which has no such mean")
    return {"loss": "; ".join(dict.fromkeys(why))} if why else {}


def _actor(recipe: Recipe, loss: Loss, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """verl's sections actor and algorithm."""
    actor: dict[str, Any] = {
        "ppo_mini_batch_size": recipe.prompts_per_step // recipe.updates_per_step,
        "ppo_epochs": recipe.epochs,
        "use_dynamic_bsz": loss.separable,
        "ppo_max_token_len_per_gpu": tokens,
        "ppo_micro_batch_size_per_gpu": recipe.prompts_per_step // recipe.updates_per_step * recipe.samples_per_prompt,
        "grad_clip": recipe.max_grad_norm,
        "loss_scale_factor": recipe.max_tokens,
        "policy_loss": {"loss_mode": "lossmith/recipe"},
        "data_loader_seed": recipe.seed,
        "optim": {
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "lr_scheduler_type": recipe.schedule,
            "lr_warmup_steps": recipe.warmup_steps,
            "clip_grad": recipe.max_grad_norm,
        },
    }
    algorithm: dict[str, Any] = {"adv_estimator": "lossmith/recipe"}
    if isinstance(loss, PolicyLoss):
        if loss.aggregate.option in _AGGREGATES:
            actor["loss_agg_mode"] = loss.aggregate.option.replace("_", "-")
        actor["entropy_coeff"] = loss.entropy_coef
        if loss.kl.in_loss:
            actor |= {"use_kl_loss": True, "kl_loss_coef": loss.kl.beta, "kl_loss_type": _KL[loss.kl.estimator]}
        if loss.kl.in_reward:
            control = {"type": "fixed", "kl_coef": loss.kl.beta}
            algorithm |= {"use_kl_in_reward": True, "kl_penalty": _KL[loss.kl.estimator], "kl_ctrl": control}
    return actor, algorithm


def _lora(recipe: Recipe) -> dict[str, Any]:
    """verl's settings of an adapter; its reference is then the base model, too."""
    if recipe.lora is None:
        return {}
    targets = ALL_LINEAR if recipe.lora_targets == [ALL_LINEAR] else list(recipe.lora_targets)
    return {"lora_rank": recipe.lora_rank, "lora_alpha": int(recipe.lora_alpha), "target_modules": targets}


def _settings(recipe: Recipe, loss: Loss, folder: Path, gpus: int, prompt_tokens: int) -> dict[str, Any]:
    """verl's configuration, over its own defaults."""
    tokens = max(recipe.pass_tokens, prompt_tokens + recipe.max_tokens)
    actor, algorithm = _actor(recipe, loss, tokens)
    rollout = {
        "name": "vllm",
        "n": recipe.samples_per_prompt,
        "temperature": recipe.temperature,
        "log_prob_use_dynamic_bsz": True,
        "log_prob_max_token_len_per_gpu": tokens,
        "log_prob_micro_batch_size_per_gpu": 1,
        "seed": recipe.seed,
        "val_kwargs": {"do_sample": True, "temperature": recipe.temperature, "n": 1},
        **(
            {"load_format": "safetensors"} if recipe.lora_rank else {}
        ),  # verl's vLLM takes an adapter over real weights
    }
    ref = {"log_prob_use_dynamic_bsz": True, "log_prob_max_token_len_per_gpu": tokens}
    return {
        "data": {
            "train_files": str(folder / "train.parquet"),
            "val_files": str(folder / "held-out.parquet"),
            "train_batch_size": recipe.prompts_per_step,
            "max_prompt_length": prompt_tokens,
            "max_response_length": recipe.max_tokens,
            "seed": recipe.seed,
        },
        "actor_rollout_ref": {
            "model": {
                "path": DEFAULT_MODEL if recipe.model == "default" else recipe.written()["model"],
                **_lora(recipe),
            },
            "actor": actor,
            "rollout": rollout,
            "ref": {**ref, "log_prob_micro_batch_size_per_gpu": 1},
        },
        "algorithm": algorithm,
        "critic": {"enable": False},
        "reward": {"custom_reward_function": {"path": str(folder / "reward.py"), "name": "compute_score"}},
        "trainer": {
            "total_training_steps": recipe.steps,
            "total_epochs": recipe.steps,  # an epoch has one step at least
            "n_gpus_per_node": gpus,
            "nnodes": 1,
            "logger": ["console", *([recipe.track] if recipe.track else [])],
            "project_name": "lossmith",
            "experiment_name": recipe.name or "recipe",
            "save_freq": recipe.checkpoint_every or -1,
            "test_freq": recipe.steps,
            "val_before_train": True,
            "default_local_dir": str(folder / "checkpoints"),
            "rollout_data_dir": str(folder / "rollouts") if recipe.save_rollouts else None,
        },
    }


def _write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Prompts as verl's data set reads them; the scorer gets its columns from extra_info."""
    rows = [
        {
            "data_source": "lossmith",
            "prompt": [{"role": m["role"], "content": str(m.get("content") or "")} for m in prompt.messages],
            "ability": "",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i, "prompt": json.dumps([prompt_content(prompt), dict(prompt.columns)])},
        }
        for i, prompt in enumerate(prompts)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _yaml(settings: dict[str, Any]) -> str:
    """The configuration as YAML that needs no writer: JSON is YAML, and Hydra's own lines stand above it."""
    head = (
        "# Written by `lossmith export verl`. What is not here is verl's default.\n"
        "defaults:\n  - ppo_trainer\n  - _self_\n\n"
        "hydra:\n  searchpath:\n    - pkg://verl.trainer.config\n\n"
    )
    lines = []
    for name, table in settings.items():
        lines.append(f"{name}: {json.dumps(table, indent=2, ensure_ascii=False)}")
    return head + "\n\n".join(lines) + "\n"
