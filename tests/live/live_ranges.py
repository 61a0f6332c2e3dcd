"""Random parameters: a table of fixed values and ranges, drawn when the case is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from live_case import Params

Range = Callable[[np.random.Generator], Any]


class Ranges(dict[str, Any]):
    """{parameter: value or range}; called with a generator, it is the parameters. `|` joins tables."""

    def __or__(self, other: dict[str, Any]) -> Ranges:
        return Ranges({**self, **other})

    def __ror__(self, other: dict[str, Any]) -> Ranges:
        return Ranges({**other, **self})

    def __call__(self, rng: np.random.Generator) -> Params:
        drawn = {name: value(rng) if callable(value) else value for name, value in self.items()}
        if drawn.pop("delta_above_clip", False):
            drawn["dual_clip"] += drawn["clip_high"]
        return drawn


def uniform(low: float, high: float) -> Range:
    return lambda rng: float(rng.uniform(low, high))


def either(*options: Any) -> Range:
    return lambda rng: options[int(rng.integers(len(options)))]


nothing = Ranges({"beta": 0.0})
clip = Ranges({"clip_low": uniform(0.05, 0.4), "clip_high": uniform(0.05, 0.5)})
narrow = Ranges({"clip_low": uniform(0.01, 0.2), "clip_high": uniform(0.01, 0.3)})  # for ratios of sequences
# TRL's and Liger's two-sided bound also cuts positive advantages if it stands below 1 + clip_high: keep it above
dual = clip | {"dual_clip": uniform(1.1, 3), "delta_above_clip": True}
kl = Ranges(
    {"beta": uniform(0.01, 0.2), "kl_estimator": "k3", "kl_place": "loss", "kl_ratio_weight": either(False, True)}
)
