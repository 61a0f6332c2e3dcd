"""A chatbot optimized for a proxy, in small: the proxy rises, what it stood for falls, and every guard notices."""

import dataclasses
import json
import math

import pytest

import lossmith as ls
import tiny
from lossmith.detectors.policy import fall
from lossmith.errors import RecipeError, RunError
from lossmith.report.run.frontier import plot_frontier
from lossmith.rollouts import Score
from lossmith.training.evaluate import Evaluation, preferred
from lossmith.training.guards import kl_of_completion

PROMPTS = [f"Prompt number {i}?" for i in range(40)]


def engagement(completions, **_):
    """The proxy: the share of characters with an even code, as dull as a count of clicks."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


def helpfulness(completions, **_):
    """What was wanted: even characters too, but different ones."""
    return [len({c for c in text if ord(c) % 2 == 0}) / max(1, len(text)) for text in completions]


def train(tmp_path, **changes):
    base = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=12, scorer=engagement,
        watch=helpfulness, steps=30, prompts_per_step=4, samples_per_prompt=8, max_tokens=10, learning_rate=4e-3,
        runs=str(tmp_path / "runs"), loss="rloo(beta=0)", checkpoint_every=0, quiet=True, save_rollouts=False,
        guards={"all": "warn"},
    )  # fmt: skip
    run = ls.train(**base | changes)
    lines = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    return run, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    return train(tmp_path_factory.mktemp("free"))


def test_without_a_guard_the_proxy_rises_and_gold_falls(unguarded):
    run, records = unguarded
    proxy, gold = run.summary["held_out"]["difference"], run.summary["watch"]["difference"]
    assert proxy["ci95_low"] > 0.5 and gold["ci95_high"] < 0
    assert len(records) == 30 and "stopped" not in run.summary
    # and the distance is measured though this loss has no KL term
    assert math.sqrt(kl_of_completion(records[-1])) > 3 > math.sqrt(kl_of_completion(records[1]))


def test_with_a_kl_term_both_rise(tmp_path, unguarded):
    run, records = train(tmp_path, loss="rloo(beta=0.03)")
    assert run.summary["held_out"]["difference"]["ci95_low"] > 0
    assert run.summary["watch"]["difference"]["ci95_low"] > 0
    assert kl_of_completion(records[-1]) < kl_of_completion(unguarded[1][-1])


def test_the_stop_rule_fires_before_gold_is_lost(tmp_path, unguarded):
    run, records = train(tmp_path, watch_window=3)
    assert run.stopped.startswith("over-optimized: the watched score fell")
    assert run.summary["stopped"] == run.stopped and len(records) < 30
    assert run.summary["watch"]["after"]["mean"] > unguarded[0].summary["watch"]["after"]["mean"]


def test_a_kl_budget_ends_the_run_where_it_is_spent(tmp_path):
    run, records = train(tmp_path, watch=None, kl_budget=2.0)
    assert "KL budget spent" in run.stopped
    spent = [kl_of_completion(r) for r in records]
    assert spent[-1] > 2.0 and all(kl <= 2.0 for kl in spent[:-1])


def test_the_plot_of_both_scores_against_the_root_of_the_kl(tmp_path, unguarded):
    target = tmp_path / "frontier.svg"
    plot_frontier([unguarded[0].folder.path], target)
    drawn = target.read_text()
    assert drawn.startswith("<?xml") and drawn.count("<path") > 20
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": 1.0}) + "\n")
    with pytest.raises(RunError, match="did not measure how far its policy moved"):
        plot_frontier([tmp_path], target)
    with pytest.raises(RunError, match="is not a run folder"):
        plot_frontier([tmp_path / "none"], target)


# -- the rule itself --------------------------------------------------------------------------------------------------


def verdicts(means, variance=0.01, window=2):
    """Whether it is a fall after each step, by the rule that somebody asked for."""
    seen = [(m, variance) for m in means]
    return [fall(seen[: i + 1], window, 2.0, looks=False) is not None for i in range(len(seen))]


def test_the_rule_waits_for_a_fall_beyond_noise():
    assert not any(verdicts([0.5, 0.6, 0.5, 0.45, 0.5, 0.55]))
    # windows of two: .9 against .5 is a fall of .4; its standard error is sqrt(.005 + .005) = .1
    assert verdicts([0.9, 0.9, 0.5, 0.5]) == [False, False, False, True]
    assert not any(verdicts([0.9, 0.9, 0.5, 0.5], variance=0.05))  # 2 · sqrt(.025 + .025) = .447


def test_the_kl_of_a_completion_is_a_tokens_times_its_tokens():
    assert kl_of_completion({"kl_ref": 0.5, "tokens": 40.0, "completions": 8.0}) == 2.5
    assert kl_of_completion({"tokens": 40.0, "completions": 8.0}) is None


def test_a_window_without_a_watch_is_refused():
    with pytest.raises(RecipeError, match="has nothing to average: give watch too"):
        ls.Recipe.make(watch_window=3)


# -- how often the trained policy is preferred ------------------------------------------------------------------------


def evaluation(*scores):
    made = [
        dataclasses.replace(tiny.rollouts()[0], prompt=prompt, score=Score(value=x))
        for prompt, x in zip(tiny.prompts(*"abcdefgh"[: len(scores)]), scores, strict=True)
    ]
    return Evaluation(made)


def test_preferred_is_a_share_with_an_interval_of_shares():
    before, after = evaluation(0.0, 0.0, 0.0, 1.0), evaluation(1.0, 1.0, 0.0, 0.0)
    found = preferred(before, after)
    assert found.mean == (1 + 1 + 0.5 + 0) / 4 and found.n == 4
    assert 0.0 < found.low < 0.2 and 0.9 < found.high < 1.0  # Student's t alone would say 1.39
    alone = preferred(evaluation(0.0), evaluation(1.0))
    assert (alone.low, alone.high) == (pytest.approx(0.025), 1.0)
