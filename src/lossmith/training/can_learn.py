"""What cannot work is refused before it starts: settings with which a run would do nothing, or nothing but harm."""

from __future__ import annotations

from lossmith.errors import RecipeError
from lossmith.losses import Loss, PolicyLoss
from lossmith.policy import SamplingSettings

__all__ = ["check_loss", "check_sampling"]


def check_sampling(source: str, settings: SamplingSettings, samples: int) -> None:
    """RecipeError: every completion of a prompt would be the same, or noise."""
    if settings.greedy:
        cure = "Raise the temperature" if "temperature" in settings.greedy else "Raise it"
        raise RecipeError(
            f"{source}: {settings.greedy} with samples_per_prompt = {samples} is greedy: every sample of a prompt is "
            f"the same completion, and there is nothing to learn from. {cure}."
        )
    if settings.noise:
        raise RecipeError(
            f"{source}: {settings.noise} makes every token about as likely as any other: completions are noise, and "
            "so are their scores. Lower it; usual is 0.7 to 1."
        )


def check_loss(loss: Loss, samples: int, prompts: int) -> None:
    """RecipeError: the loss compares completions, and there is one only; or its KL term leaves nothing of the rest."""
    if samples == 1 and loss.compares == "group":
        raise RecipeError(
            f"The loss {loss.name!r} compares the completions of a prompt with one another, and samples_per_prompt = 1 "
            "gives it one: there is nothing to learn from. Give 2 or more (4 to 16 are usual), or choose a loss that "
            "needs one only, such as reinforce."
        )
    if samples * prompts == 1 and loss.compares == "batch":
        raise RecipeError(
            f"The loss {loss.name!r} compares the completions of a step with one another, and one prompt with one "
            "sample is one: there is nothing to learn from. Raise prompts_per_step or samples_per_prompt."
        )
    if isinstance(loss, PolicyLoss) and loss.kl.in_loss and loss.advantage_scale.scale_invariant and loss.kl.beta > 100:
        raise RecipeError(
            f"The loss {loss.name!r} has beta = {loss.kl.beta:g}: its advantages have a size of about 1, so that the "
            "KL term alone decides, and the policy stays at the reference. Usual is 0.001 to 0.1."
        )
