"""What a configuration says about the loss, and what the reader of a trainer keeps account of on the way."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lossmith.adapters.configurations.source import Computed, Source
from lossmith.errors import LossError, nearest, quiet_traps
from lossmith.losses import Loss, find_entry, get_loss
from lossmith.losses.catalogue.call import read_call
from lossmith.losses.composition.foreign import FOREIGN
from lossmith.losses.piece import is_number, shown

__all__ = ["CRITIC", "Reading", "Settings", "Trainer", "ours"]

_NOTHING = ("none", "null", "~", "")

CRITIC = "The critic is a model of its own with its own optimizer: its term does not weigh on the policy's."


@dataclass(frozen=True)
class Trainer:
    """One trainer, in one version: what it calls its settings, and how they become a loss."""

    name: str
    version: str
    title: str  # as its own pages write it
    defaults: Mapping[str, Any]  # of every setting that is of the loss
    elsewhere: Callable[[str], bool]  # a setting that is not of the loss: the learning rate, say
    own: Callable[[str], bool]  # a setting that only this trainer has, by which it is recognized
    programs: tuple[str, ...]  # what a script launches it by
    loss: Callable[[Settings], Loss]
    settings: Callable[[Source], Source] = lambda source: source  # spelled as `defaults` has them


@dataclass(frozen=True)
class Reading:
    """The loss that a trainer's configuration is.

    used: settings that were given and decided it; defaults: those that were not given, with the trainer's value;
    without_effect: given, of the loss, and not read by this one; elsewhere: given, and not of the loss;
    not_understood: {setting: why}, because of which the loss may be another one; notes: what else there is to know.
    """

    loss: Loss
    trainer: str
    version: str  # the defaults are of this one
    used: Mapping[str, Any]
    defaults: Mapping[str, Any]
    without_effect: Mapping[str, Any]
    elsewhere: Mapping[str, Any]
    not_understood: Mapping[str, str]
    notes: tuple[str, ...]
    where: str
    why: str = ""  # what the trainer was recognized by; "" where it was told

    @property
    def call(self) -> str:
        """The loss as `get_loss` takes it: a preset and what differs from it, "dapo@trl(beta=0.04)"."""
        name, flat = self.loss.name, self.loss.to_dict()
        with quiet_traps():
            preset = find_entry(name).build().to_dict()
            changed = {k: v for k, v in flat.items() if k != "name" and (k not in preset or preset[k] != v)}
            for key in [k for k, v in changed.items() if v in (False, None, [])]:  # said by the others already?
                rest = {k: v for k, v in changed.items() if k != key}
                changed = rest if get_loss(name, **rest).to_dict() == flat else changed
        return f"{name}({', '.join(f'{k}={_literal(v)}' for k, v in changed.items())})".removesuffix("()")

    @property
    def sure(self) -> Loss:
        """The loss. LossError: a setting is not understood, so that it may be another one."""
        if self.not_understood:
            raise LossError(
                f"{self.where}: not understood, so that the loss is not known: "
                + "; ".join(f"{name} ({why})" for name, why in self.not_understood.items())
                + "."
            )
        return self.loss


def _literal(value: Any) -> str:
    """As a call of `get_loss` in text has it: a bound that is no bound is written 1e999."""
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr("none" if value is None else value)


def ours(word: str, value: Any) -> dict[str, Any]:
    """What another library's word with this value is called here; LossError names the values that are known."""
    written = FOREIGN[word].write
    if value not in written:
        raise LossError(f"{word} is {shown(value)}.{nearest(str(value), map(str, written))}")
    return read_call(f"loss({written[value]})")[1]


@dataclass
class Settings:
    """The settings of one configuration while its loss is made: every question is kept account of."""

    source: Source
    trainer: Trainer
    asked: dict[str, None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def given(self, name: str) -> bool:
        return name in self.source.settings

    def place(self, name: str) -> str:
        line = self.source.lines.get(name)
        return f"{self.source.where}:{line}: {name}" if line else f"{self.source.where}: {name}"

    def refuse(self, name: str, why: str) -> None:
        """This setting is not understood: no loss can be promised."""
        self.asked[name] = None
        self.refused.setdefault(name, why)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def raw(self, name: str) -> Any:
        """As it was given, or the trainer's default."""
        default = self.trainer.defaults[name]
        self.asked[name] = None
        value = self.source.settings.get(name, default)
        if isinstance(value, Computed):
            self.refuse(name, f"its value {value.text} is only known where the {self.source.kind} runs")
            return default
        return value

    def number(self, name: str) -> Any:
        """A number, or None where nothing is said. LossError: it is something else."""
        value = self.raw(name)
        if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
            return None
        found = _number(value)
        if found is None:
            raise LossError(f"{self.place(name)} is {shown(value)}, which is not a number.")
        return found

    def must(self, name: str) -> Any:
        """A number that cannot be left open."""
        value = self.number(name)
        if value is None:
            raise LossError(f"{self.place(name)} is nothing, where {self.trainer.title} needs a number.")
        return value

    def flag(self, name: str) -> bool:
        value = self.raw(name)
        if isinstance(value, str) and value.strip().lower() in ("true", "yes", "on", "1"):
            return True
        if isinstance(value, str) and value.strip().lower() in ("false", "no", "off", "0", *_NOTHING):
            return False
        if value is None or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise LossError(f"{self.place(name)} is {shown(value)}, which is neither true nor false.")

    def word(self, name: str, known: Collection[str], *, none: bool = False) -> Any:
        """One of the known words; None where nothing is said and that is allowed."""
        value = self.raw(name)
        if none and (value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)):
            return None
        if not isinstance(value, str) or value not in known:
            raise LossError(
                f"{self.place(name)} is {shown(value)}, which {self.trainer.title} {self.trainer.version} does not "
                f"have.{nearest(str(value), known)}"
            )
        return value

    def numbers(self, name: str) -> tuple[Any, ...] | None:
        """A list of numbers, or None."""
        value = self.raw(name)
        if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
            return None
        parts = [x for x in value.strip("[]() ").replace(",", " ").split() if x] if isinstance(value, str) else value
        found = [_number(x) for x in parts] if isinstance(parts, (list, tuple)) else [None]
        if None in found or not found:
            raise LossError(f"{self.place(name)} is {shown(value)}, which is not a list of numbers.")
        return tuple(found)

    def build(self, start: Loss, changes: Mapping[str, Any]) -> Loss:
        """The loss with these parameters. LossError: a value that no loss can have, with the file that it is of."""
        try:
            with quiet_traps():
                return start.replace(**changes)
        except LossError as error:
            raise LossError(f"{self.source.where}: {error}") from None

    def reading(self, loss: Loss, why: str) -> Reading:
        """What was found; whatever was given and neither asked for nor known is not understood."""
        given, known = self.source.settings, self.trainer.defaults
        if self.source.whole:
            given = {k: v for k, v in given.items() if k not in known or v != known[k]}
        unread = {k: v for k, v in given.items() if k not in self.asked}
        elsewhere = {k: v for k, v in unread.items() if self.trainer.elsewhere(k)}
        for name in unread:
            if name not in known and name not in elsewhere:
                self.refused[name] = (
                    f"{self.trainer.title} {self.trainer.version} has no such setting{_near(name, known)}"
                )
        self.refused = {name: why.removesuffix(".") for name, why in self.refused.items()}
        if self.source.rest:
            self.note(self.source.rest)
        return Reading(
            loss=loss,
            trainer=self.trainer.name,
            version=self.trainer.version,
            used={k: given[k] for k in self.asked if k in given and k not in self.refused},
            defaults={k: known[k] for k in self.asked if k not in given and k in known},
            without_effect={k: v for k, v in unread.items() if k in known and k not in elsewhere},
            elsewhere=elsewhere,
            not_understood=self.refused,
            notes=tuple(self.notes),
            where=self.source.where,
            why=why,
        )


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value if is_number(value) else None


def _near(name: str, known: Collection[str]) -> str:
    """Settings whose last part is spelled almost like this one's."""
    last = {x.rpartition(".")[2]: x for x in known}
    close = difflib.get_close_matches(name.rpartition(".")[2], last, n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(last[x] for x in close)}?" if close else ""
