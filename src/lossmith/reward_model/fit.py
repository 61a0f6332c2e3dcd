"""The optimizer's part of reward-model training, a step at a time, with a state that can be kept and gone on with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmith.durable.checkpoint import Checkpoint, optimizer_state, restore_optimizer
from lossmith.errors import RunError
from lossmith.optimization import clip_gradients, make_optimizer, optimizer_step
from lossmith.reward_model import losses
from lossmith.reward_model.model import Scoring, token_parts
from lossmith.reward_model.recipe import RewardRecipe
from lossmith.reward_model.scored_texts import ScoredTexts

__all__ = ["Diverged", "Fit", "accumulate", "loss_of"]


class Diverged(RunError):
    """Numbers that are not finite, and would not be the next time either."""


class Fit:
    """Minimizes the weighted mean loss of the examples. `done` steps of `total` are in the weights.

    settled: False while the weights are between two steps.
    """

    def __init__(self, scoring: Scoring, examples: Sequence[ScoredTexts], recipe: RewardRecipe, name: str) -> None:
        self.scoring, self.examples, self.recipe, self.name = scoring, examples, recipe, name
        scoring.freeze_below(recipe.train_layers)
        self.trained = {n: p for n, p in scoring.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer([(list(self.trained.values()), recipe.learning_rate)], recipe)
        parts = max(1, round(len(examples) / recipe.comparisons_per_step))
        self.batches = [
            rows
            for epoch in range(recipe.epochs)
            for rows in np.array_split(np.random.default_rng([recipe.seed, epoch]).permutation(len(examples)), parts)
        ]
        self.total = len(self.batches)
        self.done = 0
        self.recent: list[float] = []  # losses since the last line for people
        self.settled = True

    def steps(self) -> Iterator[str]:
        """The steps that are left; a line for people now and then, otherwise ""."""
        settings = self.recipe.for_steps(self.total)
        for rows in self.batches[self.done :]:
            self.optimizer.zero_grad(set_to_none=True)
            value = accumulate(self.scoring, [self.examples[i] for i in rows], self.recipe, self.name)
            if not math.isfinite(clip_gradients(self.optimizer, settings)):
                raise Diverged(f"step {self.done + 1}: the gradient is not finite; lower learning_rate.")
            self.settled = False
            optimizer_step(self.optimizer, settings, self.done, self.total)
            self.done += 1
            self.recent.append(value)
            line = ""
            if self.done % max(1, self.total // 10) == 0 or self.done == self.total:
                line = f"step {self.done:>4}/{self.total}  loss {sum(self.recent) / len(self.recent):.4f}"
                self.recent = []
            self.settled = True
            yield line

    def state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(tensors of a checkpoint by the name of their file, what else it holds)."""
        tensors, numbers = optimizer_state(self.optimizer)
        weights = {name: p.detach() for name, p in self.trained.items()}
        return {"weights": weights, "optimizer": tensors}, {"recent": self.recent, "optimizer": numbers}

    @torch.no_grad()
    def load(self, found: Checkpoint) -> None:
        """As it was when `found` was saved."""
        state, weights = found.state(), found.tensors("weights")
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        restore_optimizer(self.optimizer, found.tensors("optimizer"), state["optimizer"])
        self.done, self.recent = found.step, state["recent"]


def accumulate(scoring: Scoring, examples: Sequence[ScoredTexts], recipe: RewardRecipe, name: str) -> float:
    """Add the gradient of the examples' weighted mean loss, micro-batch by micro-batch; returns its value."""
    weights = sum(e.weight for e in examples)
    value = 0.0
    for part in token_parts(examples, recipe.micro_batch_tokens):
        scores = scoring.scores([row for e in part for row in e.rows]).split([len(e.rows) for e in part])
        terms = [e.weight * loss_of(s, e, name, recipe.centring) for e, s in zip(part, scores, strict=True)]
        loss = torch.stack(terms).sum() / weights
        loss.backward()
        value += float(loss.detach())
    return value


def loss_of(scores: Tensor, example: ScoredTexts, name: str, centring: float) -> Tensor:
    """The loss of one example's scores [rows], its centring included; not yet weighted."""
    if example.target is not None:
        target = torch.full_like(scores, example.target)
        kind = losses.logistic(scores, target > 0.5) if name == "logistic" else losses.mean_squared(scores, target)
        return kind.sum()
    if name == "bradley_terry":
        value = losses.bradley_terry(scores[0], scores[1], example.probability, example.margin)
    else:
        value = (losses.plackett_luce if name == "plackett_luce" else losses.all_pairs)(scores, example.tiers)
    return value + centring * losses.centring(scores)
