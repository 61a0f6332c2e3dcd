"""The losses of a view: read from an address that nobody vouches for, and written as short as they can be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lossmith.errors import LossError, quiet_traps
from lossmith.explorer.address import State
from lossmith.losses import Loss, PolicyLoss, example_loss, find_entry, get_loss
from lossmith.losses.catalogue.call import read_call
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.composition.flat import AXES
from lossmith.losses.loss import together

__all__ = ["MOST", "ByParameters", "Chosen", "Own", "chosen_losses", "literal", "load_own", "spec_of", "value_text"]

MOST = 4  # losses side by side
Own = Mapping[str, Entry]  # of somebody's own code, by what the command line said


@dataclass(frozen=True, eq=False)
class Chosen:
    """A loss of the view. asked: what stands in the address. error: why it, or a change of it, is refused."""

    place: int
    asked: str
    loss: Loss | None
    entry: Entry | None
    spec: str
    error: str = ""
    refused: tuple[str, str] = ("", "")  # the parameter and the value that were refused

    @property
    def letter(self) -> str:
        return "ABCD"[self.place]


@dataclass(frozen=True)
class ByParameters:
    """A loss as the key of what was computed of it; its own pieces and functions need not be hashable."""

    flat: str
    loss: Loss = field(compare=False)

    @classmethod
    def of(cls, loss: Loss) -> ByParameters:
        return cls(repr(loss.to_dict()), loss)


def load_own(specs: list[str]) -> dict[str, Entry]:
    """The entries of those that name code of one's own: only what the command line says is ever loaded."""
    names = [read_call(spec)[0] for spec in specs]
    return {name: find_entry(name) for name in names if ":" in name}


def chosen_losses(state: State, own: Own) -> list[Chosen]:
    """Up to four; of more the first four, and a problem."""
    asked = state.all("loss")
    if len(asked) > MOST:
        state.problems.append(f"{len(asked)} losses are asked for; the first {MOST} are shown.")
    found = []
    for place, spec in enumerate(asked[:MOST]):
        changes = {key[2:]: value for key, value in state.pairs if key.startswith(f"{place}.")}
        found.append(_chosen(place, spec, changes, own))
    return found


def _chosen(place: int, asked: str, changes: dict[str, str], own: Own) -> Chosen:
    try:
        loss, entry = _read(asked, own)
    except LossError as error:
        return Chosen(place, asked, None, None, asked, str(error))
    spec = spec_of(loss, entry, own)
    now = loss.to_dict()
    for key, text in changes.items():
        if key in now and value_text(now[key]) == text:
            continue  # a form without scripts sends what nobody touched too
        try:
            with quiet_traps():
                changed = loss.replace(**{key: literal(text, now.get(key))})
            spec = spec_of(changed, entry, own)
            loss, now = _read(spec, own)[0], changed.to_dict()  # what the entry fixes is refused here
        except LossError as error:
            return Chosen(place, asked, loss, entry, spec_of(loss, entry, own), str(error), (key, text))
    return Chosen(place, asked, loss, entry, spec)


def _read(spec: str, own: Own) -> tuple[Loss, Entry]:
    """LossError: as the library says it, or code that the command line did not name."""
    if len(spec) > 2000:
        raise LossError("the loss is longer than 2000 characters.")
    name, called = read_call(spec)
    if ":" not in name:
        return _of_catalogue(spec), find_entry(name)
    if name not in own:
        raise LossError(
            f"{name!r} is somebody's own code, which an address does not load. "
            f"Name it on the command line: lossmith explore {name}"
        )
    with quiet_traps():
        entry = own[name]
        return entry.build(**together(entry.example, {})).replace(**called), entry


def _as_training_does(spec: str, own: Own) -> Loss:
    """Without values for what has no agreed default; max_length alone is filled in by whoever trains."""
    if ":" in read_call(spec)[0]:
        return _read(spec, own)[0]
    with quiet_traps():
        loss = get_loss(spec)
        return loss.replace(max_length=8) if "max_length" in loss.needs else loss


@lru_cache(maxsize=2000)
def _of_catalogue(spec: str) -> Loss:
    return example_loss(spec)


@lru_cache(maxsize=500)
def _defaults(name: str) -> Loss:
    """The entry as it is, without values for what has no agreed default."""
    with quiet_traps():
        return find_entry(name).build().replace(name=name)


def spec_of(loss: Loss, entry: Entry, own: Own = {}) -> str:  # noqa: B006 - never changed
    """The loss as a recipe would ask for it, with nothing in it that follows from the rest."""
    name = next((said for said, known in own.items() if known is entry), entry.name)
    with quiet_traps():
        usual = entry.build().to_dict() if entry.origin else _defaults(entry.name).to_dict()
    flat = {k: v for k, v in loss.to_dict().items() if k not in ("name", "function", "completion")}
    changed = {k: v for k, v in flat.items() if k not in usual or usual[k] != v}
    if isinstance(loss, PolicyLoss):
        for key in [k for k in changed if k not in AXES]:
            fewer = {k: v for k, v in changed.items() if k != key}
            try:
                if _as_training_does(_written(name, fewer), own) == loss:
                    changed = fewer
            except LossError:  # without it, it would be refused
                continue
    return _written(name, changed)


def _written(name: str, changed: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={_python(v)}' for k, v in changed.items())})" if changed else name


def _python(value: Any) -> str:
    """As `read_call` reads it: that knows literals only, and infinity is none."""
    if isinstance(value, float) and math.isinf(value):
        return "-1e999" if value < 0 else "1e999"
    return repr(list(value) if isinstance(value, tuple) else value)


def value_text(value: Any) -> str:
    """A parameter as its field shows it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value))
    return repr(value) if isinstance(value, float) else str(value)


def literal(text: str, now: Any) -> Any:
    """What was typed into a field whose value is `now`. What cannot be read stays text: the library says why not."""
    text = text.strip()
    if isinstance(now, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(now, (list, tuple)):
        parts = [x for x in re.split(r"[,;\s]+", text) if x and x != "none"]
        return [literal(x, 0.0) for x in parts] if all(map(_is_number, parts)) else parts
    if text.lower() in ("none", ""):
        return None
    if isinstance(now, str):
        return text
    if re.fullmatch(r"[+-]?\d{1,15}", text):
        return int(text)
    return float(text) if _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
