"""The teacher of a run: checked before a model is loaded, loaded, and checked against the policy."""

from __future__ import annotations

from lossmith.errors import RecipeError, nearest
from lossmith.policy import Policy, Teacher, check_quantization, check_teacher, load_policy
from lossmith.prompts import PromptSet, is_target
from lossmith.training.recipe import Recipe

__all__ = ["check_told", "shown_to_teacher", "teacher_of"]


def shown_to_teacher(recipe: Recipe) -> list[str]:
    """Columns of answers that the recipe names for the teacher, which a set of prompts may then hold."""
    column = recipe.teacher_column
    return [column] if column is not None and is_target(column) else []


def check_told(recipe: Recipe, prompts: PromptSet) -> None:
    """RecipeError: the teacher is no model, or of other tokens than the policy; a prompt has nothing to tell it."""
    assert recipe.teacher is not None
    if recipe.teacher != "self":
        whole = recipe.policy_loss().divergence is not None
        check_teacher(recipe.model, recipe.teacher, whole, RecipeError)
        check_quantization(recipe.teacher, None)
    column = recipe.teacher_column
    if column is None:
        return
    if column not in prompts.columns:
        known = nearest(column, prompts.columns) if prompts.columns else " There are no columns beside the prompt."
        raise RecipeError(f"teacher_column = {column!r}: {prompts.name} has no such column.{known}")
    for prompt in prompts:
        text = prompt.columns.get(column)
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(
                f"{prompt.source}: the column {column!r} (teacher_column) must hold the text that the teacher is told, "
                f"not {'nothing' if text is None else repr(text)[:60]}. Fill it in, or leave the row out."
            )


def teacher_of(recipe: Recipe, policy: Policy, prompts: PromptSet) -> Teacher | None:
    """The teacher that a recipe names, for these prompts; None where it names none.

    PolicyError: it cannot be loaded, or its tokens are others. RecipeError: a prompt is too long for it.
    """
    if recipe.teacher is None:
        return None
    mine = recipe.teacher == "self"
    place = str(policy.device)  # of several ranks on GPUs, the rank's own
    model = policy if mine else load_policy(recipe.teacher, device=place, dtype=recipe.dtype, trainable=False)
    teacher = Teacher(model, recipe.teacher_column)
    teacher.check(policy, whole_vocabulary=recipe.policy_loss().divergence is not None)
    for prompt in prompts:
        length = len(teacher.encode(prompt))
        if length + recipe.max_tokens > model.context_length:
            raise RecipeError(
                f"{prompt.source}: what the teacher is given has {length} tokens, and with max_tokens = "
                f"{recipe.max_tokens} exceeds its context of {model.context_length}. Shorten the prompt or its column "
                f"{recipe.teacher_column!r}, or lower max_tokens."
            )
    return teacher
