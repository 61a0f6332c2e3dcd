"""The page of detectors: `python -m lossmith.report.run.doctor_page > docs/doctor.md` (seconds)."""

from __future__ import annotations

from collections.abc import Sequence

from lossmith.detectors import DETECTORS, FAMILIES, Detector, Finding
from lossmith.detectors.faults import false_alarms, found, healthy
from lossmith.intervals import share_of

__all__ = ["page"]

SEEDS = range(5)
HEALTHY = (("12 steps", 40, 12, False), ("48 steps", 5, 48, False), ("12 steps in bfloat16", 15, 12, True))

_INTRODUCTION = """# What can be wrong with a run

`lossmith doctor RUN` looks at a run's metrics and completions and says what is wrong with it: a sentence, the
number and what it rests on, where (step, prompt, completion), the likely cause, what to try, and the source. The
run may be finished, dead, or under way; the rollouts may be another trainer's (whatever `lossmith replay` reads).
Nothing of the run is executed. What a detector needs and nobody recorded is said as "not checked", never as
"passed".

```
lossmith doctor runs/mine
lossmith doctor runs/mine --json
lossmith doctor runs/mine --fail-on warn      # exit code 1 if there is a warning or worse, for CI
```

From Python, `lossmith.doctor("runs/mine")` gives the same as a value.

## While a run is under way

`lossmith train` asks the same detectors after every step. Each says once what it finds, below the step's line and
in the run's `findings.jsonl`, and again where it gets worse. A **note** is good to know, a **warn** wants to be
looked at, and a **stop** is a run that is lost: it ends there, and is saved. The verdict at the end weighs what was
found: a collapsed policy, or a scorer that changed, gets none. At the end the scorer is asked again about the first
completions; what it says must not have changed.

What a finding does is a setting, by the detector's name or for `all` of them: `warn` (say it, go on), `stop`, or
`off`.

```toml
guards = { sampler_gap = "stop", truncation = "off" }
```
```
lossmith train --guards.all warn --guards.entropy-collapse stop
```

`kl_budget` and `watch_window` ask for a stop of their own; `all` does not change that.

## The detectors

Thresholds stand beside their reasons in `src/lossmith/detectors/`."""


def page() -> str:
    """docs/doctor.md, but for what real runs said, which `benchmarks/doctor.py` appends."""
    caught = {name: found(name, SEEDS) for name in DETECTORS}
    alarms = {
        what: (runs, false_alarms([healthy(seed, steps, bf16).evidence() for seed in range(runs)]))
        for what, runs, steps, bf16 in HEALTHY
    }
    lines = [_INTRODUCTION]
    for family, detectors in FAMILIES.items():
        lines += ["", f"### {family}"]
        for detector in detectors:
            lines += ["", *_detector(detector, caught[detector.name])]
    return "\n".join([*lines, "", *_rates(caught, alarms)]) + "\n"


def _detector(detector: Detector, caught: Sequence[Finding | None]) -> list[str]:
    reads = (
        " and ".join(f"`{names.replace('|', '` or `')}`" for names in detector.reads) or "`summary.json`, the recipe"
    )
    source = f" ({detector.source})" if detector.source else ""
    example = next((f for f in caught if f is not None), None)
    lines = [
        f"**`{detector.name}`**: {detector.illness}{source}.",
        "",
        f"- fires: {detector.rule}",
        f"- reads: {reads}",
        f"- likely: {detector.cause}",
        f"- try: {detector.cure}",
    ]
    return lines + ([f'- says, of its fault: "{example.sentence}"'] if example else [])


def _rates(
    caught: dict[str, list[Finding | None]], alarms: dict[str, tuple[int, dict[str, list[Finding]]]]
) -> list[str]:
    """How often each is right, over made-up runs."""
    healthy_runs = ", ".join(f"{runs} of {what}" for what, runs, _, _ in HEALTHY)
    lines = [
        "## How often they are wrong",
        "",
        f"Made-up runs (`src/lossmith/detectors/faults.py`). Each detector is given its fault in {len(SEEDS)} seeds, "
        f"and must find it; and healthy runs, in which it must be silent: {healthy_runs}. A note is no false alarm; it "
        "says what is so. This page is written by `python -m lossmith.report.run.doctor_page`, and a test holds it to "
        "what the detectors do. [doctor-runs.md](doctor-runs.md) has real runs, of a tiny model.",
        "",
        f"| detector | fault found | {' | '.join(f'false warnings, {what}' for what in alarms)} | notes there |",
        f"|---|---|{'---|' * len(alarms)}---|",
    ]
    for name in DETECTORS:
        hits = sum(f is not None for f in caught[name])
        wrong = [[f for f in said[name] if f.level != "note"] for _, said in alarms.values()]
        notes = sum(len(said[name]) for _, said in alarms.values()) - sum(map(len, wrong))
        cells = [f"{len(w)} of {runs}" for w, (runs, _) in zip(wrong, alarms.values(), strict=True)]
        lines.append(f"| `{name}` | {hits} of {len(SEEDS)} | {' | '.join(cells)} | {notes or ''} |")
    runs = sum(n for n, _ in alarms.values())
    ill = len({(what, f) for what, (_, said) in alarms.items() for f in _ill(said)})
    missed = sum(f is None for faults in caught.values() for f in faults)
    tried = sum(map(len, caught.values()))
    most = share_of([0.0] * runs).high
    lines += [
        "",
        f"Missed: {missed} of {tried} faults. False warnings or stops: {ill} in {runs} healthy runs"
        + (f" (95%: at most {most:.1%} of such runs)." if not ill else "."),
    ]
    return lines


def _ill(said: dict[str, list[Finding]]) -> list[tuple[str, str]]:
    return [(name, f.sentence) for name, findings in said.items() for f in findings if f.level != "note"]


if __name__ == "__main__":
    print(page(), end="")
