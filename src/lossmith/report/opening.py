"""What a run says before it starts: its batch arithmetic, its loss as a formula, and how much memory it will take."""

from __future__ import annotations

from lossmith.policy import Policy
from lossmith.training import Plan, Recipe, Run

__all__ = ["batch_arithmetic", "memory_estimate", "opening"]


def opening(plan: Plan, run: Run) -> str:
    """The text printed before the first step."""
    recipe = plan.recipe
    lines = [
        "prompts   " + plan.report.replace("\n", "\n          "),
        f"          {len(plan.train)} to train on, {len(plan.held_out)} held out",
        "batch     " + "\n          ".join(batch_arithmetic(recipe, len(plan.train))),
        "memory    " + memory_estimate(run.policy, recipe, run.learner.reference is not None),
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


def memory_estimate(policy: Policy, recipe: Recipe, reference: bool) -> str:
    """Weights, gradients and optimiser exactly; activations of one micro-batch by a measured rule of thumb."""
    weights = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.parameters())
    config = policy.model.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    fixed = 4 * (weights * (2 if reference else 1) + 3 * trained)
    # Measured on the default model: a layer keeps about 52 hidden-size numbers a token for its backward pass, in the
    # compute type; the libraries themselves take 0.6 GB.
    per_number = 2 if str(policy.compute_dtype).endswith("bfloat16") else 4
    round_tokens = recipe.prompts_per_step * recipe.samples_per_prompt * recipe.max_tokens
    activations = min(recipe.micro_batch_tokens, round_tokens) * layers * hidden * 52 * per_number
    parts = f"policy, gradients and AdamW{' and reference' if reference else ''} {fixed / 1e9:.1f} GB"
    return f"about {(fixed + activations + 6e8) / 1e9:.1f} GB: {parts}, activations {activations / 1e9:.1f} GB"
