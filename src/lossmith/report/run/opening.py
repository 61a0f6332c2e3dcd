"""What a run says before it starts: its batch arithmetic, its loss as a formula, and how much memory it will take."""

from __future__ import annotations

from lossmith.policy import Policy
from lossmith.policy.quantized import numbers
from lossmith.report.run.prompts import who_reads
from lossmith.training import Learner, Plan, Recipe, Run

__all__ = ["about_adapter", "batch_arithmetic", "memory_estimate", "opening"]


def opening(plan: Plan, run: Run) -> str:
    """The text printed before the first step."""
    recipe = plan.recipe
    scorers = [scorer for scorer in (run.scorer, run.watch) if scorer is not None]
    read_by = who_reads(run.policy, [*plan.train, *plan.held_out], scorers)
    lines = [
        "prompts   " + "\n          ".join([*plan.report.split("\n"), *read_by]),
        f"          {len(plan.train)} to train on, {len(plan.held_out)} held out",
        "batch     " + "\n          ".join(batch_arithmetic(recipe, len(plan.train))),
        *([] if run.policy.adapter is None else ["adapter   " + about_adapter(run.policy)]),
        "memory    " + memory_estimate(run.learner),
        "figures   reward: mean score; KL: nats a completion from the untrained policy; entropy: nats a token",
        "loss      " + str(run.learner.loss).replace("\n", "\n          "),
        f"run       {run.folder.path}",
    ]
    return "\n".join(lines)


def batch_arithmetic(recipe: Recipe, train_prompts: int) -> list[str]:
    """prompts x samples = completions, updates a step, and how often the prompts are seen."""
    completions = recipe.prompts_per_step * recipe.samples_per_prompt
    updates = recipe.epochs * min(recipe.updates_per_step, recipe.prompts_per_step)
    return [
        f"{recipe.prompts_per_step} prompts x {recipe.samples_per_prompt} samples = {completions} completions of "
        f"at most {recipe.max_tokens} tokens a step",
        f"{updates} update{'s' * (updates > 1)} a step x {recipe.steps} steps = {updates * recipe.steps} updates; "
        f"the prompts are seen {recipe.steps * recipe.prompts_per_step / train_prompts:.2f} times",
    ]


def about_adapter(policy: Policy) -> str:
    """What is trained of a policy with an adapter, in a line."""
    assert policy.adapter is not None
    trained, all_of_it = (numbers(ps) for ps in (policy.parameters(), policy.model.parameters()))
    held = ", the layers' own in 4 bits (nf4)" if policy.adapter.quantized else ""
    reference = "the base model" if policy.adapter.new else "the adapter as it was given"
    return (
        f"LoRA of rank {policy.adapter.rank} on {policy.adapter.layers} layers: {trained / 1e6:.2f} million of "
        f"{all_of_it / 1e6:.1f} million weights are trained{held}; the untrained policy is {reference}"
    )


def memory_estimate(learner: Learner) -> str:
    """Weights, gradients and optimizer exactly; sampling and the activations of one micro-batch by rules of thumb."""
    memory, recompute = learner.memory, learner.recompute
    activations = memory.recomputed if recompute else memory.activations
    teacher = None if learner.teacher is None else learner.teacher.policy
    others = {"reference": learner.reference, "teacher": teacher}
    beside = [name for name, one in others.items() if one is not None and one.model is not learner.policy.model]
    held = " and ".join(["policy, gradients and AdamW", *beside])
    total = memory.total(recompute)
    text = f"about {total / 1e9:.1f} GB: {held} {memory.fixed / 1e9:.1f} GB, and then "
    text += f"sampling {memory.sampling / 1e9:.1f} GB or activations {activations / 1e9:.1f} GB"
    if memory.longest:
        text += f" (longest prompt: {memory.longest:,} tokens)"
    if recompute and memory.budget is not None:
        text += f"\n          activation checkpointing is on: {memory.budget / 1e9:.1f} GB available"
    if memory.budget is not None and total > memory.budget:
        text += "\n          this is more than there is: lower micro_batch_tokens, or take a smaller model"
    return text
