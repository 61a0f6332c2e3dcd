"""What cannot work is refused before it starts: settings with which a run would do nothing, or nothing but harm."""

from __future__ import annotations

from lossmith.errors import RecipeError
from lossmith.losses import Loss, PolicyLoss
from lossmith.policy import SamplingSettings

__all__ = ["TAUGHT", "check_loss", "check_sampling", "check_taught"]

TAUGHT = frozenset({"teacher_logp", "vocab_logp", "teacher_vocab_logp"})  # what a teacher is there for


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
            "gives it one: its rewards teach nothing. Give 2 or more (4 to 16 are usual), or choose a loss that needs "
            "one only, such as reinforce."
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


def check_taught(loss: Loss, teacher: str | None, settings: SamplingSettings) -> None:
    """RecipeError: a teacher without a loss that learns from it, or the reverse; or divergences that are infinite."""
    reads = loss.needs & TAUGHT
    if reads and teacher is None:
        raise RecipeError(
            f"The loss {loss.name!r} learns from a teacher, and there is none: give teacher, the folder of a model "
            "with the same tokens, or 'self' with a teacher_column of feedback."
        )
    if teacher is not None and not reads:
        raise RecipeError(
            f"teacher = {teacher!r} teaches nothing: the loss {loss.name!r} does not read it. Choose a loss of "
            "distillation (reverse_kl, gkd, opd, sdpo, ...: `lossmith losses list`), or leave the teacher out."
        )
    if "vocab_logp" in reads and loss.divergence is None:
        raise RecipeError(
            f"The loss {loss.name!r} reads Batch.vocab_logp itself, and training holds no log-probabilities of the "
            "whole vocabulary: it computes divergences in chunks. Write it as an extra term "
            "(lossmith.losses.Divergence), or train with it in a loop of your own."
        )
    if "vocab_logp" in reads and settings.filtered:
        raise RecipeError(
            f"The loss {loss.name!r} compares policy and teacher at every token, and top_p or top_k leaves tokens "
            "without probability: the divergence would be infinite. Leave them at top_p = 1 and top_k = 0."
        )
