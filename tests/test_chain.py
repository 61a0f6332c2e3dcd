"""The whole chain from the shell, on the tiny model: prompts, output sets, judgements, reward model, policy."""

import json
import shutil

import pytest

import tiny
from lossmith.scorers import load_scorer
from shell import lossmith

SMALL = ("--model", tiny.folder(), "--device", "cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project after its first three steps, judged by a scorer that likes even bytes."""
    place = tmp_path_factory.mktemp("chain")
    (place / "p.txt").write_text("".join(f"Question {i}?\n" for i in range(24)))
    folder = place / "demo"
    lossmith("init", folder, "--prompts", place / "p.txt")
    lossmith("sample", folder / "prompts.jsonl", "--n", 4, "-o", folder / "outputs.jsonl", "--max-tokens", 10, *SMALL)
    (place / "judge.py").write_text(
        "def evens(completions, **_):\n"
        "    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]\n"
    )
    lossmith("annotate", folder / "outputs.jsonl", "--question", "ranking", "--judge", f"{place / 'judge.py'}:evens")
    return folder


def test_status_tells_each_step_and_the_next_command(project):
    said = lossmith("status", project).stdout
    assert "24 prompts" in said and "24 sets, 96 outputs" in said and "24 of 24 sets judged" in said
    assert "next: lossmith reward train" in said


def test_the_judgements_say_that_a_program_made_them(project):
    out = project.parent / "j.jsonl"
    lossmith("annotate", "--db", project / "judgements.db", "--export", out, "--form", "judgements")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and {row["source"] for row in rows if "source" in row} == {"scorer"}


def test_policy_learning_waits_for_the_frozen_reward_model_then_runs(project):
    train = (
        "train", "--prompts", project / "prompts.jsonl", "--scorer", project / "reward_model", "--runs",
        project / "runs", "--name", "first", "--steps", 3, "--prompts-per-step", 4, "--samples-per-prompt", 4,
        "--max-tokens", 10, "--held-out", 6, *SMALL,
    )  # fmt: skip
    assert "trained and frozen" in lossmith(*train, code=2).stderr

    lossmith("reward", "train", project / "judgements.db", "-o", project / "reward_model", *SMALL)
    manifest = json.loads((project / "reward_model" / "reward_model.json").read_text())
    assert manifest["trained"] and "accuracy" in json.dumps(manifest)

    assert manifest["held_out"]["accuracy"]["n"] == 5  # too few to tell it from a coin
    assert "too few to tell it from chance" in lossmith(*train, code=2).stderr
    assert "lossmith reward train" in lossmith("status", project).stdout.split("next:")[1]
    said = lossmith(*train, "--accept-weak-scorer").stdout
    assert "Too few held-out prompts (6) to say" in said
    summary = json.loads((project / "runs" / "first" / "summary.json").read_text())
    assert summary["held_out"]["preferred"]["n"] == 6


def test_a_reward_model_that_changed_after_training_scores_nothing(project):
    if not (project / "reward_model").exists():
        lossmith("reward", "train", project / "judgements.db", "-o", project / "reward_model", *SMALL)
    copy = project.parent / "changed"
    shutil.copytree(project / "reward_model", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(Exception, match=r"config\.json"):
        load_scorer(str(copy))


def test_a_policy_is_learned_straight_from_the_judgements(project):
    said = lossmith(
        "prefer", project / "judgements.db", "--loss", "dpo", "--runs", project / "runs", "--name", "straight",
        "--epochs", 1, *SMALL,
    )  # fmt: skip
    assert "with the tokens that were judged" in said.stdout and "Held-out" in said.stdout
    assert (project / "runs" / "straight" / "policy" / "config.json").exists()
