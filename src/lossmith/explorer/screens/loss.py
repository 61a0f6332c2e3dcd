"""The loss: formulas with what differs marked, traps and refusals as the library says them, listings, recipe lines."""

from __future__ import annotations

import json
import re
import shlex
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from lossmith.explorer.address import State
from lossmith.explorer.chosen import MOST, ByParameters, Chosen, chosen_losses
from lossmith.losses import Loss, list_losses
from lossmith.losses.batch import FIELDS as BATCH_FIELDS
from lossmith.losses.catalogue.entry import Entry
from lossmith.report.loss import compare
from lossmith.report.page.formula import mathml

__all__ = ["SHOWN", "formula", "found_in_catalogue", "view"]

SHOWN = ("q",)
_FEW = 12  # results of a search


def view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """cards: a loss each. differences: rows of what is not the same in all of them."""
    known = [one for one in losses if one.loss is not None]
    cards = [_card(one) for one in known]
    _mark(cards)
    differences: list[Any] = []
    same: list[str] = []
    if len(known) > 1:
        found = compare([one.loss for one in known if one.loss is not None])
        same = [f"{a} and {b} are the same composition" for a, b in found.same]
        blank = ("",) * len(known)
        differences = [
            (d.name, d.meaning, list(zip(d.values, d.words or blank, strict=True))) for d in found.differences
        ]
    return {"cards": cards, "differences": differences, "same": same}


def _card(one: Chosen) -> dict[str, Any]:
    loss, entry = one.loss, one.entry
    assert loss is not None and entry is not None
    missing = sorted(loss.needs - BATCH_FIELDS.keys())
    source = ", ".join(x for x in (entry.paper, str(entry.year or "")) if x) or entry.origin
    return {
        "one": one,
        "summary": entry.summary,
        "source": source,
        "lines": [{"math": Markup(line), "differs": False} for line in formula(loss)],
        "text": str(loss),
        "traps": loss.traps,
        "needs": [(n, BATCH_FIELDS[n].provider) for n in sorted(loss.needs & BATCH_FIELDS.keys())],
        "missing": missing,
        "coupling": loss.coupling,
        "listing": _listing(loss),
        "recipe": f"loss = {json.dumps(one.spec, ensure_ascii=False)}",
        "command": f"lossmith train --loss {shlex.quote(one.spec)}",
        "python": f"loss = ls.get_loss({one.spec!r})",
    }


def formula(loss: Loss) -> list[str]:
    """MathML, a line each; none where the formula cannot be so."""
    return list(_mathml(ByParameters.of(loss)))


@lru_cache(maxsize=400)
def _mathml(of: ByParameters) -> tuple[str, ...]:
    return tuple(mathml(of.loss))


def _listing(loss: Loss) -> str:
    try:
        return loss.code()
    except NotImplementedError as error:
        return f"# {error}"


def _mark(cards: list[dict[str, Any]]) -> None:
    """What some loss has on a line and another has not."""
    everywhere = [{_plain(line["math"]) for line in card["lines"]} for card in cards]
    for card in cards:
        for line in card["lines"]:
            line["differs"] = any(_plain(line["math"]) not in lines for lines in everywhere)


def _plain(math: str) -> str:
    return re.sub(r"<[^>]+>", "", math)


# -- the catalogue ----------------------------------------------------------------------------------------------------


def found_in_catalogue(state: State, losses: list[Chosen]) -> list[dict[str, Any]]:
    """What the search finds: every word stands in a loss's name, its other names, its line, paper or year."""
    words = state["q"].casefold().split()
    if not words:
        return []
    if re.search(r"[(:]", state["q"]):
        return [_as_typed(state, losses)]
    hits = [entry for entry in list_losses() if all(word in _about(entry) for word in words)]
    hits.sort(key=lambda e: (not e.name.startswith(words[0]), words[0] not in e.name, bool(e.preset_of)))
    specs = [one.spec for one in losses]
    room = len(specs) < MOST
    return [
        {
            "name": entry.name,
            "summary": entry.summary,
            "there": entry.name in specs,
            "link": state.query([*specs, entry.name], q="") if room else "",
        }
        for entry in hits[:_FEW]
    ] + ([{"more": len(hits) - _FEW}] if len(hits) > _FEW else [])


def _as_typed(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """A call such as grpo(beta=0.1): the loss itself, or why it is none."""
    (one,) = chosen_losses(State((("loss", state["q"].strip()),)), {})
    if one.loss is None or one.entry is None:
        return {"error": one.error}
    specs = [known.spec for known in losses]
    link = state.query([*specs, one.spec], q="") if len(specs) < MOST else ""
    return {"name": one.spec, "summary": one.entry.summary, "there": one.spec in specs, "link": link}


def _about(entry: Entry) -> str:
    parts = (entry.name, *entry.aliases, entry.summary, entry.paper, str(entry.year), entry.preset_of, entry.family)
    return " ".join(parts).casefold()
