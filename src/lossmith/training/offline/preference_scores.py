"""A policy on held-out preferences, before and after it has learned from others, and what the difference says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.intervals import Interval, allows_verdict, mean_of, share_across, share_of
from lossmith.intervals import verdict as verdict_of
from lossmith.losses import CompletionLoss
from lossmith.losses.completion.pairs import Paired
from lossmith.rollouts import Rollout
from lossmith.training.learner import Learner
from lossmith.training.offline.examples import JudgedRollouts, JudgedSet

__all__ = ["PreferenceScores", "compare", "evaluate_preferences", "rows_of", "score_of", "verdict"]


@dataclass(frozen=True)
class PreferenceScores:
    """A policy on held-out preferences; each prompt's mean is the unit of the statistics.

    accuracy   share of pairs whose better text has the greater score of the loss (its log-ratio, or what it compares);
               a tie counts one half. Where judgements hold no pairs: of a good and a bad text of any two prompts
    contributions  {prompt: what it adds to the accuracy}; their mean is the accuracy
    chosen_logp, rejected_logp  log-probability (nats) of the better and the worse texts
    """

    accuracy: Interval
    contributions: dict[str, float]
    chosen_logp: dict[str, float]
    rejected_logp: dict[str, float]
    loss: float


@torch.no_grad()
def evaluate_preferences(learner: Learner, examples: JudgedSet) -> PreferenceScores:
    """Measure the policy as it is."""
    loss = learner.loss
    assert isinstance(loss, CompletionLoss)
    rollouts, given = rows_of(examples.examples)
    batch = learner.make_batch(rollouts, given)
    batch = batch.replace(logp=learner.outputs(learner.policy, rollouts, frozenset()).logp)
    at = loss.completions(batch)
    score = loss.term.score(at) if isinstance(loss.term, Paired) else at.log_ratio
    reward = torch.tensor([score_of(r) for r in rollouts], device=score.device)
    pairs = _pairs(examples)
    chosen = {w for w, _ in pairs} if pairs else {i for i, r in enumerate(reward.tolist()) if r > 0.5}
    rejected = {loser for _, loser in pairs} if pairs else set(range(len(rollouts))) - chosen
    logp = batch.require("logp", loss.name).sum(1).tolist()
    ids = [r.prompt.content_id for r in rollouts]
    outcomes = _outcomes(score.tolist(), pairs or _ordered(reward.tolist()), ids)
    if pairs:
        by_prompt = _by_prompt([(name, value) for name, _, value in outcomes])
        accuracy = share_of(list(by_prompt.values()), len(outcomes))
    else:
        accuracy, by_prompt = share_across(outcomes)
    return PreferenceScores(
        accuracy=accuracy,
        contributions=by_prompt,
        chosen_logp=_by_prompt([(ids[i], logp[i]) for i in sorted(chosen)]),
        rejected_logp=_by_prompt([(ids[i], logp[i]) for i in sorted(rejected)]),
        loss=float(loss(batch).loss),
    )


def _pairs(examples: JudgedSet) -> list[tuple[int, int]]:
    """(better, worse) row numbers within each judgement; a tie of the judge's is none."""
    pairs: list[tuple[int, int]] = []
    start = 0
    for e in examples.examples:
        pairs += [(start + i, start + j) for i, j in (e.pairs if e.probability != 0.5 else [])]
        start += len(e.rollouts)
    return pairs


def _ordered(reward: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) row numbers of any two texts of which one was found better, whatever their prompts."""
    return [(i, j) for i, x in enumerate(reward) for j, y in enumerate(reward) if x > y]


def _outcomes(
    score: Sequence[float], pairs: Sequence[tuple[int, int]], ids: Sequence[str]
) -> list[tuple[str, str, float]]:
    """(prompt of the better, prompt of the worse, whether the score says so too; a tie one half)."""
    return [(ids[w], ids[v], (score[w] > score[v]) + 0.5 * (score[w] == score[v])) for w, v in pairs]


def _by_prompt(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for name, value in values:
        grouped.setdefault(name, []).append(value)
    return {name: math.fsum(several) / len(several) for name, several in grouped.items()}


def compare(before: PreferenceScores, after: PreferenceScores) -> dict[str, Any]:
    """Before, after and the paired difference, prompt by prompt, with 95% intervals."""

    def change(first: dict[str, float], second: dict[str, float], span: float) -> dict[str, Any]:
        return mean_of([second[k] - first[k] for k in first if k in second], within=(-span, span)).as_dict()

    summary: dict[str, Any] = {}
    for when, one in (("before", before), ("after", after)):
        summary[when] = {"accuracy": one.accuracy.as_dict(), "loss": one.loss}
        for side in ("chosen_logp", "rejected_logp"):
            summary[when][side] = mean_of(list(getattr(one, side).values())).mean
    summary["difference"] = {"accuracy": change(before.contributions, after.contributions, 1.0)} | {
        side: change(getattr(before, side), getattr(after, side), 0.0) for side in ("chosen_logp", "rejected_logp")
    }
    return summary


def rows_of(examples: Sequence[JudgedRollouts]) -> tuple[list[Rollout], dict[str, Tensor]]:
    """The rollouts of examples, and what the batch must know of them: a judgement is a group, whatever its prompt."""
    rollouts = [dataclasses.replace(r, sample=1000 * k + r.sample) for k, e in enumerate(examples) for r in e.rollouts]

    def each(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value(k, e) for k, e in enumerate(examples) for _ in e.rollouts], dtype=dtype)

    return rollouts, {
        "group": each(lambda k, e: k, torch.int64),
        "pair_probability": each(lambda k, e: e.probability, torch.float32),
        "pair_weight": each(lambda k, e: e.weight, torch.float32),
    }


def score_of(rollout: Rollout) -> float:
    assert rollout.score is not None and rollout.score.value is not None
    return float(rollout.score.value)


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the paired differences say, in sentences."""
    difference = summary["held_out"]["difference"]
    sentences = [verdict_of(difference["accuracy"], "held-out preference accuracy")]
    fell = difference["chosen_logp"]
    if allows_verdict(fell) and fell["ci95_high"] < 0:
        sentences.append(
            f"Warning: the preferred texts themselves became less likely ({fell['mean']:+.2f} nats a text): a margin "
            "grows as well when both sides fall. A smaller learning rate, a larger beta, or a loss that imitates the "
            "winner (orpo, cpo) helps."
        )
    return sentences
