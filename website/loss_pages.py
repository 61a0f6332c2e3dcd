"""A page for each loss of the catalogue, from the loss itself and from the measured rows of docs/proofs.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lossmith.errors import LossError, quiet_traps
from lossmith.losses import CATALOGUE, Entry, Loss, PolicyLoss, describe, example_loss
from lossmith.losses.batch import FIELDS
from lossmith.report.loss import RATIOS, changes_of_preset, weight_plot
from lossmith.report.loss.catalogue_page import FAMILIES
from lossmith.report.loss.comparison import weights
from lossmith.report.page.formula import mathml

PROOFS = Path(__file__).parent.parent / "docs" / "proofs.md"


def families() -> Iterator[tuple[str, list[str]]]:
    """(title, names of its losses), in the order of the catalogue."""
    for family, title in FAMILIES.items():
        names = [e.name for e in CATALOGUE.values() if e.family == family and not e.preset_of]
        if names:
            yield title, names


def pages() -> Iterator[tuple[str, str]]:
    """(name of a file, its text): the list, then a page and a curve for each loss."""
    yield "losses/index.md", _index()
    for _, names in families():
        for name in names:
            with quiet_traps():
                loss = example_loss(name)
                curve = _curve(loss)
                yield f"losses/{name}.md", _page(CATALOGUE[name], loss, drawn=curve is not None)
            if curve is not None:
                yield f"losses/{name}.svg", curve


def linked(markdown: str) -> str:
    """The names of losses that begin a row or a title of a table lead to their pages."""

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        entry = CATALOGUE.get(name)
        if entry is None:
            return match[0]
        page = f"losses/{entry.preset_of or name}.md" + ("#in-other-libraries" if entry.preset_of else "")
        shown = f"`{name}`" if match["tick"] else name
        return f"| [{shown}]({page}) |"

    return re.sub(r"^\| (?P<tick>`?)(?P<name>[\w@]+)(?P=tick) \|", link, markdown, flags=re.MULTILINE)


def _index() -> str:
    parts = [
        "# Losses",
        "Every loss has a page: its formula, the curve of its weight, the same in plain torch, what was measured of "
        "it, and what other libraries make of it. [The catalogue](../catalogue.md) has all formulas on one page.",
    ]
    for title, names in families():
        rows = ["| loss | year | what it is | expected step on-policy | token weight |", "|---|---|---|---|---|"]
        for name in names:
            entry, row = CATALOGUE[name], _measured().get(name, {})
            figures = f"{row.get('on-policy', '–')} | {row.get('token weight', '–')}"
            rows.append(f"| [`{name}`]({name}.md) | {entry.year or ''} | {_text(entry.summary)} | {figures} |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _page(entry: Entry, loss: Loss, *, drawn: bool) -> str:
    own = entry.name if not entry.example else _call(entry)
    parts = [f"# {entry.name}", f"{_text(entry.summary)} {_source(entry)}"]
    parts += [f'!!! warning "A known trap"\n\n    {_text(trap)}.' for trap in loss.traps]
    parts += ["## Formula", *_formula(loss)]
    parts += ["## Weight", *_weight(loss, entry.name, drawn)]
    parts += ["## In plain torch", *_listing(loss, own)]
    parts += ["## What was measured", *_figures(entry.name)]
    parts += ["## What it needs", _needs(loss)]
    parts += ["## Choices and parameters", _parameters(loss)]
    presets = _presets(entry.name)
    if presets:
        parts += ["## In other libraries", presets]
    parts += ["## Use it", _use(own)]
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Words of the catalogue, which know no markdown."""
    return re.sub(r"([*_<>\[\]|])", r"\\\1", text)


def _call(entry: Entry) -> str:
    return f"{entry.name}({', '.join(f'{k}={v!r}' for k, v in entry.example.items())})"


def _source(entry: Entry) -> str:
    papers = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.paper or entry.origin)
    facts = [", ".join(x for x in (papers, str(entry.year or "")) if x)]
    if entry.aliases:
        facts.append("also known as " + ", ".join(f"`{a}`" for a in entry.aliases))
    if entry.example:
        facts.append("shown with example values of " + ", ".join(f"`{k}`" for k in entry.example))
    return "*" + "; ".join(filter(None, facts)) + ".*"


def _formula(loss: Loss) -> Iterator[str]:
    lines = mathml(loss)
    plain = f"```text\n{loss}\n```"
    if not lines:
        yield plain
        return
    yield '<div class="formula" markdown="0">\n' + "\n".join(lines) + "\n</div>"
    indented = plain.replace("\n", "\n    ")
    yield f'??? note "As text, and as LaTeX"\n\n    {indented}\n\n    ' + _fenced("latex", loss.formula("latex"), 4)


def _fenced(language: str, text: str, indent: int = 0) -> str:
    return f"```{language}\n{text.rstrip()}\n```".replace("\n", "\n" + " " * indent)


def _curve(loss: Loss) -> str | None:
    if loss.needs - FIELDS.keys() - {"max_length"}:
        return None
    try:
        return weight_plot(loss)
    except LossError:
        return None


def _weight(loss: Loss, name: str, drawn: bool) -> Iterator[str]:
    if not drawn:
        yield "It has no weight per token: the loss is a function of whole completions."
        return
    scale = "dL/dlogp = −w·A/Z" if isinstance(loss, PolicyLoss) else "measured by autograd, 1 at r = 1"
    yield f"w(r, A), the factor of a token's gradient: {scale}."
    yield f"![w(r, A) of {name} over the ratio]({name}.svg){{ .weight }}"
    rows = weights(loss)
    if rows is not None:
        head = "| ratio r | " + " | ".join(f"{r:g}" for r in RATIOS) + " |"
        lines = [f"| {sign} | " + " | ".join(f"{w:.4g}" for w in row) + " |" for sign, row in rows.items()]
        yield "\n".join([head, "|---" * (len(RATIOS) + 1) + "|", *lines])


def _listing(loss: Loss, own: str) -> Iterator[str]:
    try:
        code = loss.code()
    except NotImplementedError as error:
        yield f"There is no listing: {_text(str(error))}"
        return
    yield f'Generated from its parts (`lossmith losses show "{own}" --code`), and held against the loss by the proofs.'
    yield _fenced("python", code)


@cache
def _measured() -> dict[str, dict[str, str]]:
    """{loss: {column: cell}} of docs/proofs.md."""
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in PROOFS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    head = next(row for row in rows if row[0] == "loss")
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head) and row[0] in CATALOGUE}


def _figures(name: str) -> Iterator[str]:
    row = _measured().get(name)
    if row is None:
        yield f"Nothing yet: `lossmith audit {name}` measures it."
        return
    yield (
        f"By exact enumeration of small policies, groups of 4; [the table of all losses](../proofs.md) says what each "
        f"column is. `lossmith audit {name} --html {name}.html` measures more, every check with its number."
    )
    lines = [f"| {_text(column)} | {_text(cell)} |" for column, cell in row.items() if column != "loss"]
    yield "\n".join(["| | |", "|---|---|", *lines])


def _needs(loss: Loss) -> str:
    lines = [f"Rows depend on each other by {loss.coupling}. Besides `logp` and `mask`:"]
    for name in sorted(loss.needs):
        given = FIELDS[name].provider if name in FIELDS else "a parameter without an agreed default: give it"
        lines.append(f"- `{name}`: {_text(given)}")
    if loss.uses_old:
        lines.append("- `old_logp`: a forward pass at the start of the update; without it the ratio is 1")
    if len(lines) == 1:
        return lines[0].replace(" Besides `logp` and `mask`:", " It needs `logp` and `mask` alone.")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _parameters(loss: Loss) -> str:
    if isinstance(loss, PolicyLoss):
        rows = [(name, str(value), meaning) for name, value, meaning in describe(loss)]
    else:
        rows = [(k, str(v), "") for k, v in loss.to_dict().items() if k not in ("name", "completion")]
    if not rows:
        return "None."
    lines = [f"| `{name}` | `{value}` | {_text(meaning)} |" for name, value, meaning in rows]
    return "\n".join(["| name | value | meaning |", "|---|---|---|", *lines])


def _presets(name: str) -> str:
    entries = [e for e in CATALOGUE.values() if e.preset_of == name]
    if not entries:
        return ""
    rows = ["| preset | what differs from it | note |", "|---|---|---|"]
    for entry in entries:
        changed = ", ".join(f"{d.name} {d.values[1]}" for d in changes_of_preset(entry.name) if d.values[1] != "·")
        rows.append(f"| `{entry.name}` | {_text(changed) or 'nothing'} | {_text(entry.summary.partition(': ')[2])} |")
    compared = " ".join([name, *(e.name for e in entries[:3])])
    return (
        "\n".join(rows)
        + f"\n\n`lossmith losses compare {compared}` shows them side by side, advantages and weights too."
    )


def _use(own: str) -> str:
    quoted = f'"{own}"' if "(" in own else own
    name, _, inside = own.partition("(")
    given = f", {inside.removesuffix(')')}" if inside else ""
    return (
        f"```\nlossmith losses show {quoted}\nlossmith audit {quoted}\nlossmith train --loss {quoted}\n```\n\n"
        f'```python\nimport lossmith as ls\n\nloss = ls.get_loss("{name}"{given})\n```'
    )
