"""What the page shows, as its address says it: `?loss=grpo(beta=0.1)&loss=dapo&screen=weight`.

An address may come from anyone: whatever it cannot mean is an AddressError, and it runs no code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from lossmith.errors import AddressError, LossError, nearest
from lossmith.losses.catalogue.call import read_call
from lossmith.losses.piece import is_number, shown

__all__ = ["DEFAULT_LOSSES", "MOST_LOSSES", "SCREENS", "State", "fields_of", "read_state"]

SCREENS = {
    "loss": "The loss",
    "weight": "The weight",
    "group": "A group",
    "truth": "The truth",
}
MOST_LOSSES = 4
DEFAULT_LOSSES = ("grpo", "dapo")
_LONGEST = 2000  # characters of one loss
_ROWS, _LENGTH = 12, 12


def _field(screen: str, default: Any, doc: str, low: float, high: float, step: float = 1) -> Any:
    """Where it belongs, what it means, and its range; step 1: a whole number."""
    about = {"screen": screen, "doc": doc, "low": low, "high": high, "step": step}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class State:
    """A view: the chosen losses, the screen, and what was set on each screen."""

    losses: tuple[str, ...] = DEFAULT_LOSSES
    screen: str = "loss"
    old_prob: float = _field(
        "weight", 0.3, "the token's probability when it was sampled, which some losses look at", 0.01, 0.99, 0.01
    )
    rewards: tuple[float, ...] = _field("group", (1.0, 0.0, 0.5, 0.0), "score of each completion", -1e6, 1e6, 0.1)
    lengths: tuple[int, ...] = _field("group", (4, 2, 6, 3), "tokens of each completion", 1, _LENGTH)
    cut: tuple[int, ...] = _field("group", (0, 0, 0, 0), "1 where the token budget cut the completion, else 0", 0, 1)
    ratio: float = _field("group", 1.0, "r: how the probability of each token moved since it was sampled", 0.2, 5, 0.01)
    kappa: float = _field("group", 0.0, "κ: nats by which each token lies above the reference", -1, 2, 0.01)
    steps: int = _field("truth", 20, "gradient steps that are taken", 0, 60)
    rate: float = _field("truth", 2.0, "learning rate: what the expected gradient is multiplied with", 0.01, 10, 0.01)
    size: int = _field("truth", 3, "G: completions sampled of the prompt", 2, 4)
    reuse: int = _field("truth", 1, "steps taken before new completions are sampled (off-policy drift)", 1, 20)
    proxy: float = _field("truth", 0.0, "spread of the scorer's error around the true reward", 0, 2, 0.05)
    seed: int = _field("truth", 0, "which small policy, reference and rewards", 0, 999)

    def query(self) -> str:
        """The address that `read_state` reads back; what is as usual is left out."""
        pairs: list[tuple[str, str]] = [("loss", call) for call in self.losses]
        if self.screen != "loss":
            pairs.append(("screen", self.screen))
        for field in fields_of():
            value = getattr(self, field.name)
            if value != field.default:
                pairs.append((field.name, written(value)))
        return urlencode(pairs)


def fields_of(screen: str | None = None) -> list[dataclasses.Field]:
    """What can be set, on this screen or on any."""
    every = [field for field in dataclasses.fields(State) if field.metadata]
    return [field for field in every if screen in (None, field.metadata["screen"])]


def written(value: Any) -> str:
    """A number or a list of them, as an address and a field of the page have it."""
    return ",".join(f"{x:.12g}" for x in (value if isinstance(value, tuple) else (value,)))


def read_state(query: str, own: Collection[str] = ()) -> State:
    """The state of an address. own: losses of the user's own code, which only the command line may name.

    AddressError: a word or value that it cannot mean.
    """
    try:
        pairs = parse_qsl(query.removeprefix("?"), keep_blank_values=True, max_num_fields=64)
    except ValueError:
        raise AddressError("this address has more parts than a view can have.") from None
    known = {field.name: field for field in fields_of()}
    given: dict[str, Any] = {}
    for key, text in pairs:
        if key == "loss":
            continue
        if key not in known and key != "screen":
            raise AddressError(f"an address has no part {shown(key)}.{nearest(key[:80], ['loss', 'screen', *known])}")
        if key in given:
            raise AddressError(f"this address says {key} twice.")
        given[key] = _screen(text) if key == "screen" else _value(known[key], text)
    state = State(_losses([text for key, text in pairs if key == "loss"], own), **given)
    return _same_lengths(state, given)


def _screen(text: str) -> str:
    if text not in SCREENS:
        raise AddressError(f"there is no screen {shown(text)}.{nearest(text[:80], SCREENS)}")
    return text


def _losses(calls: Sequence[str], own: Collection[str]) -> tuple[str, ...]:
    if len(calls) > MOST_LOSSES:
        raise AddressError(f"this address names {len(calls)} losses; at most {MOST_LOSSES} are shown side by side.")
    for call in calls:
        if len(call) > _LONGEST:
            raise AddressError(f"a loss of {len(call)} characters is longer than any: {shown(call)}.")
        if ":" in _name(call) and _name(call) not in own:
            raise AddressError(
                f"{shown(call)} is code, and an address runs none. Name it on the command line: "
                "lossmith explore FILE.py:FUNCTION"
            )
    return tuple(calls) or DEFAULT_LOSSES


def _name(call: str) -> str:
    """Of the loss that the catalogue would look for; "" where it would read none."""
    try:
        return read_call(call)[0]
    except LossError:
        return ""


def _value(field: dataclasses.Field, text: str) -> Any:
    """The number, or the list of numbers, of one field."""
    if not isinstance(field.default, tuple):
        return _number(field, text)
    parts = text.split(",")
    if len(parts) > _ROWS:
        raise AddressError(f"{field.name} has {len(parts)} numbers; a group of at most {_ROWS} is shown.")
    return tuple(_number(field, part) for part in parts)


def _number(field: dataclasses.Field, text: str) -> float | int:
    about = field.metadata
    whole = about["step"] == 1
    try:
        value: float | int = int(text[:40]) if whole else float(text[:40])
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise AddressError(f"{field.name} ({about['doc']}) is {kind}, not {shown(text)}.") from None
    if not is_number(value) or math.isinf(value) or not about["low"] <= value <= about["high"]:
        raise AddressError(
            f"{field.name} ({about['doc']}) is {about['low']:g} to {about['high']:g}, not {shown(text)}."
        )
    return value


def _same_lengths(state: State, given: dict[str, Any]) -> State:
    """A group's lists with one number a completion: those that were not given follow the one that was."""
    lists = ("rewards", "lengths", "cut")
    sizes = {len(given[name]) for name in lists if name in given}
    if len(sizes) > 1:
        counts = ", ".join(f"{len(given[name])} {name}" for name in lists if name in given)
        raise AddressError(f"a group has one number of each kind for each completion, not {counts}.")
    if not sizes:
        return state
    size = sizes.pop()
    fill = {"rewards": 0.0, "lengths": 3, "cut": 0}
    missing = {name: (getattr(state, name) + (fill[name],) * size)[:size] for name in lists if name not in given}
    return dataclasses.replace(state, **missing)
