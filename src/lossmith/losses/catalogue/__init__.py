"""Named losses, by family. A loss is one entry: its composition, its paper, one line of what it is.

Being in the catalogue is enough for `lossmith losses show NAME`, its formula and weight table, and every proof.
"""

from __future__ import annotations

import warnings
from typing import Any

from lossmith.errors import LossError, TrapWarning, nearest
from lossmith.losses.catalogue import book, clipped, policy_gradient, sequence, soft
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.flat import to_flat, with_flat
from lossmith.losses.policy_loss import PolicyLoss

__all__ = ["CATALOGUE", "Entry", "get_loss", "list_losses"]

CATALOGUE: dict[str, Entry] = {
    entry.name: entry for family in (policy_gradient, clipped, sequence, soft, book) for entry in family.ENTRIES
}


def get_loss(name: str, **changes: Any) -> PolicyLoss:
    """A loss of the catalogue, with any axis choice or parameter changed by its flat name.

    get_loss("grpo", beta=0.04);  get_loss("reinforce", advantage="gae", advantage_scale="whiten", lam=0.95)

    LossError: unknown name or parameter (with the nearest ones), a parameter that would have no effect, a value out
    of range, a composition that means nothing. TrapWarning: legal, and known to mislead.
    """
    if name not in CATALOGUE:
        raise LossError(f"There is no loss {name!r}.{nearest(name, CATALOGUE)} `lossmith losses list` shows them all.")
    entry = CATALOGUE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)  # the default's traps; what is returned is checked below
        default = entry.build().replace(name=name)
        _refuse_fixed(entry, default, changes)
    return with_flat(default, {"name": name, **changes})


def _refuse_fixed(entry: Entry, default: PolicyLoss, changes: dict[str, Any]) -> None:
    """A fixed choice is refused loudly when another is asked for, never ignored."""
    flat = to_flat(default)
    for key in entry.fixed:
        if key in changes and changes[key] != flat[key]:
            raise LossError(
                f"{entry.name} is defined with {key}={flat[key]!r}; {key}={changes[key]!r} would be another loss."
            )


def list_losses() -> list[Entry]:
    """Every entry, in the order of its family and year."""
    return list(CATALOGUE.values())
