"""What the installed libraries do otherwise than the presets and the configuration readers say: for a weekly job.

    tests/live/setup --newest .venv-newest && .venv-newest/bin/python tests/live/drift.py

Prints versions, defaults that changed, settings that came or went, and each compared function whose numbers are no
longer ours, with the loss and the largest difference. Exit status: 0 if nothing but versions changed, else 1.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from live_case import MODULES, PACKAGES, Case, installed, lossmith, their_ways, unsupported, version
from live_draws import draw

SEEDS = range(4)


def changed_defaults(trainer: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """A line for each default that differs, or is gone. here: as the reader has them; there: the library's."""
    for name, value in here.items():
        if name not in there:
            yield f"{trainer}: the setting {name} is gone (its default was {value!r})"
        elif there[name] != value:
            yield f"{trainer}: {name} is {there[name]!r} by default, and {value!r} here"


def new_settings(trainer: str, known: set[str], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - known):
        yield f"{trainer}: there is a new setting {name} (default {there[name]!r}): is it of the loss?"


def of_trl() -> Iterator[str]:
    import live_configurations as live
    from lossmith.adapters.configurations import trl

    there = {field.name: field.default for field in dataclasses.fields(live.trl_config())}
    yield from changed_defaults("TRL", trl.DEFAULTS, there)
    yield from new_settings("TRL", trl.DEFAULTS.keys() | trl.ELSEWHERE, there)


def of_verl() -> Iterator[str]:
    from omegaconf import OmegaConf

    import live_verl_run
    from lossmith.adapters.configurations import verl

    there = flat(OmegaConf.to_container(live_verl_run.composed({}), resolve=True))
    # of its dataclass alone, and the actor's, which its critic has too
    absent = {name for name in verl.DEFAULTS if "gdpo_reward" in name or name.startswith("critic.loss")}
    yield from changed_defaults("verl", {k: v for k, v in verl.DEFAULTS.items() if k not in absent}, there)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings and tables of settings, each by its name with dots."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found[f"{above}{name}"] = value
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}.")
    return found


def of_numbers(case: Case) -> Iterator[str]:
    """At most one line: what the library's function gives now, against ours and against what it gave."""
    stored = case.stored[0]
    gaps: dict[str, float] = {}
    try:
        for seed in SEEDS:
            fields, params = draw(case, seed)
            if unsupported(case.loss, params, fields):
                continue
            with their_ways():
                theirs = case.call(fields, params)
            ours = lossmith(case.loss, fields, params)
            for key, value in theirs.items():
                mine, value = ours[key].detach().double(), torch.as_tensor(value).detach().double()
                if value.ndim == 2:
                    mine, value = (torch.where(fields["mask"], x, 0.0) for x in (mine, value))
                beyond = (mine - value).abs() - stored["rtol"] * value.abs()
                gaps[key] = max(gaps.get(key, 0.0), float(beyond.max()))
    except Exception as error:  # whatever a library that has changed may raise is what is reported
        yield f"{case}: {case.loss}: cannot be called as {stored['version']} was: {type(error).__name__}: {error}"
        return
    far = {key: gap for key, gap in gaps.items() if not gap <= stored["atol"]}
    if far:
        told = ", ".join(f"{key} by {gap:.2g}" for key, gap in far.items())
        yield f"{case}: {case.loss}: its numbers are no longer those of {stored['version']}: {told}"


def main() -> int:
    import live_liger
    import live_rlax
    import live_trl
    import live_verl
    import live_verl_advantages

    cases = [*live_trl.CASES, *live_verl.CASES, *live_verl_advantages.CASES, *live_liger.CASES, *live_rlax.CASES]
    there = [library for library in MODULES if installed(library)]
    for library in MODULES:
        stored = sorted({case.stored[0]["version"] for case in cases if case.library == library})
        now = version(library) if library in there else "not installed, and not compared"
        print(f"{PACKAGES[library]}: presets of {', '.join(stored)}; installed: {now}")
    compared = [case for case in cases if case.library in there]
    readers = [of for library, of in (("trl", of_trl), ("verl", of_verl)) if library in there]
    changes = [line for of in readers for line in of()] + [line for case in compared for line in of_numbers(case)]
    print(*changes, sep="\n", end="\n" if changes else "")
    print(
        f"{len(changes)} changes; compared: {len(compared)} functions on {len(SEEDS)} random inputs each, and the "
        f"defaults of {len(readers)} configurations"
    )
    return bool(changes) or not there


if __name__ == "__main__":
    sys.exit(main())
