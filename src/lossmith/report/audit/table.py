"""One row for each loss: what its audit measured.

    python -m lossmith.report.audit.table > docs/proofs.md              every row, minutes
    python -m lossmith.report.audit.table docs/proofs.md grpo dapo      these rows alone, in the page as it stands

The second keeps the other rows, takes out those of losses that are gone, and measures those that are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.errors import ProofError, nearest
from lossmith.files import read_text, write_atomically
from lossmith.losses import CATALOGUE, example_loss
from lossmith.proofs.auditing import Audit, audit
from lossmith.proofs.finding import FAILED
from lossmith.proofs.kl_terms import kl_table
from lossmith.report.audit.sentences import EXACT, SIMILAR, short

__all__ = ["Row", "markdown", "redo", "table"]

HEADS = (
    "loss", "on-policy", "cosine", "residual", "residual, 1–6 tokens", "variance / REINFORCE", "token weight",
    "hard / even", "R + c", "c·R", "cosine at 0.1 nats", "checks",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One loss, as text."""

    name: str
    cells: tuple[str, ...]


def table(losses: Iterable[Any]) -> list[Row]:
    """Audits all of these, seconds each."""
    return [_row(audit(loss)) for loss in losses]


def _row(found: Audit) -> Row:
    one, numbers = found.on_policy, {f.check: f.number for f in found.findings}
    failed = [f.check for f in found.findings if f.status == FAILED]
    near = next((d.cosine for d in found.off_policy if d.nats == 0.1), None)
    cells = (
        "–" if one is None else f"{short(one.scale)}·∇E[r]" if one.residual < EXACT else "not ∇E[r]",
        short(one.cosine if one else None),
        short(one.residual if one else None),
        short(found.long.residual if found.long else None),
        short(found.noise_to_reinforce),
        "–" if found.length is None else f"T^{short(round(found.length.exponent, 6))}",
        _hard(found),
        *(_unchanged(numbers.get(check)) for check in ("reward_shift", "reward_scale")),
        short(near),
        "pass" if not failed else "fail: " + ", ".join(failed),
    )
    return Row(found.name, cells)


def _hard(found: Audit) -> str:
    by = {d.success: d.scale for d in found.difficulty}
    return short(by[0.1] / by[0.5]) if by.get(0.5) else "–"


def _unchanged(number: float | None) -> str:
    return "–" if number is None else "same" if number <= SIMILAR else "differs"


def markdown(losses: Iterable[Any]) -> str:
    """The table of losses and the table of KL terms as one markdown document."""
    return _document({row.name: _line((row.name, *row.cells)) for row in table(losses)}, _kl_terms())


def redo(page: str, names: Sequence[str]) -> str:
    """The page with the rows of these entries of the catalogue measured anew; the others stay as they are written.

    Rows that are missing are measured too, and those of entries that are gone are left out. ProofError: no such entry.
    """
    for name in names:
        if name not in CATALOGUE:
            raise ProofError(f"the catalogue has no loss {name!r}.{nearest(name, CATALOGUE)}")
    head, _, terms = page.partition(_KL_HEAD)
    written = {line.split(" | ")[0].removeprefix("| "): line for line in head.splitlines() if line.startswith("| ")}
    anew = [name for name in CATALOGUE if name in names or name not in written]
    rows = {row.name: _line((row.name, *row.cells)) for row in table(example_loss(name) for name in anew)}
    return _document({name: rows.get(name) or written[name] for name in CATALOGUE}, _KL_HEAD + terms)


def _document(rows: Mapping[str, str], kl_terms: str) -> str:
    head = ["# What the losses of the catalogue do, measured", "", _NOTE, "", _line(HEADS), _line(["---"] * len(HEADS))]
    return "\n".join([*head, *rows.values(), "", kl_terms])


def _kl_terms() -> str:
    lines = [_KL_HEAD, "", _KL_NOTE, "", _line(("term", "regularizes", "norm")), _line(("---",) * 3)]
    lines += [_line((row.term, row.regularizes, short(row.norm))) for row in kl_table()]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_NOTE = (
    "Exact enumeration of small policies, groups of 4. *On-policy*: the expected step, where it is a multiple of the "
    "true gradient. *Residual*: what is not along it, relative. *Variance / REINFORCE*: at equal expected gradient. "
    "*Token weight*: how it depends on the length T at equal advantage. *Hard / even*: how much more a prompt solved "
    "10 % of the time counts than one solved half of the time (groups of 16). *R + c*, *c·R*: whether the advantage "
    "stays the same. *Cosine at 0.1 nats*: sampled by an old policy this far away, mean over directions."
)
_KL_HEAD = "## What each KL term regularizes"
_KL_NOTE = "Expected gradient of the term alone, on-policy, β = 1, against the exact gradients."


def _catalogue() -> list[Any]:
    """Every entry, with example values for parameters that have no agreed default."""
    return [example_loss(name) for name in CATALOGUE]


def _main(given: Sequence[str]) -> None:
    if not given:
        print(markdown(_catalogue()), end="")
        return
    page = Path(given[0])
    write_atomically(page, redo(read_text(page, ProofError, "page of proofs"), given[1:]))


if __name__ == "__main__":
    _main(sys.argv[1:])
