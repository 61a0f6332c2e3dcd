"""Rewards by segment and step: they add up, they stand where the segment ends, and a loss reads them."""

import dataclasses
import json
import math

import pytest

import lossmith as ls
import tiny
from lossmith.errors import ScorerError
from lossmith.rollouts import LogProbs, Score
from lossmith.scorers import load_scorer
from lossmith.scorers.steps import StepReward, segment_ends
from lossmith.training import Learner, Recipe


class Given:
    """A scorer that answers from a list, in the order in which it is asked."""

    name = "given"

    def __init__(self, values):
        self.values = list(values)
        self.asked = []

    def score(self, rollouts):
        self.asked += [r.completion for r in rollouts]
        return [Score(value=v) if v is not None else Score(abstained=True) for v in self.values[: len(rollouts)]]


def rollout(text, policy):
    ids = tuple(policy.tokenizer(text)["input_ids"])
    base = tiny.rollouts(prompt_count=1, samples=1)[0]
    logp = LogProbs(base.behavior_logp.values.new_zeros(len(ids)), base.behavior_logp.distribution)
    return dataclasses.replace(base, completion_ids=ids, completion=text, behavior_logp=logp)


TEXT = "One. Two two! Three"


def test_segments_end_where_sentences_lines_and_token_counts_do():
    policy = tiny.policy()
    ids = policy.tokenizer(TEXT)["input_ids"]  # one token a byte
    assert segment_ends(ids, "sentence", policy.decode) == [4, 13, 19]
    assert segment_ends(ids, 8, policy.decode) == [8, 16, 19]
    lines = policy.tokenizer("a\nbc\n\nd")["input_ids"]
    assert segment_ends(lines, "line", policy.decode) == [2, 6, 7]
    ended = [*policy.tokenizer("One. Two.")["input_ids"], policy.tokenizer.eos_token_id]
    assert segment_ends(ended, "sentence", policy.decode) == [4, 10]  # the end token is no third step


def test_differences_add_up_to_the_score_of_the_whole_and_stand_at_the_ends():
    policy = tiny.policy()
    inner = Given([0.25, 0.5, 0.375])
    score = StepReward(inner, "sentence", decode=policy.decode).score([rollout(TEXT, policy)])[0]
    assert inner.asked == ["One.", "One. Two two!", TEXT]
    assert score.value == 0.375
    assert {k: x for k, x in enumerate(score.per_token) if x} == {3: 0.25, 12: 0.25, 18: -0.125}


def test_the_books_process_numbers():
    policy = tiny.policy()
    text = "a\nb\nc\nd"
    for gain, expected in (("correct", 3.0), ("log", -1.601470)):
        scorer = StepReward(Given([0.9, 0.8, 0.4, 0.7]), "line", gain, policy.decode)
        assert scorer.score([rollout(text, policy)])[0].value == pytest.approx(expected, abs=1e-6)
    assert math.log(0.9 * 0.8 * 0.4 * 0.7) == pytest.approx(-1.601470, abs=1e-6)


def test_a_prefix_without_a_score_leaves_the_whole_without():
    policy = tiny.policy()
    assert StepReward(Given([0.5, None, 0.5]), decode=policy.decode).score([rollout(TEXT, policy)])[0].abstained
    wrong = StepReward(Given([0.5, 1.5, 0.5]), gain="log", decode=policy.decode).score([rollout(TEXT, policy)])[0]
    assert "not a probability" in wrong.error


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"steps": "length", "segments": "sentense"}, "Did you mean 'sentence'"),
        ({"steps": "length", "gain": "sum"}, "gain is 'sum'"),
        ({"steps": "length", "weights": [1]}, "no setting 'weights'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ScorerError, match=message):
        load_scorer(spec)


def test_a_loss_reads_them_by_token():
    """With reward-to-go and no baseline, a token's advantage is what the segments from its own on earn."""
    policy = tiny.loaded()
    recipe = Recipe.make(loss="reinforce(advantage='return')", temperature=1.0)
    learner = Learner(policy, recipe.policy_loss(), recipe)
    scored = dataclasses.replace(
        rollout(TEXT, policy), score=Score(value=0.375, per_token=tuple([0.0] * 3 + [0.25] + [0.0] * 14 + [0.125]))
    )
    plain = dataclasses.replace(rollout("ab", policy), sample=1, score=Score(value=2.0))
    batch = learner.make_batch([scored, plain])
    assert batch.reward.shape == (2, 19)
    assert batch.reward[0].nonzero()[:, 0].tolist() == [3, 18]
    assert batch.reward[1].nonzero()[:, 0].tolist() == [1] and float(batch.reward[1].sum()) == 2.0


def test_a_run_learns_from_them(tmp_path):
    run = ls.train(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"q{i}" for i in range(8)], held_out=2,
        scorer={"steps": "length", "segments": 4}, loss="reinforce(advantage='return')", steps=2,
        prompts_per_step=2, samples_per_prompt=2, max_tokens=8, runs=str(tmp_path), quiet=True,
    )  # fmt: skip
    assert len((run.folder.path / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run.folder.path / "summary.json").read_text())["held_out"]["after"]["n"] == 2
