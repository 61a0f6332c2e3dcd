"""Do the tests of the losses notice when a loss is wrong? Each mutant is one small, known mistake.

    python tests/mutation/mutants.py                  every mutant, two at a time
    python tests/mutation/mutants.py --only clip_sides_swapped --only k3_sign
    python tests/mutation/mutants.py --list
    python tests/mutation/mutants.py --tests tests/test_parity.py tests/test_loss_kl.py

For each mutant `src` is copied to a temporary folder, one text of one file is replaced there (it must be found exactly
once, so that a mutant never goes stale in silence), and pytest runs on the tests of the losses with the copy first on
PYTHONPATH. A mutant that some test fails on is killed; one that passes them all has survived, and says which test is
missing. The unchanged copy runs first and must pass. Nothing in the working tree is ever edited.

Exit code 0: all killed. 1: some survived or ran out of time. 2: the check itself is broken.
The mutants stand in `of_credit.py`, `of_objective.py` and `of_whole.py`, each as (name, file under
src/lossmith/losses, old text, new text, why it is wrong).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from of_credit import CREDIT
from of_objective import OBJECTIVE
from of_whole import WHOLE

ROOT = Path(__file__).resolve().parents[2]
LOSSES = "src/lossmith/losses"
# cheap ones first: most mutants never see the rest
FIRST = (
    "parity",
    "catalogue",
    "loss_numbers",
    "loss_kl",
    "loss_advantages",
    "loss_exact",
    "loss_contract",
    "loss_invariance",
)


class BrokenCheckError(Exception):
    """The check cannot say anything: a stale mutant, a wrong package, tests that fail without a mutant."""


@dataclass(frozen=True)
class Mutant:
    """One wrong edit of one file."""

    name: str
    file: str
    old: str
    new: str
    why: str

    def apply(self, root: Path) -> None:
        """Edit the copy below this folder."""
        path = root / LOSSES / self.file
        text = path.read_text()
        found = text.count(self.old)
        if found != 1:
            raise BrokenCheckError(f"{self.name}: {self.file} holds the text {self.old!r} {found} times, not once.")
        changed = text.replace(self.old, self.new)
        try:
            compile(changed, str(path), "exec")
        except SyntaxError as error:
            raise BrokenCheckError(f"{self.name}: the mutant is no Python: {error}.") from error
        path.write_text(changed)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, survived, or out of time."""

    name: str
    outcome: str
    by: str
    seconds: float


MUTANTS = [Mutant(*row) for row in (*CREDIT, *OBJECTIVE, *WHOLE)]


def default_tests() -> list[str]:
    """Every test file of the losses that exists, cheap ones first."""
    known = [f"tests/test_{name}.py" for name in FIRST]
    found = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/test_loss_*.py"))]
    found += [
        f"tests/test_{name}.py"
        for name in ("parity", "catalogue", "proofs")
        if (ROOT / f"tests/test_{name}.py").exists()
    ]
    return sorted(found, key=lambda f: known.index(f) if f in known else len(known))


def judge(mutant: Mutant | None, tests: list[str], limit: float) -> Verdict:
    """Run the tests on a copy with this mutant, or on an unchanged one."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            mutant.apply(copy)
        name = mutant.name if mutant is not None else "unchanged"
        env = _environment(copy)
        _check_import(name, copy, env)
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
        try:
            done = _run([sys.executable, "-m", "pytest", *options], env, limit)
        except subprocess.TimeoutExpired:
            return Verdict(name, "out of time", f"{limit:g} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return Verdict(name, "survived", "", seconds)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not failed:
        raise BrokenCheckError(
            f"{name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return Verdict(name, "killed", failed[0], seconds)


def _environment(copy: Path) -> dict[str, str]:
    env = dict(os.environ, PYTHONPATH=str(copy / "src"), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    # a failing example of one mutant must not be replayed for another
    return env | {"HYPOTHESIS_STORAGE_DIRECTORY": str(copy / "hypothesis")}


def _check_import(name: str, copy: Path, env: dict[str, str]) -> None:
    """The copy is what Python imports, an installed package notwithstanding, and it can be imported."""
    code = "import lossmith, lossmith.losses as losses; print(lossmith.__file__); print(losses.__file__)"
    done = _run([sys.executable, "-c", code], env, 120)
    if done.returncode != 0:
        raise BrokenCheckError(f"{name}: the package cannot be imported:\n{done.stderr[-2000:]}")
    for file in done.stdout.split():
        if not Path(file).resolve().is_relative_to(copy.resolve()):
            raise BrokenCheckError(f"{name}: Python imports {file}, not the copy in {copy}.")


def _run(command: list[str], env: dict[str, str], limit: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit, check=False)


def check_all(mutants: list[Mutant], tests: list[str], jobs: int, limit: float) -> list[Verdict]:
    """Judge them all, and print each verdict as it comes."""
    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(lambda m: judge(m, tests, limit), mutants):
            verdicts.append(verdict)
            print(f"{verdict.outcome:12}{verdict.seconds:6.0f} s  {verdict.name:36} {verdict.by}", flush=True)
    return verdicts


def check_stale(mutants: list[Mutant]) -> None:
    """Every mutant finds its text, before any time is spent."""
    if len({m.name for m in mutants}) != len(mutants):
        raise BrokenCheckError("Two mutants have the same name.")
    stale = []
    for mutant in mutants:
        found = (ROOT / LOSSES / mutant.file).read_text().count(mutant.old)
        if found != 1:
            stale.append(f"{mutant.name}: {mutant.file} holds {mutant.old!r} {found} times, not once.")
    if stale:
        raise BrokenCheckError("\n".join(stale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant; may be given several times")
    parser.add_argument("--list", action="store_true", help="name every mutant and say why it is wrong")
    parser.add_argument("--tests", nargs="+", default=None, metavar="FILE", help="test files instead of all of them")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one mutant")
    options = parser.parse_args()
    known = {m.name: m for m in MUTANTS}
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"no mutant {', '.join(sorted(unknown))}; --list names them all")
    mutants = [known[name] for name in options.only] if options.only else MUTANTS
    if options.list:
        for m in mutants:
            print(f"{m.name:36} {m.file:26} {m.why}")
        return 0
    tests = options.tests or default_tests()
    try:
        check_stale(MUTANTS)
        unchanged = judge(None, tests, options.limit)
        if unchanged.outcome != "survived":
            raise BrokenCheckError(f"The tests fail without a mutant: {unchanged.outcome}, {unchanged.by}")
        verdicts = check_all(mutants, tests, options.jobs, options.limit)
    except BrokenCheckError as error:
        print(error, file=sys.stderr)
        return 2
    alive = [v.name for v in verdicts if v.outcome != "killed"]
    print(
        f"{len(verdicts) - len(alive)} of {len(verdicts)} killed"
        + (f"; not killed: {', '.join(alive)}" if alive else "")
    )
    for name in alive:
        print(f"  {name}: {known[name].why}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
