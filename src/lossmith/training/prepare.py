"""A run before its first step: the recipe and its data are checked, the model is loaded, the run is opened.

`plan` needs no model, `open_run` is what `training/loop.py` works with, `work_for` is another rank's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lossmith.errors import RecipeError, quiet_traps
from lossmith.optimization import check_kahan
from lossmith.policy import Policy, check_compiler, check_model, check_quantization, load_policy
from lossmith.prompts import Prompt, PromptSet, default_prompts_path, load_prompts
from lossmith.ranks import Ranks, local_rank
from lossmith.samplers import TorchSampler
from lossmith.scorers import Scorer, check_scorer, close_scorer, load_scorer
from lossmith.scorers.scorer import bind_scorer
from lossmith.scorers.weak import refuse_weak
from lossmith.training.going_on import GoingOn, go_on, inputs_of, split_again
from lossmith.training.guards import Guards
from lossmith.training.learner import Learner
from lossmith.training.loop import Run
from lossmith.training.measured_passes import offer_passes
from lossmith.training.memory import check_memory
from lossmith.training.recipe import Recipe
from lossmith.training.run import RunFolder, check_disk, disk_needed
from lossmith.training.sharing import Elsewhere, Sampling, agree_on, check_ranks, sampler_of
from lossmith.training.teaching import check_told, shown_to_teacher, teacher_of

__all__ = ["Plan", "open_run", "plan", "policy_of", "scorer_of", "work_for"]


@dataclass(frozen=True)
class Plan:
    """A checked recipe and its data, before any model is loaded."""

    recipe: Recipe
    prompts: PromptSet
    train: PromptSet
    held_out: PromptSet
    report: str  # what the prompt file held


def plan(recipe: Recipe, held_out_ids: Sequence[str] | None = None) -> Plan:
    """Check all that can be checked before a model is loaded: loss, prompts, scorer, model folder, batch arithmetic.

    held_out_ids: of a resumed run, which keeps its held-out prompts whatever was added to the others.
    """
    recipe.policy_loss()
    if recipe.compile is True:
        check_compiler()
    if recipe.weights == "bfloat16":
        check_kahan()
    source = (
        default_prompts_path() if isinstance(recipe.prompts, str) and recipe.prompts == "default" else recipe.prompts
    )
    prompts = load_prompts(
        source,
        pass_columns=[*recipe.pass_columns, *shown_to_teacher(recipe)],
        column=recipe.prompt_column,
        split=recipe.prompt_split,
        limit=recipe.prompt_limit,
    )
    if held_out_ids is None:
        train, held_out = prompts.split(recipe.held_out, recipe.seed)
    else:
        train, held_out = split_again(prompts, held_out_ids)
    if len(held_out) < 2:
        raise RecipeError(f"held_out = {recipe.held_out} keeps one prompt, and an interval needs at least two.")
    if recipe.prompts_per_step > len(train):
        raise RecipeError(
            f"prompts_per_step = {recipe.prompts_per_step}, but only {len(train)} prompts are left for training after "
            f"{len(held_out)} are held out. Give more prompts, or lower prompts_per_step or held_out."
        )
    for scorer in (recipe.scorer, recipe.watch):
        if scorer is not None:
            check_scorer(scorer, columns=prompts.columns)
            if not recipe.accept_weak_scorer:
                refuse_weak(scorer)
    check_model(recipe.model)
    check_quantization(recipe.model, recipe.quantize)
    if recipe.teacher is not None:
        check_told(recipe, prompts)
    return Plan(recipe, prompts, train, held_out, prompts.summary())


def open_run(
    plan: Plan,
    resume: Path | None = None,
    *,
    accept_changes: bool = False,
    more_steps: bool = False,
    ranks: Ranks | None = None,
    elsewhere: Elsewhere | None = None,
) -> Run:
    """Load the model and open the run: new, or exactly where the last checkpoint of `resume` stopped.

    accept_changes: go on although what decided the run is not what it was. more_steps: the recipe has more steps than
    the run had, on purpose. elsewhere: where completions are written and scored, if not here.
    RunError: a change that is not accepted, each named.
    """
    recipe, ranks = plan.recipe, ranks or Ranks()
    check_ranks(recipe, ranks, resume is not None, elsewhere is not None)
    folder = None if resume is None else RunFolder.existing(resume)
    scorer = scorer_of(plan, recipe.scorer) if elsewhere is None else elsewhere.scorer()
    watch = None if recipe.watch is None else scorer_of(plan, recipe.watch)
    policy = policy_of(recipe, ranks)
    for one in (scorer, watch):
        bind_scorer(one, policy)
    check_disk(recipe.runs if folder is None else folder.path, disk_needed(policy, recipe, folder))
    teacher = teacher_of(recipe, policy, plan.train)
    longest = _check_lengths(policy, plan)
    now = inputs_of(recipe, plan.prompts, plan.held_out, policy)
    agree_on(ranks, recipe, now)
    with quiet_traps():  # policy_loss has refused traps, or the recipe allows them
        learner = Learner(policy, recipe.policy_loss(), recipe, len(policy.encode(longest)), ranks, teacher)
    offer_passes(learner)
    check_memory(learner.memory, learner.recompute, recipe, longest.source)
    if folder is None:
        folder, going_on = RunFolder.create(recipe, learner.loss.name, now), GoingOn()
    else:
        going_on = go_on(folder, now, recipe, accept_changes, more_steps)
        if recipe.shard and ranks.size == 1:
            going_on.notes.append("shard = true has no effect in one process, which holds all of the weights.")
    guards = Guards.of(recipe, learner.loss, policy)
    probe = min(plan.train, key=lambda p: len(policy.encode(p)))
    context = len(policy.encode(longest)) + recipe.max_tokens
    try:
        if learner.shards is not None and (recipe.checkpoint_every or recipe.checkpoint_minutes):
            learner.shards.look_for(folder.path)
        sampler = (
            sampler_of(recipe, policy, folder.path / "sampler", probe, context)
            if elsewhere is None
            else elsewhere.sampler(learner, probe, context)
        )
    except BaseException:
        folder.close()  # it is there to be resumed
        raise
    run = Run(recipe, plan.train, plan.held_out, scorer, policy, learner, folder, sampler, watch, guards, going_on)
    sampling = Sampling(recipe, sampler, scorer, ranks if elsewhere is None else Ranks(), lambda *told: run.tell(*told))
    ranks.tasks["sample"] = (
        sampling if elsewhere is None else elsewhere.sampling(sampling, plan.train, folder, going_on)
    )
    return run


def work_for(plan: Plan, ranks: Ranks, elsewhere: bool = False) -> None:
    """What another rank than the first does in a run: its share, until rank 0 has no more.

    elsewhere: completions are written and scored by processes that rank 0 asks.
    """
    recipe = plan.recipe
    check_ranks(recipe, ranks, False, elsewhere)
    scorer = None if elsewhere else scorer_of(plan, recipe.scorer)
    policy = policy_of(recipe, ranks)
    bind_scorer(scorer, policy)
    teacher = teacher_of(recipe, policy, plan.train)
    try:
        agree_on(ranks, recipe, inputs_of(recipe, plan.prompts, plan.held_out, policy))
        with quiet_traps():
            # it brings the tasks that are its own
            offer_passes(Learner(policy, recipe.policy_loss(), recipe, ranks=ranks, teacher=teacher))
        ranks.tasks["sample"] = (
            (lambda *asked: ([], {}))
            if scorer is None
            else Sampling(recipe, TorchSampler(policy, recipe.sampling), scorer, ranks)
        )
        ranks.serve()
    finally:
        close_scorer(scorer)


def scorer_of(plan: Plan, spec: Any) -> Scorer:
    """A scorer that a recipe names, as the run's prompts and settings have it."""
    return load_scorer(spec, columns=plan.train.columns, settings=plan.recipe.scorer_settings(len(plan.train)))


def policy_of(recipe: Recipe, ranks: Ranks | None = None) -> Policy:
    """The policy that a recipe names, as it is to be read; of several ranks on GPUs, on the rank's own."""
    several = ranks is not None and ranks.size > 1 and recipe.device in ("auto", "cuda") and torch.cuda.is_available()
    return load_policy(
        recipe.model,
        device=f"cuda:{local_rank()}" if several else recipe.device,
        dtype=recipe.dtype,
        special_tokens=recipe.special_tokens,
        chat_template=recipe.chat_template,
        lora=recipe.lora,
        float32_head=recipe.float32_head,
        weights=recipe.weights,
        quantize=recipe.quantize,
    )


def _check_lengths(policy: Policy, plan: Plan) -> Prompt:
    """The longest prompt. One that leaves no room for its completion is found before the first step, not in the run."""
    for prompt in (*plan.train, *plan.held_out):
        length = len(policy.encode(prompt))
        if length + plan.recipe.max_tokens > policy.context_length:
            raise RecipeError(
                f"{prompt.source}: the prompt has {length} tokens, and with max_tokens = {plan.recipe.max_tokens} "
                f"exceeds the model's context of {policy.context_length}. Shorten or drop it, or lower max_tokens."
            )
    return max((*plan.train, *plan.held_out), key=lambda prompt: len(policy.encode(prompt)))
