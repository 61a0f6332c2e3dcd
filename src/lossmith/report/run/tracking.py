"""A run's figures in a tracker as well: TensorBoard files, or trackio, wandb, mlflow through their own clients.

metrics.jsonl stays the record. A tracker that fails, as one whose server is away, is given up with a word, and the run
goes on without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console

from lossmith.errors import RecipeError
from lossmith.training.keeping import Keeping

__all__ = ["Tracking", "check_tracker"]

_PROJECT = "lossmith"  # what a service files its runs under, where its own variable names nothing else


class _Client(Protocol):
    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUNS` shows every run in RUNS."""

    def __init__(self, run: Keeping) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = str(run.folder.path / "tensorboard")
        self.writer: Any = SummaryWriter(place, purge_step=run.first_step or None)
        self.writer.add_text("recipe", "\n".join(f"    {k} = {v!r}" for k, v in run.recipe.written().items()))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that is killed has shown what it measured

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """wandb, and trackio, which has the same functions."""

    def __init__(self, run: Keeping, name: str) -> None:
        module = importlib.import_module(name)
        named = run.folder.path.name
        same = {"id": named, "dir": str(run.folder.path)} if name == "wandb" else {}
        self.run: Any = module.init(project=_PROJECT, name=named, config=run.recipe.written(), resume="allow", **same)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, run: Keeping) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        self.mlflow.set_experiment(_PROJECT)
        named = run.folder.path.name
        known = self.mlflow.search_runs(
            filter_string=f"attributes.run_name = '{named}'", max_results=1, output_format="list"
        )
        same = {"run_id": known[0].info.run_id} if known and run.first_step else {}
        self.mlflow.start_run(**(same or {"run_name": named}))
        if not same:
            self.mlflow.log_params({name: str(value)[:500] for name, value in run.recipe.written().items()})

    def log(self, step: int, figures: dict[str, float]) -> None:
        # where it writes files, "completions" cannot be a figure and the folder of "completions/mean_length"
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


# By the recipe's word: what has to be installed, and how it is opened.
_TRACKERS: dict[str, tuple[str, Callable[[Keeping], _Client]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "trackio": ("trackio", lambda run: _Wandb(run, "trackio")),
    "wandb": ("wandb", lambda run: _Wandb(run, "wandb")),
    "mlflow": ("mlflow", _MLflow),
}


def check_tracker(name: str | None) -> None:
    """RecipeError, before the model is loaded: the tracker that a recipe names is not installed."""
    if name is not None and importlib.util.find_spec(_TRACKERS[name][0]) is None:
        raise RecipeError(f"track = {name!r}: the package {name} is not installed. pip install {name}")


class Tracking:
    """What a run's tracker is told; nothing where the recipe names none. A `with` block closes it, however it ends."""

    def __init__(self, run: Keeping, console: Console) -> None:
        self.run, self.console = run, console
        self.client: _Client | None = None
        if run.recipe.track is not None:
            self._try(self._open)

    def _open(self) -> None:
        self.client = _TRACKERS[self.run.recipe.track][1](self.run)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        if (client := self.client) is not None:
            self._try(client.close)

    def step(self, record: Mapping[str, Any]) -> None:
        """The figures of a step, as its line in metrics.jsonl has them."""
        self._log(record["step"], {name: x for name, x in record.items() if name != "step"})

    def end(self, held_out: Mapping[str, Any]) -> None:
        """The held-out figures of the whole run, at its last step."""
        self._log(self.run.steps, dict(_flat("held_out", held_out)))

    def _log(self, step: int, figures: Mapping[str, Any]) -> None:
        if (client := self.client) is not None:
            numbers = {k: float(x) for k, x in figures.items() if isinstance(x, int | float) and math.isfinite(x)}
            self._try(lambda: client.log(step, numbers))

    def _try(self, call: Callable[[], None]) -> None:
        """A client's failure, of whatever kind, is no reason to lose a run."""
        try:
            call()
        except Exception as error:
            self.client = None
            name = self.run.recipe.track
            self.console.print(
                f"note      {name} is told nothing more: it failed with {type(error).__name__}: {error}. The run goes "
                "on, and metrics.jsonl has every figure.",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}/{name}", value)
        else:
            yield f"{prefix}/{name}", value
