"""The page of metrics: `python -m lossmith.report.run.metrics_page > docs/metrics.md`."""

from __future__ import annotations

from lossmith.training.metrics import SECTIONS

__all__ = ["page"]

_INTRODUCTION = """# Metrics

Every key of `metrics.jsonl`, a line a step. `lossmith train` writes those of its loss; a key is there where it was
measured. This page is written by `python -m lossmith.report.run.metrics_page`.

**Steps** are told to people from 1 to N: in progress lines, in errors, in `steps = 12`. Files count what was done
before: `step` in `metrics.jsonl` and the number of `rollouts/step-00000.parquet` are 0 for the first step, and
`checkpoints/step-00005` is the state after five.

**KL** has one unit wherever it is shown, written, plotted or limited: nats a completion, summed over its response
tokens. A loss called from Python says `kl_ref` and `kl_old` in nats a token (`out.metrics`), and the KL term of a loss,
β·κ, is a token's too."""


def page() -> str:
    """docs/metrics.md."""
    lines = [_INTRODUCTION]
    for title, part in SECTIONS.values():
        lines += ["", f"## {title}", "", "| key | what it is | unit |", "|---|---|---|"]
        lines += [f"| `{name}` | {what.replace('|', '∣')} | {unit} |" for name, (what, unit) in part.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
