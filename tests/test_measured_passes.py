"""What a pass is to be where the recipe says auto: decided from times (made up here), kept, and without effect."""

import json

import pytest
import torch
from rich.console import Console

import lossmith as ls
import tiny
from lossmith.training import Recipe, measured_passes
from lossmith.training.loop import learn
from lossmith.training.prepare import open_run, plan

PROMPTS = [f"Prompt number {i}?" for i in range(8)]
SCORER = "def score(completions, **_):\n    return [sum(ord(c) % 2 == 0 for c in t) / 10 for t in completions]\n"


@pytest.fixture
def common(tmp_path, monkeypatch):
    """A small run, of which measuring may take any share."""
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(measured_passes, "SHARE", 1e9)
    return dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=str(tmp_path / "prompts.txt"), held_out=2,
        scorer=f"{tmp_path / 'scorer.py'}:score", steps=3, prompts_per_step=4, samples_per_prompt=16, max_tokens=96,
        runs=str(tmp_path / "runs"), micro_batch_tokens="auto", checkpoint_every=1,
    )  # fmt: skip


def times(monkeypatch, seconds):
    """What is measured from here on: seconds(tokens in a pass, compiled, which measurement it is)."""
    asked = []

    def timed(learner, rollouts):
        asked.append((learner.recipe.pass_tokens, learner.compiled))
        return seconds(*asked[-1], len(asked))

    monkeypatch.setattr(measured_passes, "_timed", timed)
    return asked


def opened(common, **changes):
    """(the started run, what it notes, what inputs.json holds)."""
    run = open_run(plan(Recipe.make(**common | changes)))
    run.start()
    known = json.loads((run.folder.path / "inputs.json").read_text())["known"]
    return run, " ".join(run.going_on.notes), known.get("passes")


def test_passes_grow_as_long_as_larger_ones_are_faster_every_time(common, monkeypatch):
    asked = times(monkeypatch, lambda tokens, _, __: {1024: 2.0, 2048: 1.0, 4096: 1.5}[tokens])
    run, note, decided = opened(common)
    assert run.learner.recipe.pass_tokens == decided["micro_batch_tokens"] == 2048
    assert "2048: faster every time than 1024 (1 to 1 s against 2 to 2 for 2,0" in note and "4096 was not" in note
    assert [one.keys() - {"tokens"} for one in decided["seconds"]] == [
        {"1024 tokens", "2048 tokens"},
        {"2048 tokens", "4096 tokens"},
    ]
    assert len(asked) == 16 and run.recipe.micro_batch_tokens == "auto"


@pytest.mark.parametrize("lucky", [3, 5, 7])
def test_a_machine_that_was_slow_for_a_moment_changes_nothing(common, monkeypatch, lucky):
    """The larger pass is faster but once: that is what being busy with other work looks like."""
    times(monkeypatch, lambda tokens, _, k: 1.0 if tokens == 1024 or k in (lucky, lucky + 1) else 0.5)
    run, note, _ = opened(common)
    assert run.learner.recipe.pass_tokens == 1024 and "not faster every time" in note


def test_nothing_is_measured_that_would_not_pay_or_not_fit(common, monkeypatch):
    asked = times(monkeypatch, lambda tokens, _, __: 1024 / tokens)
    run, note, _ = opened(common)
    assert run.learner.recipe.pass_tokens == 8192 and "an update has no more than about 6,2" in note
    asked.clear()
    monkeypatch.setattr(measured_passes, "SHARE", 0.05)
    _, note, decided = opened(common)
    assert not asked and decided["micro_batch_tokens"] == 1024
    assert "measuring 2048 would take 16,384 tokens, and the whole run about 18," in note
    monkeypatch.setattr(measured_passes, "SHARE", 1e9)
    estimate = run.learner.estimate(Recipe.make(**common | {"micro_batch_tokens": 1024}))
    most = (estimate.fixed + estimate.activations) * 1.0001 / 1e9
    run, note, _ = opened(common, memory_gb=most)
    assert not asked and "2048 would take more memory than there is" in note and not run.learner.recompute


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiling_is_tried_where_a_run_is_long_and_kept_where_it_is_faster(common, monkeypatch):
    faster = times(monkeypatch, lambda _, compiled, __: 60.0 if compiled else 100.0)
    run, note, decided = opened(common, micro_batch_tokens=512, compile="auto")
    assert run.learner.compiled and run.learner.recipe.pass_tokens == 512 and decided["compile"] is True
    assert "compile = true: faster every time (60 to 60 s against 100 to 100 for" in note
    assert (512, True) in faster and "micro_batch_tokens" not in decided
    times(monkeypatch, lambda _, compiled, __: 100.0 if compiled else 60.0)
    run, note, decided = opened(common, compile="auto")
    assert not run.learner.compiled and decided["compile"] is False and "compile = false: not faster" in note
    layers = run.policy.model.model.layers
    assert all(layer._compiled_call_impl is None for layer in layers)  # nothing of the trial is left


def test_compiling_is_not_tried_in_a_short_run_or_without_a_compiler(common, monkeypatch):
    monkeypatch.setattr(measured_passes, "SHARE", 0.05)
    asked = times(monkeypatch, lambda *_: 0.1)
    _, note, _ = opened(common, micro_batch_tokens=512, compile="auto")
    assert "compile = false: compiling may take 30 s, and all passes of the run about" in note
    assert not any(compiled for _, compiled in asked)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    _, note, _ = opened(common, micro_batch_tokens=512, compile="auto")
    assert "compile = false: there is no C++ compiler" in note


def weights_of(run):
    return [p.detach().clone() for p in run.policy.model.parameters()]


@pytest.mark.slow
def test_measuring_leaves_no_trace_and_a_resumed_run_keeps_to_what_was_decided(common, monkeypatch):
    """Really measured first, to the bit the run of the same number; then resumed where times would say otherwise."""
    measured = measured_passes._timed
    common |= {"max_tokens": 32, "steps": 2}
    times(monkeypatch, lambda tokens, _, __: {1024: 2.0, 2048: 1.0, 4096: 1.5}[tokens])
    pretended = measured_passes._timed
    monkeypatch.setattr(measured_passes, "_timed", lambda *given: (measured(*given), pretended(*given))[1])
    stopped = open_run(plan(Recipe.make(**common)))
    for step in learn(stopped):
        assert all(p.grad is None for p in stopped.policy.parameters())
        if step.index == 0:
            break
    straight = ls.train(**common | {"micro_batch_tokens": 2048}, quiet=True)
    asked = times(monkeypatch, lambda tokens, _, __: tokens / 1024)
    resumed = ls.resume(stopped.folder.path, console=Console(quiet=True))
    assert not asked and "micro_batch_tokens = 2048, as was decided when the run began." in resumed.going_on.notes
    assert all(torch.equal(a, b) for a, b in zip(weights_of(straight), weights_of(resumed), strict=True))
    known = json.loads((resumed.folder.path / "inputs.json").read_text())["known"]
    assert known["passes"]["micro_batch_tokens"] == 2048
