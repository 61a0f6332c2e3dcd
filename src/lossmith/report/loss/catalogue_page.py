"""The catalogue as one page of markdown (a test checks that docs/catalogue.md is so):
`python -m lossmith.report.loss.catalogue_page > docs/catalogue.md`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lossmith.losses import CATALOGUE, Entry, Loss, example_loss
from lossmith.proofs.printed.functions import FUNCTIONS
from lossmith.report.loss.comparison import changes_of_preset

__all__ = ["FAMILIES", "catalogue_page"]

FAMILIES = {
    "policy_gradient": "Policy gradient: log-probability times advantage",
    "clipped": "PPO and its descendants: a clipped ratio per token",
    "sequence": "One ratio a completion",
    "soft": "Stop-gradient weights, soft gates, trust regions in probability",
    "imitation": "Imitation of completions chosen by their reward",
    "distillation": "Distillation: a teacher's probabilities",
    "paired": "Preferences and regressions of whole completions",
    "terms": "Terms that stand alone",
    "book": "The book's forms as printed",
    "": "Your own",
}
_HEAD = """# The catalogue

Generated from the compositions by `python -m lossmith.report.loss.catalogue_page`. Each formula is what
`print(ls.get_loss(NAME))` gives, with the defaults in force; parameters that have no agreed default show an example
value, and the loss has to be given one. r is the ratio, A the advantage, R the reward of a completion and r_t that of a
token, V the critic's value at the start of the update and V_θ now, g a prompt's group, T a completion's length, N the
number of completions, π_T a teacher; [condition] is 1 where it holds and 0 elsewhere, sg stops the gradient, and
x_{t+1} is 0 after the last token. The proofs read each formula as a program and hold it to the loss. What each loss
does, measured, is in [proofs.md](proofs.md). What arithmetic has no signs for is a function:

"""
_FUNCTIONS = (
    "whiten", "quantile", "second", "lowest", "top", "cov", "drawn", "balance", "likeliest", "matched", "KL₂", "KL",
)  # fmt: skip


def catalogue_page() -> str:
    """Every named loss with its formula, then the presets with what they change."""
    known = [f"- {_of(name)}" for name in _FUNCTIONS]
    return "\n\n".join([_HEAD + "\n".join(known), *_families(), *_presets()]) + "\n"


def _of(function: str) -> str:
    return " ".join((FUNCTIONS[function].__doc__ or "").split())


def _families() -> Iterator[str]:
    for family, title in FAMILIES.items():
        members = [e for e in CATALOGUE.values() if e.family == family and not e.preset_of]
        if members:
            yield f"## {title}"
        yield from (_section(entry, example_loss(entry.name)) for entry in members)


def _section(entry: Entry, loss: Loss) -> str:
    open_ = [f"`{key}={value!r}`" for key, value in entry.example.items()]
    facts = [
        f"{entry.paper}, {entry.year}",
        f"couples rows by {loss.coupling}",
        f"needs {', '.join(f'`{n}`' for n in sorted(loss.needs)) or 'nothing more'}",
        *([f"example values: {', '.join(open_)}"] if open_ else []),
        *([f"also known as {', '.join(f'`{a}`' for a in entry.aliases)}"] if entry.aliases else []),
    ]
    traps = "".join(f"\n\nTrap: {trap}." for trap in loss.traps)
    return f"### `{entry.name}`\n\n{entry.summary} {'; '.join(facts)}.\n\n```\n{loss}\n```{traps}"


def _presets() -> Iterator[str]:
    yield "## Presets: other libraries' defaults"
    yield (
        "`name@library` starts from the named loss and changes what differs in that library. `lossmith losses compare "
        "grpo@trl grpo@verl grpo@nemo_rl` shows them side by side. A number that stands here stays whatever option is "
        "changed with it. `@trl` is TRL with use_vllm=False, its default; `@trl_vllm` is TRL with vLLM as the sampler, "
        "where each completion is also weighted by how likely it is to the learner and was to the sampler."
    )
    rows = ["| preset | starts from | changes | note |", "| --- | --- | --- | --- |"]
    for entry in CATALOGUE.values():
        if entry.preset_of:
            changed = ", ".join(f"{d.name} {d.values[1]}" for d in changes_of_preset(entry.name) if d.values[1] != "·")
            note = entry.summary.partition(": ")[2]
            rows.append(f"| `{entry.name}` | `{entry.preset_of}` | {changed or 'nothing'} | {note} |")
    yield "\n".join(rows)


if __name__ == "__main__":
    print(catalogue_page(), end="")
