"""The first screen: what each loss says, what differs, what misleads, its listing and its line of a recipe."""

from __future__ import annotations

import json
from typing import Any

from lossmith.errors import LossError
from lossmith.explorer.chosen import build, spelled
from lossmith.losses import CATALOGUE, Loss, find_entry, list_losses
from lossmith.losses.batch import FIELDS
from lossmith.losses.catalogue.call import read_call
from lossmith.report.loss import compare
from lossmith.report.loss.catalogue_page import FAMILIES
from lossmith.report.page.formula import mathml

__all__ = ["catalogue", "formulas"]


def catalogue() -> list[dict[str, Any]]:
    """What the search looks through."""
    return [
        {
            "name": entry.name,
            "summary": entry.summary,
            "family": FAMILIES.get(entry.family, entry.family) if not entry.preset_of else f"as {entry.paper}",
            "also": " ".join([*entry.aliases, str(entry.year or ""), entry.paper]),
        }
        for entry in list_losses()
    ]


def formulas(calls: list[str]) -> dict[str, Any]:
    """Of losses that can be built."""
    losses = [build(call) for call in calls]
    first = set(losses[0].formula().splitlines()) if losses else set()
    found: dict[str, Any] = {"losses": [_said(c, x, first) for c, x in zip(calls, losses, strict=True)]}
    if len(losses) > 1:
        both = compare(losses)
        found["names"] = list(both.names)
        found["same"] = [f"{a} and {b} are the same composition." for a, b in both.same]
        found["differences"] = [
            {
                "name": d.name,
                "meaning": d.meaning,
                "values": [
                    {"text": value, "words": words, "differs": (value, words) != (d.values[0], (*d.words, "")[0])}
                    for value, words in zip(d.values, d.words or [""] * len(d.values), strict=True)
                ],
            }
            for d in both.differences
        ]
    return found


def _said(call: str, loss: Loss, first: set[str]) -> dict[str, Any]:
    name = read_call(call)[0]
    entry = find_entry(name)
    text, drawn = loss.formula().splitlines(), mathml(loss)
    short = spelled(loss, name)
    base = CATALOGUE.get(entry.preset_of)
    return {
        "name": short,
        "summary": entry.summary,
        "source": ", ".join(x for x in (entry.paper, str(entry.year or "")) if x) or entry.origin,
        "preset_of": base.name if base else "",
        "text": [{"line": line, "differs": line not in first} for line in text],
        "mathml": drawn if len(drawn) == len(text) else [],
        "traps": [f"{trap}." for trap in loss.traps],
        "needs": [{"name": n, "from": FIELDS[n].provider if n in FIELDS else "you"} for n in sorted(loss.needs)],
        "couples": loss.coupling,
        "code": _listing(loss),
        "recipe": f"loss = {json.dumps(short, ensure_ascii=False)}",
    }


def _listing(loss: Loss) -> str:
    try:
        return loss.code()
    except (NotImplementedError, LossError) as error:
        return f"# {error}"
