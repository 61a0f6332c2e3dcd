"""Output sets whose members differ: two outputs that say nearly the same give an annotator nothing to judge."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from lossmith.feedback.output_set import OutputSet, set_of_rollouts
from lossmith.policy import Policy, SamplingSettings, sample
from lossmith.policy.sampling import OnProgress
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout

__all__ = ["SAME", "likeness", "sample_sets", "split_duplicates"]

SAME = 0.8  # from this likeness on, two outputs count as nearly the same

_WORD = re.compile(r"\w+")


def likeness(first: str, second: str) -> float:
    """In [0, 1]: the share of word triples that two texts have in common (Jaccard), whatever case and punctuation.

    Texts shorter than three words are compared as a whole.
    """
    a, b = _triples(first), _triples(second)
    return len(a & b) / len(a | b)


def _triples(text: str) -> set[tuple[str, ...]]:
    words = [word.casefold() for word in _WORD.findall(text)] or [text.strip()]
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def split_duplicates(rollouts: Sequence[Rollout], same: float = SAME) -> tuple[list[Rollout], list[Rollout]]:
    """(the first of each kind, those nearly the same as one of them), in order."""
    distinct: list[Rollout] = []
    repeats: list[Rollout] = []
    for rollout in rollouts:
        known = any(likeness(rollout.completion, other.completion) >= same for other in distinct)
        (repeats if known else distinct).append(rollout)
    return distinct, repeats


def sample_sets(
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int,
    settings: SamplingSettings,
    *,
    model: str,
    seed: int,
    resample: int = 3,
    same: float = SAME,
    checksum: str | None = None,
    on_progress: OnProgress | None = None,
) -> list[OutputSet]:
    """A set of up to n different outputs for each prompt.

    Outputs nearly the same as an earlier one of their set are drawn again, up to `resample` times; what is still alike
    then stays and is counted in `near_duplicates`, but an exact repetition is left out. The random numbers of round k
    are those of step k, and its outputs are samples k·n, k·n + 1, ...: every output can be made again by itself.
    checksum: of the policy's weights, where it is known.
    """
    checksum = (checksum or policy.checksum())[:16]
    drawn: dict[str, list[Rollout]] = {}
    for rollout in sample(policy, prompts, n, settings, seed=seed, step=0, on_progress=on_progress):
        drawn.setdefault(rollout.prompt.id, []).append(rollout)
    for step in range(1, resample + 1 if n > 1 and settings.temperature > 0 else 1):
        short = [p for p in prompts if len(split_duplicates(drawn[p.id], same)[0]) < n]
        if not short:
            break
        for again in sample(policy, short, n, settings, seed=seed, step=step):
            drawn[again.prompt.id].append(dataclasses.replace(again, sample=step * n + again.sample))
    sets = []
    for prompt in prompts:
        distinct, repeats = split_duplicates(drawn[prompt.id], same)
        other = {r.completion: r for r in reversed(repeats)}  # the first of each text
        texts = {r.completion for r in distinct}
        fill = [r for text, r in other.items() if text not in texts][: max(0, n - len(distinct))]
        chosen = sorted([*distinct[:n], *fill], key=lambda r: r.sample)
        sets.append(set_of_rollouts(chosen, model, settings, seed, checksum, near_duplicates=len(fill)))
    return sets
