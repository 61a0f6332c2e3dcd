"""Named losses, by family. A loss is one entry: its composition, its paper, one line of what it is.

Being in the catalogue is enough for `lossmith losses show NAME`, its formula, listing, weight table, and every proof.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from lossmith.errors import LossError, nearest, quiet_traps
from lossmith.losses.catalogue import (
    book,
    clipped,
    distillation,
    imitation,
    paired,
    policy_gradient,
    presets,
    sequence,
    soft,
    terms,
    user,
)
from lossmith.losses.catalogue.call import read_call
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.loss import Loss, together
from lossmith.losses.piece import shown

__all__ = ["CATALOGUE", "Entry", "example_loss", "find_entry", "get_loss", "list_losses"]

_FAMILIES = (policy_gradient, clipped, sequence, soft, imitation, distillation, paired, terms, book)
CATALOGUE: dict[str, Entry] = {
    entry.name: replace(entry, family=family.__name__.rpartition(".")[2])
    for family in _FAMILIES
    for entry in family.ENTRIES
}
CATALOGUE |= {entry.name: entry for entry in presets.entries(CATALOGUE)}
_ALIASES = {alias: entry.name for entry in CATALOGUE.values() for alias in entry.aliases}


def find_entry(name: str) -> Entry:
    """The entry of a name, an alias, a user's loss, an entry point, or "module:function" ("file.py:function").

    LossError: there is none; the message names the nearest ones.
    """
    if ":" in name:
        return user.from_path(name)
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    for candidate in (name, plain, _ALIASES.get(name, ""), _ALIASES.get(plain, ""), plain.replace("++", "_pp")):
        if candidate in CATALOGUE:
            return CATALOGUE[candidate]
    known = user.entries()
    if name in known:
        return known[name]
    close = nearest(name, [*CATALOGUE, *_ALIASES, *known])
    if "Known:" in close:  # nothing is near: presets and aliases would only make the list longer
        close = nearest(name, [*(n for n, e in CATALOGUE.items() if not e.preset_of), *known])
    raise LossError(f"There is no loss {name!r}.{close} `lossmith losses list` shows them all.")


def get_loss(spec: str | None = None, /, **changes: Any) -> Loss:
    """A loss of the catalogue, with any axis choice or parameter changed by its flat name.

    get_loss("grpo", beta=0.04);  get_loss("grpo(beta=0.04)");  get_loss("grpo@trl");
    get_loss("reinforce", advantage="gae", lam=0.95);  get_loss("my_package.losses:mine", beta=0.2)

    name: what the loss is called from then on; where there is no spec, also which loss it is.

    LossError: unknown name or parameter (with the nearest ones), a parameter that would have no effect, a value out
    of range, a composition that means nothing. TrapWarning: legal, and known to mislead.
    """
    spec = changes.pop("name", None) if spec is None else spec
    if not isinstance(spec, str):
        raise LossError(f"a loss is asked for by its name, not by {shown(spec)}.")
    name, called = read_call(spec)
    changes = together(called, changes)
    entry = find_entry(name)
    own = {key: changes.pop(key) for key in _own_parameters(entry) if key in changes}
    with quiet_traps():  # the default's traps; what is returned is checked below
        default = entry.build(**own).replace(name=entry.name)
        _refuse_fixed(entry, default, changes)
    return default.replace(**{"name": entry.name, **changes})


def _own_parameters(entry: Entry) -> list[str]:
    """Parameters of the function that builds the loss: a user's composition may have some."""
    if not entry.origin:
        return []
    return [p.name for p in inspect.signature(entry.build).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _refuse_fixed(entry: Entry, default: Loss, changes: dict[str, Any]) -> None:
    """A fixed choice is refused loudly when another is asked for, never ignored."""
    flat = default.to_dict()
    for key in entry.fixed:
        given = getattr(changes.get(key), "option", changes.get(key, flat[key]))
        if not isinstance(given, str) or given != flat[key]:
            raise LossError(f"{entry.name} is defined with {key}={flat[key]!r}; {key}={shown(given)} is another loss.")


def example_loss(name: str, max_length: int = 8, **changes: Any) -> Loss:
    """get_loss with values for the parameters that have no agreed default: to look at, and to prove things about.

    Trap warnings are not raised: what is looked at shows them.
    """
    plain, called = read_call(name)
    changes = together(called, changes)
    with quiet_traps():
        loss = get_loss(plain, **{**find_entry(plain).example, **changes})
        return loss.replace(max_length=max_length) if "max_length" in loss.needs else loss


def list_losses() -> list[Entry]:
    """Every entry: the families in their order, then libraries' presets, then the user's own."""
    return [*CATALOGUE.values(), *user.entries().values()]
