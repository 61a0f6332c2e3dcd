"""A project: the folder of one chain from prompts to a policy, which knows where it stands.

| step     | what it leaves            | what it needs before it                   |
|----------|---------------------------|-------------------------------------------|
| prompts  | prompts.jsonl             |                                           |
| sample   | outputs.jsonl             | prompts                                   |
| annotate | judgements.db             | output sets: there is nothing else to judge |
| reward   | reward_model/, frozen     | judgements                                |
| policy   | runs/NAME/policy/         | a reward model that was trained           |

Where it stands is read from the files, never from a note about them. A command that names a file of a project is
refused when it comes too early, with the reason and the next command.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from lossmith.errors import StageError
from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.output_set import OutputSet, read_sets, write_rows
from lossmith.feedback.store import Store
from lossmith.files import at_home, check_writable, write_atomically
from lossmith.intervals import doubt, in_words
from lossmith.prompts import default_prompts_path, load_prompts, plain, prompt_content, read_rows
from lossmith.training.recipe import Recipe

__all__ = ["MARK", "Project", "Stage", "Step", "check_order", "check_recipe_order"]

MARK = "lossmith.toml"
Step = Literal["prompts", "sample", "annotate", "reward", "policy"]


@dataclass(frozen=True)
class Stage:
    """One step of the chain: whether it is done, what there is of it, and the command that does it."""

    step: Step
    done: bool
    summary: str
    command: str
    problem: str = ""  # something that stops the next step, or makes this one outdated
    advice: str = ""  # what to do about a step that is done, but that the next ones should not be built on


class Project:
    """The folder of a project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts = folder / "prompts.jsonl"
        self.outputs = folder / "outputs.jsonl"
        self.judgements = folder / "judgements.db"
        self.reward_model = folder / "reward_model"
        self.runs = folder / "runs"
        self.prompts_summary = ""  # set by `create`

    @classmethod
    def create(cls, folder: Path, prompts: str, **reading: Any) -> Project:
        """A new project around a copy of these prompts. StageError where the folder is one already, or cannot be one.

        A folder that was made here does not stay behind when something fails.
        """
        folder = at_home(folder, StageError)
        if folder.exists() and not folder.is_dir():
            raise StageError(f"{str(folder)!r} is a file, and a project is a folder. Choose another name.")
        if (folder / MARK).exists():
            raise StageError(f"{folder} is a project already. See where it stands: lossmith status {_quoted(folder)}")
        chosen = load_prompts(default_prompts_path() if prompts == "default" else prompts, **reading)
        rows = [{**plain(p.columns), "prompt": prompt_content(p)} for p in chosen]  # before anything is made
        project, made_here = cls(folder), not folder.exists()
        try:
            check_writable(project.prompts, StageError, new=True)
            write_rows(project.prompts, rows)
            write_atomically(folder / MARK, tomli_w.dumps({"source": str(prompts), "prompts": len(rows)}))
        except BaseException:
            if made_here:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        project.prompts_summary = chosen.summary()
        return project

    @classmethod
    def around(cls, path: str | Path) -> Project | None:
        """The project that a path lies in, if it lies in one."""
        place = at_home(path, StageError).absolute()
        root = next((folder for folder in (place, *place.parents) if (folder / MARK).is_file()), None)
        return None if root is None else cls(_relative(root))

    def stages(self) -> list[Stage]:
        """All five, in order."""
        return list(self._stages())

    def _stages(self) -> Iterator[Stage]:
        q = {
            name: _quoted(getattr(self, name)) for name in ("prompts", "outputs", "judgements", "reward_model", "runs")
        }
        prompts = load_prompts(self.prompts, pass_columns=_columns(self.prompts)) if self.prompts.exists() else None
        count = 0 if prompts is None else len(prompts)
        yield Stage("prompts", count > 0, f"{count} prompts", f"lossmith init {_quoted(self.folder)}")

        sets = read_sets(self.outputs) if self.outputs.exists() else []
        summary, problem = _describe_sets(sets, {p.content_id for p in prompts or ()})
        yield Stage("sample", bool(sets), summary, f"lossmith sample {q['prompts']} --n 4 -o {q['outputs']}", problem)

        summary, judged = self._describe_judgements(sets)
        yield Stage(
            "annotate", judged > 0, summary, f"lossmith annotate {q['outputs']} --db {q['judgements']}",
        )  # fmt: skip

        manifest = self.manifest()
        summary, problem = ("none", "") if manifest is None else _describe_model(manifest)
        advice = ""
        if problem:
            advice = (
                f"judge more: lossmith annotate {q['outputs']} --db {q['judgements']}; then put {q['reward_model']} "
                f"aside and train it again: lossmith reward train {q['judgements']} -o {q['reward_model']}"
            )
        if manifest is None and self.reward_model.exists():
            problem = f"{self.reward_model} holds a model that was not trained by `lossmith reward train`"
        yield Stage(
            "reward", manifest is not None, summary,
            f"lossmith reward train {q['judgements']} -o {q['reward_model']}", problem, advice,
        )  # fmt: skip

        runs = self._policies()
        command = f"lossmith train --prompts {q['prompts']} --scorer {q['reward_model']} --runs {q['runs']}"
        runs_text = f"{len(runs)} run{'s' * (len(runs) != 1)}" + (f", the last: {runs[-1]}" if runs else "")
        yield Stage("policy", bool(runs), runs_text, command)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest that reward training wrote of its model; None where no model was trained."""
        try:
            manifest = json.loads((self.reward_model / "reward_model.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def _describe_judgements(self, sets: list[OutputSet]) -> tuple[str, int]:
        if not self.judgements.exists():
            return "none", 0
        with Store(self.judgements, create=False) as store:
            judgements = [j for j in effective_judgements(store.judgements()) if j.kind not in ("skip", "flag")]
        people = sorted({j.annotator for j in judgements})
        covered = len({j.set_id for j in judgements} & {s.id for s in sets})
        who = f" by {', '.join(people[:3])}{', ...' if len(people) > 3 else ''}" if people else ""
        return f"{len(judgements)} judgements{who}; {covered} of {len(sets)} sets judged", len(judgements)

    def _policies(self) -> list[str]:
        done = sorted(self.runs.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
        return [path.parent.name for path in done if (path.parent / "policy").is_dir()]

    def next_stage(self) -> Stage | None:
        """The first step that is not done, or that should be done again before the next."""
        return next((stage for stage in self._stages() if not stage.done or stage.advice), None)

    def require(self, step: Step) -> None:
        """StageError unless every step before this one is done."""
        for stage in self._stages():
            if stage.step == step:
                return
            if not stage.done:
                raise StageError(
                    f"{_TOO_EARLY[step]}: project {str(self.folder)!r} has {_MISSING[stage.step]}"
                    f"{'. ' + stage.problem if stage.problem else ''}. Next: {stage.command}"
                )


_TOO_EARLY = {
    "prompts": "",
    "sample": "sampling comes after the prompts",
    "annotate": "annotation comes after sampling",
    "reward": "a reward model is trained after annotation",
    "policy": "the policy learns from a reward model that was trained and frozen",
}
_MISSING = {
    "prompts": "no prompts",
    "sample": "no output sets yet",
    "annotate": "no judgement yet",
    "reward": "no trained reward model yet",
    "policy": "",
}


def check_order(step: Step, *paths: Any) -> None:
    """StageError if any of the paths lies in a project in which this step comes too early. Other things pass."""
    for path in paths:
        if isinstance(path, str | Path) and str(path) != "default":
            project = Project.around(path)
            if project is not None:
                project.require(step)


def check_recipe_order(recipe: Recipe) -> None:
    """StageError where a recipe would learn from a project's reward model before there is one."""
    scorer = recipe.scorer
    for path in scorer.values() if isinstance(scorer, dict) else [scorer]:
        for one in path if isinstance(path, list) else [path]:
            if isinstance(one, str | Path) and "://" not in str(one):
                project = Project.around(one)
                if project is not None and Path(one).absolute() == project.reward_model.absolute():
                    project.require("policy")


def _describe_sets(sets: list[OutputSet], known: set[str]) -> tuple[str, str]:
    outputs = sum(len(s.outputs) for s in sets)
    near_duplicates = sum(s.near_duplicates for s in sets)
    models = sorted({str(s.provenance.get("model", "unknown")) for s in sets})
    text = f"{len(sets)} sets, {outputs} outputs" + (f" of {', '.join(models)}" if models else "")
    unknown = sum(s.prompt.content_id not in known for s in sets)
    problem = f"{unknown} sets are of prompts that prompts.jsonl does not hold" if unknown else ""
    return text + (f", {near_duplicates} near-duplicates" if near_duplicates else ""), problem


def _describe_model(manifest: dict[str, Any]) -> tuple[str, str]:
    """(its held-out accuracy, why it is not known to be better than chance)."""
    held_out = manifest.get("held_out", {})
    accuracy = held_out.get("accuracy") if isinstance(held_out, dict) else None
    row = accuracy if isinstance(accuracy, dict) else {"mean": accuracy}
    text = "trained and frozen"
    if isinstance(row.get("mean"), float):
        details = [f"95% {in_words(row, '.2f')}"] if row.get("ci95_low") is not None else []
        details += [f"{row['n']} prompts"] if "n" in row else []
        text += f", held-out accuracy {row['mean']:.2f}" + (f" ({', '.join(details)})" if details else "")
    return text, doubt(accuracy)


def _columns(path: Path) -> tuple[str, ...]:
    """All columns of a project's own prompts file: what was let in when it was made stays let in."""
    rows = (row for _, row in read_rows(path) if isinstance(row, Mapping))  # of any other it is said when it is read
    return tuple({key for row in rows for key in row} - {"prompt"})


def _relative(path: Path) -> Path:
    """As a person would type it from here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
