"""A tracker is told what metrics.jsonl holds, and its failure costs no run."""

import json
import sys
import types

import pytest
from rich.console import Console

import lossmith as ls
import tiny
from lossmith.errors import RecipeError
from test_training import PROMPTS, even_bytes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients


def settings(tmp_path, **changes):
    base = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=2, scorer=even_bytes,
        steps=2, prompts_per_step=2, samples_per_prompt=2, max_tokens=6, runs=str(tmp_path), name="one",
    )  # fmt: skip
    return base | changes


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_what_metrics_jsonl_holds_through_a_resumption(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = ls.train(**settings(tmp_path, track="tensorboard"), quiet=True)
    run = ls.resume(run.folder.path, steps=3, console=Console(quiet=True), scorer=even_bytes, prompts=PROMPTS)
    there = events.EventAccumulator(str(run.folder.path / "tensorboard"))
    there.Reload()
    for name in ("reward", "grad_norm", "length"):
        shown = [(e.step, e.value) for e in there.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(run.folder.path)]
    after = there.Scalars("held_out/after/mean")[-1]
    assert (after.step, after.value) == (3, pytest.approx(run.summary["held_out"]["after"]["mean"], rel=1e-6))


class Failing(types.ModuleType):
    """A client whose server goes away after the first step."""

    def __init__(self):
        super().__init__("trackio")
        self.__spec__ = types.SimpleNamespace(name="trackio")
        self.told = []

    def init(self, **_):
        return self

    def log(self, figures, step):
        self.told.append(step)
        raise ConnectionError("the server is away")

    def finish(self):
        raise AssertionError("a client that was given up is left alone")


def test_a_tracker_that_fails_is_given_up_with_a_word_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", client := Failing())
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    from lossmith.api import run_recipe

    run = run_recipe(ls.Recipe.make(**settings(tmp_path, track="trackio")), console=console)
    console.file.close()
    text = console.export_text()
    assert client.told == [0] and len(lines(run.folder.path)) == 2
    assert text.count("trackio is told nothing more: it failed with ConnectionError: the server is away") == 1


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RecipeError, match="track = 'mlflow': the package mlflow is not installed"):
        ls.train(**settings(tmp_path, track="mlflow", model="no/such/folder"), quiet=True)


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_the_clients_themselves_are_told(name, tmp_path, monkeypatch):
    """Where they are installed; without a network."""
    client = pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    console = Console(record=True, width=200, stderr=True)
    from lossmith.api import run_recipe

    run_recipe(ls.Recipe.make(**settings(tmp_path, track=name)), console=console)
    assert "is told nothing more" not in console.export_text()
    if name == "mlflow":
        (found,) = client.search_runs(search_all_experiments=True, output_format="list")
        assert found.data.metrics["held_out.after.n"] == 2
