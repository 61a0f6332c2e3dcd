"""The audit as one self-contained HTML page: no script, no external asset, everything escaped."""

from __future__ import annotations

from html import escape

from lossmith.proofs.auditing import Audit
from lossmith.report.audit.sentences import Section, sections

__all__ = ["html_page"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; border-bottom: 1px solid #ddd; }
pre { background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; }
td { padding: .25rem .8rem .25rem 0; vertical-align: top; border-bottom: 1px solid #f0f0f0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
.quiet { color: #666; }
.trap { border-left: 4px solid #c0392b; padding-left: .8rem; }
"""


def html_page(audit: Audit, figure: str = "") -> str:
    """A whole HTML document. figure: an SVG of the weight's curve, to stand below the formula."""
    source = ", ".join(str(x) for x in (audit.paper, audit.year) if x is not None)
    head = [
        f"<h1>{escape(audit.name)}</h1>",
        f'<p class="quiet">{escape(source)}</p>' if source else "",
        f"<p>{escape(audit.summary)}</p>" if audit.summary else "",
        f"<pre>{escape(audit.formula)}</pre>",
        *(f'<p class="trap"><b>Trap.</b> {escape(trap)}.</p>' for trap in audit.traps),
        f"<p>Needs {escape(', '.join(('logp', 'mask', *audit.needs)))}; couples rows by {escape(audit.coupling)}.</p>",
        *(f'<p class="quiet">{escape(note)}</p>' for note in audit.notes),
    ]
    if figure:
        head.append(f"<figure>{figure}</figure>")
    body = "\n".join([line for line in head if line] + [_section(one) for one in sections(audit)])
    latex = f"<h2>LaTeX</h2>\n<pre>{escape(audit.latex)}</pre>"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(audit.name)}: audit</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n{latex}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    rows = [
        f'<tr><td>{escape(line.label)}</td><td class="number">{escape(line.number)}</td>'
        f"<td>{escape(line.text)}</td></tr>"
        for line in section.lines
    ]
    note = f'\n<p class="quiet">{escape(section.note)}</p>' if section.note else ""
    return f"<h2>{escape(section.title)}</h2>{note}\n<table>\n" + "\n".join(rows) + "\n</table>"
