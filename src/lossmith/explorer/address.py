"""What an address says: the state of a view, all of it, so that a view can be shared.

An address is not trusted. A field is read by what stands about it here; what cannot be read is a sentence in
`problems`, and the view goes on with the field's usual value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from lossmith.errors import nearest

__all__ = ["FIELDS", "SCREENS", "Field", "State"]

SCREENS = {
    "loss": "The loss",
    "weight": "The weight",
    "group": "A group",
    "step": "A step",
    "truth": "The truth",
}
PARTS = {
    "steps": "Steps",
    "gradient": "Expected gradient",
    "noise": "Noise",
    "drift": "Off-policy",
    "proxy": "Over-optimization",
}


@dataclass(frozen=True)
class Field:
    """One thing that a view can be asked for. kind: "real", "whole", "text", "choice" or "list" (real numbers)."""

    name: str
    kind: str
    default: Any
    label: str
    low: float = -math.inf
    high: float = math.inf
    step: float = 0.01
    log: bool = False  # the slider moves by factors
    choices: tuple[str, ...] = ()
    length: int = 0  # of a list: how many numbers, where it is fixed
    hint: str = ""

    def read(self, text: str) -> Any:
        """The value. ValueError: what is wrong with it, as the end of a sentence."""
        if self.kind == "choice":
            if text not in self.choices:
                raise ValueError(f"is {_short(text)}.{nearest(text, self.choices)}")
            return text
        if self.kind == "text":
            if len(text) > 300:
                raise ValueError("is longer than 300 characters")
            return text
        if self.kind == "list":
            found = [self._number(x) for x in re.split(r"[\s,;]+", text.strip()) if x]
            if len(found) != self.length:
                raise ValueError(f"has {len(found)} numbers, and there are {self.length} to be given")
            return tuple(found)
        return self._number(text)

    def _number(self, text: str) -> float:
        try:
            x = float(text)
        except ValueError:
            raise ValueError(f"is {_short(text)}, which is not a number") from None
        if not self.low <= x <= self.high:  # NaN too
            raise ValueError(f"is {_short(text)}, but goes from {self.low:g} to {self.high:g}")
        if self.kind == "whole":
            if x != int(x):
                raise ValueError(f"is {_short(text)}, but is a whole number")
            return int(x)
        return x

    def write(self, value: Any) -> str:
        """The value as a field shows it; `read` gives it back."""
        if self.kind == "list":
            return " ".join(f"{x:g}" for x in value)
        return f"{value:g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return repr(text if len(text) < 40 else text[:37] + "...")


_ALL = (
    Field("screen", "choice", "loss", "screen", choices=tuple(SCREENS)),
    Field("tour", "whole", 0, "page of the tour", 0, 10),
    Field("q", "text", "", "Search the catalogue"),
    # the weight
    Field("advantage", "real", 1.0, "Size of the advantage |A|", 0.01, 10, log=True),
    Field("old_prob", "real", 0.3, "Probability of the token under the old policy", 0.001, 0.999),
    Field("ratio", "real", 1.15, "Read at ratio r", 0.1, 10, log=True),
    # a group
    Field("rewards", "text", "1 0 0 0", "Rewards", hint="one for each completion; | begins another prompt"),
    Field("lengths", "text", "12 4 8 6", "Lengths in tokens", hint="in the same order"),
    Field("budget", "whole", 16, "Token budget", 1, 40, 1, hint="what reaches it is cut off: truncated"),
    Field("moved", "real", 1.0, "Ratio π_θ/π_old of every token", 0.1, 10, log=True),
    Field("away", "real", 0.0, "log π_θ − log π_ref of every token", -3, 3),
    Field("kappa", "real", 0.5, "κ of one token", -3, 3),
    # a step
    *(Field(f"score{i}", "real", x, f"Score of output {i}", -2, 2) for i, x in enumerate((0.59, 0.68, 0.65, 0.36), 1)),
    Field("updates", "whole", 0, "Updates taken", 0, 12, 1),
    Field("size", "real", 100.0, "Learning rate", 1, 2000, log=True, hint="of the logits, not of a network"),
    Field("which", "whole", 1, "Loss", 1, 4, 1),
    Field("token", "text", "", "Token", hint="output.token"),
    # the truth
    Field("part", "choice", "steps", "part", choices=tuple(PARTS)),
    Field("group", "whole", 3, "Completions in a group, G", 2, 5, 1),
    Field("steps", "whole", 20, "Steps", 0, 120, 1),
    Field("rate", "real", 3.0, "Learning rate", 0.05, 50, log=True),
    Field("reuse", "whole", 1, "Steps on the same completions", 1, 20, 1, hint="1: on-policy"),
    Field("seed", "whole", 0, "Policy at the start", 0, 999, 1, hint="0: it likes rain; others are drawn"),
    Field("gap", "real", 0.0, "How far the reference is", 0, 2, hint="0: it is the policy at the start"),
    Field("drift", "real", 0.0, "How far the sampler is", 0, 2, hint="0: on-policy"),
    Field("beta", "real", 0.0, "β of every loss that has one", 0, 1, 0.005, hint="0: as each loss says"),
    Field(
        "proxy", "list", (0.0, 0.5, 0.8, 0.5, 0.7, 1.0, 0.8), "Reward of each completion", -5, 5, length=7
    ),
    Field("gold", "list", (0.0, 0.6, 1.0, 0.6, 0.6, 0.0, 0.1), "What was wanted: gold", -5, 5, length=7),
)  # fmt: skip
FIELDS = {f.name: f for f in _ALL}


@dataclass
class State:
    """What an address asks for. `pairs`: its names and values in order; `problems`: what could not be read."""

    pairs: tuple[tuple[str, str], ...] = ()
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = [*FIELDS, "loss"]
        for name, _ in self.pairs:
            if name not in known and not re.fullmatch(r"[0-3]\.\w{1,40}", name):
                self.problems.append(f"there is no {_short(name)} in an address.{nearest(name, known)}")
        self._values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The value of a field."""
        if name not in self._values:
            given, about = dict(self.pairs).get(name), FIELDS[name]
            self._values[name] = about.default
            if given is not None:
                try:
                    self._values[name] = about.read(given)
                except ValueError as error:
                    dot = "" if str(error)[-1] in ".?" else "."
                    self.problems.append(f"{name} {error}{dot} Shown with {about.write(about.default) or 'nothing'}.")
        return self._values[name]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def text(self, name: str) -> str:
        """The value as its field shows it."""
        return FIELDS[name].write(self[name])

    def query(self, losses: Iterable[str], **changes: Any) -> str:
        """The address of this view with these losses and some fields changed, as short as it can be."""
        values = {name: self[name] for name in FIELDS} | changes
        pairs = [(n, FIELDS[n].write(v)) for n, v in values.items() if n in FIELDS and v != FIELDS[n].default]
        return "?" + urlencode([*pairs, *(("loss", spec) for spec in losses)])
