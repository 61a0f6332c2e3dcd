"""Going on with a run that stopped: from which state, with which inputs, and what of it has to be said."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lossmith.durable.checkpoint import Checkpoint, newest, remove
from lossmith.durable.inputs import Inputs, circumstances, digest, of_code, of_model, of_prompts
from lossmith.errors import FinishedError, RecipeError, RunError
from lossmith.policy import Policy
from lossmith.prompts import PromptSet
from lossmith.settings.base import is_live
from lossmith.training.recipe import Recipe, RunSettings
from lossmith.training.run import RunFolder

__all__ = ["GoingOn", "command_of", "go_on", "inputs_of", "is_finished", "recipe_of", "split_again"]

S = TypeVar("S", bound=RunSettings)
# by a setting that only such a run has
_RESUMED_BY = {"preferences": "lossmith prefer --resume", "prompts": "lossmith train --resume"}
_FOUND = {"scorer": "module:function, or a file", "watch": "module:function, or a file"}


@dataclass
class GoingOn:
    """From where a run goes on. changed: settings and other inputs that were accepted as they are now."""

    checkpoint: Checkpoint | None = None
    changed: frozenset[str] = frozenset()
    accepted: list[str] = field(default_factory=list)  # all changes ever, in words
    notes: list[str] = field(default_factory=list)  # to be said before the first step
    resumed: bool = False

    def set_right(self, folder: RunFolder, metrics: str) -> None:
        """Once the state is loaded: metrics.jsonl as it was then, and away with what a kill left behind."""
        if self.resumed:
            folder.clean()
        if not folder.restore_metrics(metrics):
            self.notes.append("metrics.jsonl was damaged; its lines are written again from the checkpoint.")
        damaged = folder.damaged_rollouts()
        if damaged:
            shown = ", ".join(damaged[:3]) + (", ..." if len(damaged) > 3 else "")
            self.notes.append(f"missing or damaged in rollouts/ ({shown}); the run does not need them, and goes on.")


def command_of(recipe: RunSettings | type[RunSettings], folder: RunFolder) -> str:
    """What goes on with the run."""
    return f"{recipe.resumed_by} {shlex.quote(str(folder.path))}"


def recipe_of(folder: RunFolder, kind: type[S], objects: Mapping[str, Any], more: Mapping[str, Any]) -> S:
    """The recipe of a run that stopped, `more` winning over it. RunError: it is a run of another command.

    objects: what were Python objects, which a file cannot hold. RecipeError: one of them is missing, or not asked for.
    """
    path, given = folder.path / "recipe.toml", dict(objects)
    fields = kind.read(path)
    for field_, command in _RESUMED_BY.items():
        if field_ in fields and field_ not in kind.model_fields:
            raise RunError(
                f"{str(folder.path)!r} is a run of `{command.removesuffix(' --resume')}`. Go on with it: "
                f"{command} {shlex.quote(str(folder.path))}"
            )
    for key, value in fields.items():
        if not is_live(value):
            continue
        if key not in given:
            raise RecipeError(
                f"{path}: the run's {key} was a Python object ({value}), which a file cannot hold. Go on from Python, "
                f"with {kind.resumed_in_python}({str(folder.path)!r}, {key}=...), or write there where it is to be "
                f"found ({_FOUND.get(key, 'a file')}) and go on with --accept-changes."
            )
        fields[key] = given.pop(key)
    if given:
        raise RecipeError(f"{path} holds the run's {', '.join(given)}: {kind.resumed_in_python}() takes no other.")
    return kind.make(str(path), **fields | dict(more))


def is_finished(folder: RunFolder, steps: int | None, more: str = "") -> None:
    """FinishedError: the run has come to its end, of so many steps; `more` says how it gets more."""
    summary = folder.finished(steps)
    if summary is not None:
        early = f"; it stopped early: {summary['stopped']}" if "stopped" in summary else ""
        raise FinishedError(
            f"The run {str(folder.path)!r} is finished ({summary['steps']} steps{early}). Its policy is in "
            f"{folder.path / 'policy'}.{more}",
            summary,
        )


def inputs_of(recipe: Recipe, prompts: PromptSet, held_out: PromptSet, policy: Policy) -> Inputs:
    """Everything that decides what this run learns. Before the policy has learned anything."""
    settings = recipe.written()
    code = of_code("loss", settings["loss"])
    for role, spec, path in (
        ("scorer", recipe.scorer, settings["scorer"]),
        ("watching scorer", recipe.watch, settings.get("watch")),
        ("teacher", recipe.teacher, settings.get("teacher")),
    ):
        code |= {} if spec is None else of_code(role, spec if callable(spec) else path)
    decisive = {
        "the prompts": of_prompts(prompts.prompts),
        **code,
        **of_model(policy),
        "the prompts' tokens": digest([policy.encode(p) for p in prompts]),
    }
    return Inputs(settings, decisive, circumstances(policy.device), _known(held_out, policy))


def _known(held_out: PromptSet, policy: Policy) -> dict[str, Any]:
    """What is kept for later, and decides nothing by itself."""
    return {
        "held_out": [p.id for p in held_out],
        "dtype": str(policy.compute_dtype).removeprefix("torch."),
        "vocabulary": policy.model.config.get_text_config().vocab_size,
    }


def split_again(prompts: PromptSet, held_out_ids: Sequence[str]) -> tuple[PromptSet, PromptSet]:
    """(train, held out) with the held-out prompts that a run had. RunError: some of them are there no more."""
    known = {p.id: p for p in prompts}
    gone = [i for i in held_out_ids if i not in known]
    if gone:
        raise RunError(
            f"{prompts.name} has changed: {len(gone)} of the run's {len(held_out_ids)} held-out prompts are there no "
            "more, and before and after could not be compared. Put them back, or start a new run."
        )
    away = {known[i].content_id for i in held_out_ids}  # a new row of a held-out text is not trained on either
    train = tuple(p for p in prompts if p.content_id not in away)
    return PromptSet(train, prompts.name), PromptSet(tuple(known[i] for i in held_out_ids), prompts.name)


def go_on(
    folder: RunFolder, now: Inputs, recipe: RunSettings, accept_changes: bool, more_steps: bool = False
) -> GoingOn:
    """Where to go on from. RunError: inputs that changed, each named; no checkpoint that is whole."""
    state = GoingOn(resumed=True)
    _compare(state, folder, now, recipe, accept_changes, more_steps)
    state.checkpoint, damaged = newest(folder.path)
    wrong = "; ".join(f"{c.path.name}: {why}" for c, why in damaged)
    if damaged and state.checkpoint is None:
        raise RunError(
            f"every checkpoint of {str(folder.path)!r} is damaged ({wrong}). To begin again from step 0, delete its "
            "folder checkpoints/ and resume."
        )
    if damaged and state.checkpoint is not None:
        state.notes.append(f"damaged checkpoint ({wrong}): going on from the one before, {state.checkpoint.path.name}.")
        for one, _ in damaged:
            remove(one.path)
    if state.checkpoint is not None and "rollouts" not in state.checkpoint.state():
        raise RunError(f"{state.checkpoint.path} was written by another version of Lossmith. Start a new run.")
    if more_steps and isinstance(recipe, Recipe):
        folder.write_recipe(recipe)
    now.accepted = state.accepted
    now.write(folder.path)
    return state


def _compare(
    state: GoingOn, folder: RunFolder, now: Inputs, recipe: RunSettings, accept_changes: bool, more_steps: bool
) -> None:
    """What is not as it was at the start of the run."""
    then = Inputs.read(folder.path)
    if then is None:
        state.notes.append("inputs.json is missing or damaged: nobody can tell whether the run's inputs have changed.")
        return
    state.accepted = then.accepted
    now.known = then.known | now.known  # what was measured at the start stays
    settings = then.changed_settings(now.settings, recipe.defaults())
    free = {key: settings.pop(key) for key in recipe.free if key in settings}
    for key in free.keys() - {"runs", "name"}:
        state.notes.append(f"recipe.toml: {key}: {free[key]}.")
    if "held_out" in settings:
        raise RunError(
            f"held_out: {settings['held_out']}, but which prompts are held out was decided at the start of the run. "
            "Put it back in recipe.toml, or start a new run."
        )
    command = command_of(recipe, folder)
    if isinstance(recipe, Recipe):
        _say_of_steps(settings, recipe, more_steps)
        command += f" --steps {recipe.steps}" * more_steps
    found = [f"{key}: {change}" for key, change in settings.items()] + then.changed(now)
    if found and not accept_changes:
        raise RunError(
            f"what decides the run {str(folder.path)!r} has changed since it began: {'; '.join(found)}. Put it back, "
            f"or go on with it as it is now: {command} --accept-changes"
        )
    if found:
        state.notes.append(f"accepted: {'; '.join(found)}.")
        state.changed = frozenset(settings) | ({"inputs"} if then.changed(now) else frozenset())
        state.accepted = [*then.accepted, *found]
    moved = then.moved(now)
    if moved:
        state.notes.append(f"not where the run began ({'; '.join(moved)}): its last bits may differ.")


def _say_of_steps(settings: dict[str, str], recipe: Recipe, more_steps: bool) -> None:
    """What another number of steps means, where it is among the settings that changed."""
    if more_steps and recipe.schedule == "constant":
        settings.pop("steps", None)
    elif more_steps and "steps" in settings:
        settings["steps"] += f" (schedule = {recipe.schedule!r} falls over them, and was on its way to the former)"
    elif "steps" in settings:
        settings["steps"] += f" (more steps, and nothing else, are had with --resume ... --steps {recipe.steps})"
