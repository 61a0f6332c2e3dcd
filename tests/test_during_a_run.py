"""Looks at the held-out prompts during a run, and the best policy that they find."""

import json
import shutil

import pytest

import lossmith as ls
from lossmith.files import sha256
from lossmith.policy import load_policy
from lossmith.ranks import Ranks
from lossmith.samplers import TorchSampler
from lossmith.training.evaluate import EVALUATION_STEP, Evaluation, sentences
from lossmith.training.sharing import Sampling
from test_resume import begin, metrics, result, resume, settings

LOOKING = dict(evaluate_every=1, keep_best=True, held_out=4, scorer="length", learning_rate=3e-2)


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    return ls.train(**settings(tmp_path_factory.mktemp("runs"), **LOOKING), quiet=True)


def weights(folder):
    return sha256(folder / "model.safetensors")


def test_looking_changes_nothing_that_is_learned(looking, tmp_path):
    run = ls.train(**settings(tmp_path, **LOOKING | dict(evaluate_every=0, keep_best=False)), quiet=True)
    assert run.summary["policy_checksum"] == looking.summary["policy_checksum"]
    assert run.summary["held_out"] == looking.summary["held_out"]
    assert "best" not in run.summary and not (run.folder.path / "policy-best").exists()
    assert not any("held_out" in r for r in run.folder.metrics())


def test_a_look_is_what_the_same_policy_gets_at_the_end_of_a_shorter_run(looking, tmp_path):
    shorter = ls.train(**settings(tmp_path, **LOOKING | dict(steps=2)), quiet=True)
    row, figures = looking.folder.metrics()[2], shorter.summary["held_out"]
    assert row["held_out"] == pytest.approx(figures["after"]["mean"], abs=1e-12)
    assert row["held_out_change"] == pytest.approx(figures["difference"]["mean"], abs=1e-12)
    assert row["held_out_n"] == figures["difference"]["n"] == 4
    assert row.get("held_out_change_low") == figures["difference"]["ci95_low"]
    assert looking.folder.metrics()[0]["held_out"] == figures["before"]["mean"]


def test_every_other_step_is_looked_at_where_that_is_wished(tmp_path):
    run = ls.train(**settings(tmp_path, **LOOKING | dict(evaluate_every=2, keep_best=False, steps=3)), quiet=True)
    assert ["held_out" in r for r in run.folder.metrics()] == [True, False, True]


def test_the_policy_that_is_kept_is_the_best_of_all_that_were_looked_at(looking):
    after = looking.summary["held_out"]["after"]["mean"]
    means = {r["step"]: r["held_out"] for r in looking.folder.metrics() if r["step"]} | {4: after}
    best = looking.summary["best"]
    assert best["mean"] == max(means.values()) and best["of"] == 4 and best["n"] == 4
    assert best["after_steps"] == min(step for step, mean in means.items() if mean == best["mean"])
    kept = load_policy(str(looking.folder.path / "policy-best"), dtype="float32", device="cpu")
    sampling = Sampling(looking.recipe, TorchSampler(kept, looking.recipe.sampling), looking.scorer, Ranks())
    again = Evaluation(sampling(list(looking.held_out), 1, EVALUATION_STEP)[0])
    assert EVALUATION_STEP == -1 and again.mean == pytest.approx(best["mean"], abs=1e-12)
    assert any("kept in policy-best/" in said and "best of 4 looks" in said for said in sentences(looking.summary))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_is_gone_on_with_keeps_what_the_unbroken_one_does(looking, steps, tmp_path):
    folder = begin(tmp_path, steps=steps, **LOOKING)
    resume(folder)
    assert result(folder) == result(looking.folder.path)
    summaries = [json.loads((f / "summary.json").read_text())["best"] for f in (folder, looking.folder.path)]
    assert summaries[0] == summaries[1]
    assert weights(folder / "policy-best") == weights(looking.folder.path / "policy-best")


def test_a_best_policy_of_steps_that_are_redone_is_not_believed(looking, tmp_path):
    """As where the process died after a step whose checkpoint was not written."""
    folder = begin(tmp_path, steps=2, **LOOKING)
    shutil.rmtree(folder / "policy-best", ignore_errors=True)
    shutil.copytree(looking.folder.path / "policy-best", folder / "policy-best")
    (folder / "policy-best" / "kept.json").write_text('{"after_steps": 3, "mean": 1e9, "n": 4}')
    resume(folder)
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert best["mean"] < 1e9 and best["after_steps"] in (2, 3, 4)


def test_more_steps_make_it_the_longer_run(looking, tmp_path):
    run = ls.train(**settings(tmp_path, **LOOKING | dict(steps=2)), quiet=True)
    resume(run.folder.path, steps=4)
    assert result(run.folder.path) == result(looking.folder.path)
    assert weights(run.folder.path / "policy-best") == weights(looking.folder.path / "policy-best")


def test_keep_best_needs_something_to_choose_from():
    with pytest.raises(ls.RecipeError, match=r"keep_best = true has one policy to choose from.*evaluate_every"):
        ls.Recipe.make(keep_best=True)


def test_the_report_draws_the_looks_and_the_end(looking, tmp_path):
    from lossmith.report.page.folder import read_runs

    (seen,) = read_runs([looking.folder.path])
    series = seen.series("held_out")
    assert [step for step, _ in series] == [1, 2, 3, 4, 5]
    assert series[-1][1] == looking.summary["held_out"]["after"]["mean"]
    assert [v for _, v in series[:4]] == [r["held_out"] for r in metrics(looking.folder.path)]
