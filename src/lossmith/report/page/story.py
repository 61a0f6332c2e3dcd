"""What happened, in plain sentences made from the numbers; none says more than its sample bears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lossmith.intervals import in_words
from lossmith.report.page.family import Family, differences
from lossmith.report.page.folder import Change, RunSeen, number, short

__all__ = ["about_all", "about_run", "figure", "spread"]


def figure(x: Any, sign: str = "") -> str:
    """0.123, or ? where there is none."""
    value = number(x)
    return "?" if value is None else f"{value:{sign}.3f}".replace("-", "−")


def spread(row: Mapping[str, Any], sign: str = "") -> str:
    """`0.48 to 0.60`, the 95% interval, or ? where there is none."""
    return in_words(row, f"{sign}.3f").replace("-", "−")


def about_all(runs: Sequence[RunSeen], groups: Sequence[Family]) -> list[str]:
    """Of several runs together."""
    if len(runs) == 1:
        return []
    done = sum(run.finished for run in runs)
    changed = [key for key, _ in differences(runs)]
    told = [
        f"{len(runs)} runs of {len(groups)} recipe{'s' * (len(groups) > 1)}, {done} of them finished. "
        + (f"They differ in {_list(changed[:6])}." if changed else "Their recipes are the same.")
    ]
    for group in groups:
        for what, seeds, mean, low, high, n in group.changes():
            told.append(
                f"{group.label}: the {what} changed by {figure(mean, '+')} on average over {seeds} seeds "
                f"(the seeds range from {figure(low, '+')} to {figure(high, '+')}; {n} prompts in each)."
            )
    return told


def about_run(run: RunSeen) -> list[str]:
    """The sentences of its paragraph."""
    told = [_began(run)]
    if not run.finished:
        told.append(f"It is {run.state}.")
        told += _under_way(run)
    elif run.summary.get("stopped"):
        told.append(f"It {run.state}.")
    told += run.verdicts[:1]
    told += [_change(change) for change in run.changes]
    told += run.verdicts[1:]
    told += _distance(run)
    told.append(_findings(run))
    return told


def _began(run: RunSeen) -> str:
    recipe = run.recipe
    model, loss = short(recipe.get("model", "an unknown model")), short(recipe.get("loss", "unknown"))
    if not recipe:
        return f"There is no recipe.toml in {run.name}, so what was trained is not known."
    if run.prefers:
        data = short(recipe["preferences"])
        return f"The model {model} learned with the loss {loss} from the preferences in {data}, without sampling."
    wanted = run.steps_wanted
    each = [recipe.get(k) for k in ("prompts_per_step", "samples_per_prompt")]
    arithmetic = f" of {each[0]} prompts with {each[1]} completions each" if None not in each else ""
    scorer = short(recipe.get("scorer", "unknown"))
    watched = recipe.get("watch")
    beside = f"; {short(watched)} watched, and nothing was trained on it" if watched is not None else ""
    return (
        f"The model {model} was trained with the loss {loss} on the scorer {scorer}{beside}: "
        f"{wanted if wanted is not None else 'unknown'} steps{arithmetic} in the recipe, {len(run.metrics)} done."
    )


def _under_way(run: RunSeen) -> list[str]:
    told = ["So there is no comparison of before and after."]
    before = [r.score.value for r in run.held_out("before") if r.score and r.score.value is not None]
    if before:
        told.append(
            f"Before training, the mean held-out score was {sum(before) / len(before):.3f} (n = {len(before)})."
        )
    rewards = run.series("reward")
    if len(rewards) > 1:
        (first, a), (last, b) = rewards[0], rewards[-1]
        told.append(
            f"The mean training score was {figure(a)} in step {first} and {figure(b)} in step {last}. Every step has "
            "other prompts, so that is no verdict."
        )
    return told


def _change(change: Change) -> str:
    n = change.difference["n"]
    return (
        f"The {change.what} was {figure(change.before['mean'])} before ({spread(change.before)}) and "
        f"{figure(change.after['mean'])} after ({spread(change.after)}), a paired difference of "
        f"{figure(change.difference['mean'], '+')} ({spread(change.difference, '+')}; 95% intervals, n = {n} "
        f"{change.unit})."
    )


def _distance(run: RunSeen) -> list[str]:
    kl = run.series("kl")
    if not kl:
        return []
    step, value = kl[-1]
    return [f"In step {step} the policy was {value:.3g} nats a completion from the reference (KL)."]


def _findings(run: RunSeen) -> str:
    if not run.metrics:
        return "No step is recorded, so nothing could be checked."
    count = Counter(f["level"] for f in run.findings)
    if not run.findings:
        return f"The detectors found nothing in {len(run.metrics)} step{'s' * (len(run.metrics) != 1)}."
    names = {"stop": "grave", "warn": "warning", "note": "note"}
    said = [f"{n} {names[level]}{'s' * (n > 1 and level != 'stop')}" for level in names if (n := count[level])]
    first = "; first of them" if len(run.findings) > 1 else ""
    return f"The detectors found {_list(said)}{first}: {run.findings[0]['sentence']}."


def _list(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
