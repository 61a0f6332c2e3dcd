"""`prefer`, `reward train` and `sample` survive a kill and a signal, and go on as if they had not been stopped."""

import json
import os
import random
import signal
import sys

import pytest
import torch

import tiny
from lossmith.api import resume
from lossmith.cli import app, main
from lossmith.errors import FinishedError, LossmithError, RecipeError, RunError
from lossmith.feedback.output_set import named
from lossmith.feedback.partial_sets import PartialSets
from lossmith.feedback.preferences import Label, Pair, write_preferences
from lossmith.scorers.seal import MANIFEST
from lossmith.training.offline.loop import (
    PreferenceRecipe,
    learn_preferences,
    open_preferences,
    plan_preferences,
    resume_preferences,
)
from lossmith.training.run import RunFolder


def command(*words):
    """What the shell would do."""
    return app([str(word) for word in words], result_action="return_value")


def text(rng, letters):
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 7)))


def pairs(count=12, seed=0):
    rng = random.Random(seed)
    prompts = tiny.prompts(*(f"question {k}?" for k in range(count)))
    return [Pair(p, named(p, text(rng, "abcde")), named(p, text(rng, "vwxyz"))) for p in prompts]


@pytest.fixture
def file(tmp_path):
    write_preferences(tmp_path / "pairs.jsonl", pairs())
    return tmp_path / "pairs.jsonl"


# -- prefer -----------------------------------------------------------------------------------------------------------


def recipe(file, runs, **changes):
    base = dict(
        preferences=str(file), model=str(tiny.folder()), device="cpu", dtype="float32", held_out=4, epochs=2,
        preferences_per_step=3, learning_rate=1e-3, runs=str(runs), name="run", checkpoint_every=2,
        checkpoint_minutes=0,
    )  # fmt: skip
    return PreferenceRecipe.make(**base | changes)


def whole(file, runs, **changes):
    """A run that nothing interrupts."""
    run = open_preferences(plan_preferences(recipe(file, runs, **changes)))
    return ended(run)


def ended(run):
    for _ in learn_preferences(run):
        pass
    run.finish()
    run.close()
    return run.folder.path


def begun(file, runs, steps, **changes):
    """The folder of a run that was killed after so many steps."""
    run = open_preferences(plan_preferences(recipe(file, runs, **changes)))
    for step in learn_preferences(run) if steps else ():
        if step.index + 1 == steps:
            break
    run.close()
    return run.folder.path


def result(folder):
    """What must be equal to the bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return records, {key: value for key, value in summary.items() if key != "seconds"}


@pytest.mark.parametrize(("loss", "steps"), [("dpo", 0), ("dpo", 1), ("kto", 5), ("dpo(beta=0.3)", 6)])
def test_preferences_that_were_killed_end_equal_to_the_bit(file, tmp_path, loss, steps):
    if loss == "kto":  # whose weights the data decide
        write_preferences(
            file, [Label(p.prompt, o, g) for p in pairs() for o, g in ((p.chosen, True), (p.rejected, False))]
        )
    wanted = result(whole(file, tmp_path / "whole", loss=loss))
    folder = begun(file, tmp_path / "broken", steps, loss=loss)
    run = resume_preferences(folder)
    assert run.going_on.checkpoint is None if steps < 2 else run.going_on.checkpoint.step == steps - steps % 2
    assert result(ended(run)) == wanted
    with pytest.raises(FinishedError, match=r"is finished \(\d+ steps\).*policy"):
        resume_preferences(folder)


def test_a_signal_saves_and_names_the_command_that_goes_on(file, tmp_path, monkeypatch, capsys):
    wanted = result(whole(file, tmp_path / "whole"))
    true = RunFolder.add_metrics

    def signalling(folder, record):
        os.kill(os.getpid(), signal.SIGTERM)
        return true(folder, record)

    monkeypatch.setattr(RunFolder, "add_metrics", signalling)
    words = ["prefer", file, "--model", tiny.folder(), "--device", "cpu", "--dtype", "float32", "--held-out", "4"]
    words += ["--epochs", "2", "--preferences-per-step", "3", "--learning-rate", "1e-3", "--runs", tmp_path]
    left = {}
    monkeypatch.setattr("lossmith.cli._leave", lambda code: left.update(code=code))
    monkeypatch.setattr(sys, "argv", ["lossmith", *map(str, words), "--name", "run"])
    main()
    said = capsys.readouterr().err
    folder = tmp_path / "run"
    assert left["code"] == 128 + signal.SIGTERM
    assert f"saved after step 1 of 6. Go on with: lossmith prefer --resume {folder}" in said
    monkeypatch.undo()
    command("prefer", "--resume", folder)
    assert result(folder) == wanted
    capsys.readouterr()
    command("prefer", "--resume", folder)
    assert "is finished (6 steps)" in " ".join(capsys.readouterr().out.split())


def test_each_command_sends_to_the_other_for_its_runs(file, tmp_path):
    folder = begun(file, tmp_path, 1)
    with pytest.raises(RunError, match=r"a run of `lossmith prefer`.*lossmith prefer --resume"):
        resume(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.toml").write_text('prompts = "default"\n')
    with pytest.raises(RunError, match=r"a run of `lossmith train`.*lossmith train --resume"):
        command("prefer", "--resume", tmp_path / "other")
    with pytest.raises(RunError, match=r"go on with it: lossmith prefer --resume .*run'?$"):
        open_preferences(plan_preferences(recipe(file, tmp_path)))
    with pytest.raises(RecipeError, match="only --accept-changes"):
        command("prefer", "--resume", folder, "--epochs", "3")
    with pytest.raises(RecipeError, match="goes with --resume"):
        command("prefer", file, "--accept-changes")


def test_what_decided_a_run_on_preferences_is_named_when_it_changed(file, tmp_path, monkeypatch):
    folder = begun(file, tmp_path, 2)
    toml = (folder / "recipe.toml").read_text()

    def refused(words, **fields):
        with pytest.raises(LossmithError, match=words):
            resume_preferences(folder, **fields)

    write_preferences(file, [*pairs()[:-1], Pair(pairs()[-1].prompt, pairs()[-1].chosen, pairs(13)[-1].chosen)])
    refused(r"has changed since it began: the preferences: 12 pairs \w+ -> 12 pairs \w+;.*prefer --resume \S+ --accept")
    write_preferences(file, pairs(2))
    refused("held-out prompts are there no more")
    write_preferences(file, pairs())
    (folder / "recipe.toml").write_text(toml.replace("learning_rate = 0.001", "learning_rate = 0.1"))
    refused(r"learning_rate: 0\.001 -> 0\.1")
    (folder / "recipe.toml").write_text(toml.replace('"dpo"', '"ipo"'))
    refused(r"loss: dpo -> ipo")
    run = resume_preferences(folder, accept_changes=True)
    assert run.going_on.checkpoint.step == 2 and run.learner.loss.name == "ipo"
    ended(run)
    assert json.loads((folder / "summary.json").read_text())["accepted_changes"] == ["loss: dpo -> ipo"]


def test_live_preferences_are_given_again(tmp_path):
    run = open_preferences(plan_preferences(recipe("x", tmp_path).model_copy(update={"preferences": pairs()})))
    folder = run.folder.path
    run.close()
    with pytest.raises(RecipeError, match=r"preferences was a Python object.*resume_preferences\("):
        resume_preferences(folder)
    ended(resume_preferences(folder, preferences=pairs()))
    assert (folder / "policy" / "model.safetensors").exists()


# -- sample -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Seven prompts, sampled two at a time, and the words of a command that samples them."""
    monkeypatch.setattr("lossmith.feedback.partial_sets.TOGETHER", 4)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {k}?"}) + "\n" for k in range(7)))
    words = ["sample", tmp_path / "prompts.jsonl", "--n", 2, "--max-tokens", 5, "--device", "cpu", "--dtype", "float32"]
    return [*words, "--model", tiny.folder()]


class Broken(Exception):
    """Whatever ends the work."""


def breaking(monkeypatch, after, act):
    """`act` once so many parts are in the file."""
    true = PartialSets.add

    def add(file, part):
        true(file, part)
        if len(file.parts) == after:
            act()

    monkeypatch.setattr(PartialSets, "add", add)
    return lambda: monkeypatch.setattr(PartialSets, "add", true)


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("more", [[], ["--best-by", "length"]])
def test_sampling_that_broke_goes_on_and_writes_the_same_bytes(asked, tmp_path, monkeypatch, capsys, more):
    command(*asked, *more, "-o", tmp_path / "whole.jsonl")
    told = capsys.readouterr().err
    mend = breaking(monkeypatch, 2, raising(Broken()))
    with pytest.raises(Broken) as caught:
        command(*asked, *more, "-o", tmp_path / "out.jsonl")
    partial = tmp_path / "out.jsonl.partial"
    assert f"4 of 7 prompts are in {partial}. The same command again" in caught.value.__notes__[0]
    assert len(partial.read_text().splitlines()) == 3 and not (tmp_path / "out.jsonl").exists()
    with partial.open("a") as torn:
        torn.write('{"sets": [{"set')
    mend()
    capsys.readouterr()
    command(*asked, *more, "-o", tmp_path / "out.jsonl")
    said = capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists() and "4 of 7 prompts are in" in " ".join(said.split())
    assert said.splitlines()[-1] == told.splitlines()[-1]  # what is said of all sets is said of all


def test_a_signal_while_sampling_says_how_to_go_on(asked, tmp_path, monkeypatch):
    breaking(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        command(*asked, "-o", tmp_path / "out.jsonl")
    assert "2 of 7 prompts are in" in caught.value.__notes__[0]


def test_another_command_does_not_go_on_with_what_was_sampled(asked, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    mend = breaking(monkeypatch, 2, raising(Broken()))
    with pytest.raises(Broken):
        command(*asked, "-o", out)
    mend()
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    for more, said in ((["--temperature", "0.5"], r"temperature: 1\.0 -> 0\.5"), (["--seed", "3"], "seed: 0 -> 3")):
        with pytest.raises(RunError, match=rf"out\.jsonl\.partial' holds what was sampled already.*{said}.*delete it"):
            command(*asked, *more, "-o", out)
    with pytest.raises(RunError, match=r"the prompts: 7 prompts \w+ -> 6 prompts"):
        command(*asked, "--limit", "6", "-o", out)
    with pytest.raises(RunError, match="the model's weights"):
        command(*asked[:-1], tiny.folder("gpt2"), "-o", out)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
    (tmp_path / "mine.jsonl.partial").write_text("dear to somebody\n")
    with pytest.raises(RunError, match="is not what `lossmith sample` leaves"):
        command(*asked, "-o", tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl.partial").read_text() == "dear to somebody\n"


# -- reward train -----------------------------------------------------------------------------------------------------


def reward_words(file, out, *more):
    words = ["reward", "train", file, "-o", out, "--model", tiny.folder(), "--device", "cpu", "--dtype", "float32"]
    return [*words, "--epochs", 2, "--comparisons-per-step", 3, "--learning-rate", "1e-3", *more]


def learned(folder):
    """What must be equal to the bit."""
    found = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".svg"
    }
    for name in [name for name in found if name.endswith(MANIFEST)]:
        told = json.loads(found[name])
        hashes = {} if "ensemble" in told else told["files"]  # those of an ensemble are of files that hold the time
        found[name] = told | {"time": "", "files": hashes}
    return found


def hit(monkeypatch, at, act):
    """`act` in the midst of the optimizer's step number `at`, of whichever member."""
    true, calls = torch.optim.AdamW.step, []

    def step(self, *arguments, **named_ones):
        calls.append(1)
        if len(calls) == at:
            act()
        return true(self, *arguments, **named_ones)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return lambda: monkeypatch.setattr(torch.optim.AdamW, "step", true)


@pytest.mark.parametrize(("more", "at", "said"), [
    ([], 4, "saved after step 4 of 6"),
    (["--ensemble", 2, "--train-layers", 1], 9, "saved after step 3 of 6 of member 2"),
])  # fmt: skip
def test_a_reward_model_that_was_stopped_ends_equal_to_the_bit(file, tmp_path, monkeypatch, capsys, more, at, said):
    command(*reward_words(file, tmp_path / "whole", *more))
    lines = capsys.readouterr().out.splitlines()
    mend = hit(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        command(*reward_words(file, tmp_path / "RM", *more))
    mend()
    assert caught.value.code == 128 + signal.SIGTERM
    assert f"{said}, in {tmp_path / 'RM.partial'}. The same command again" in caught.value.__notes__[0]
    assert not (tmp_path / "RM").exists()
    capsys.readouterr()
    command(*reward_words(file, tmp_path / "RM", *more))
    again = capsys.readouterr().out.splitlines()
    assert learned(tmp_path / "RM") == learned(tmp_path / "whole")
    assert not list(tmp_path.glob("RM.*")) and any(line.startswith("going on after step") for line in again)
    assert [line for line in lines if "held-out" in line][-1] == [line for line in again if "held-out" in line][-1]


def test_a_reward_model_that_was_killed_goes_on_from_its_checkpoint(file, tmp_path, monkeypatch):
    words = reward_words(file, tmp_path / "RM", "--checkpoint-minutes", "1e-6")
    monkeypatch.setattr("lossmith.durable.checkpoint.SHARE", 1e6)  # saved after every step
    command(*reward_words(file, tmp_path / "whole"))
    mend = hit(monkeypatch, 3, raising(Broken()))
    with monkeypatch.context() as killed, pytest.raises(Broken):
        killed.setattr("lossmith.reward_model.under_way.UnderWay.stopped", lambda *told: None)  # as a kill would
        command(*words)
    mend()
    saved = sorted(p.name for p in (tmp_path / "RM.partial" / "training-0" / "checkpoints").iterdir())
    assert saved == ["step-00001", "step-00002"]
    command(*words)
    found, wanted = learned(tmp_path / "RM"), learned(tmp_path / "whole")
    assert found["model.safetensors"] == wanted["model.safetensors"]


def test_another_command_does_not_go_on_with_what_was_trained(file, tmp_path, monkeypatch):
    mend = hit(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        command(*reward_words(file, tmp_path / "RM"))
    mend()
    with pytest.raises(RunError, match=r"RM\.partial' holds what was trained already.*seed: 0 -> 3"):
        command(*reward_words(file, tmp_path / "RM", "--seed", 3))
    write_preferences(file, pairs(11))
    with pytest.raises(RunError, match=r"the preferences: \w+ -> \w+\. Put that back to go on with it, or delete it"):
        command(*reward_words(file, tmp_path / "RM"))


def test_a_reward_model_that_diverged_leaves_nothing_to_go_on_with(file, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *a, **k: torch.tensor(torch.nan))
    with pytest.raises(RunError, match="gradient is not finite"):
        command(*reward_words(file, tmp_path / "RM"))
    assert not list(tmp_path.glob("RM*"))
