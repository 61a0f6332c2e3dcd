"""`engine="trl"`: TRL's trainer makes the rounds of a run, and what is left is a run of Lossmith."""

import json

import pytest
import torch

pytest.importorskip("trl")

import lossmith as ls
import tiny
import trl_runs  # noqa: F401  (finds tiny.py)
from lossmith.errors import LossError, RecipeError, ScorerError
from lossmith.rollouts import read_rollouts
from lossmith.training.learner import Learner

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PROMPTS = [f"Question {i}?" for i in range(14)]


def letters(completions):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def settings(tmp_path, **changes):
    common = dict(
        model=str(tiny.folder()), prompts=PROMPTS, held_out=6, scorer=letters, steps=2, prompts_per_step=4,
        samples_per_prompt=4, max_tokens=8, temperature=1.0, learning_rate=1e-3, dtype="float32",
        micro_batch_tokens=150, runs=str(tmp_path), quiet=True, engine="trl",
    )  # fmt: skip
    return common | changes


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def trained(tmp_path, **changes):
    return ls.train(**settings(tmp_path, **changes))


@pytest.mark.parametrize("loss", ["grpo(beta=0.05)", "rloo", "online_dpo(beta=0.1)"])
def test_a_round_moves_the_policy_as_lossmiths_own_learner_does(tmp_path, loss):
    run = trained(tmp_path, loss=loss, steps=1, epochs=2)
    known = {p.id: p for p in run.prompts}
    rollouts = read_rollouts(run.folder.path / "rollouts" / "step-00000.parquet", known)
    own = settings(tmp_path, loss=loss, steps=1, epochs=2, engine="lossmith", micro_batch_tokens=4000)
    recipe = ls.Recipe.make(**{k: v for k, v in own.items() if k != "quiet"})
    learner = Learner(tiny.loaded(), recipe.policy_loss(), recipe)
    before = weights(learner.policy)
    _, with_advantages = tiny.update(learner, rollouts)
    assert (weights(learner.policy) - before).abs().max() > 1e-3
    assert (weights(run.policy) - weights(learner.policy)).abs().max() < 1e-5
    recorded, again = ([r.advantage for r in of] for of in (rollouts, with_advantages))
    assert recorded == pytest.approx(again, abs=1e-5)


def test_the_run_folder_is_that_of_any_run(tmp_path):
    more = {"updates_per_step": 2, "loss": "grpo(beta=0.05)"}
    runs = {engine: trained(tmp_path / engine, engine=engine, **more) for engine in ("trl", "lossmith")}
    files, metrics, prompts = {}, {}, {}
    for engine, run in runs.items():
        path = run.folder.path
        files[engine] = sorted(str(p.relative_to(path)) for p in path.rglob("*"))
        metrics[engine] = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        steps = [read_rollouts(path / "rollouts" / f"step-0000{i}.parquet") for i in range(2)]
        prompts[engine] = [[(r.prompt.id, r.sample, r.prompt_ids) for r in step] for step in steps]
    assert files["trl"] == files["lossmith"]
    assert prompts["trl"] == prompts["lossmith"]
    missing = {k for k in metrics["lossmith"][0] if not k.startswith("seconds_update_")} - metrics["trl"][0].keys()
    # TRL samples by itself, and says no log-probabilities
    assert missing == {"sampler_gap", "sampler_outside", "ess"}
    assert [x["reference_moved"] for x in metrics["trl"]] == [0, 0]
    assert runs["trl"].summary.keys() == runs["lossmith"].summary.keys()
    assert runs["trl"].summary["held_out"]["before"] == runs["lossmith"].summary["held_out"]["before"]
    saved = ls.load_policy(runs["trl"].folder.path / "policy", dtype="float32", device="cpu")
    assert torch.equal(weights(saved), weights(runs["trl"].policy))


def test_a_run_that_goes_on_ends_where_one_that_did_not_stop_does(tmp_path):
    straight = trained(tmp_path, steps=4)
    stopped = trained(tmp_path, steps=2)
    assert not torch.equal(weights(stopped.policy), weights(straight.policy))
    again = ls.resume(stopped.folder.path, steps=4, scorer=letters, prompts=PROMPTS)
    assert torch.equal(weights(again.policy), weights(straight.policy))
    lines = [(run.folder.path / "metrics.jsonl").read_text().splitlines() for run in (straight, again)]
    assert [json.loads(x)["reward"] for x in lines[0]] == [json.loads(x)["reward"] for x in lines[1]]


def no_opinion_of_some(completions):
    return ["abstain" if ord(text[0]) % 3 == 0 else float(len(set(text))) for text in completions]


def test_completions_without_a_score_are_dropped_and_counted(tmp_path):
    run = trained(tmp_path, steps=1, scorer=no_opinion_of_some)
    (line,) = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    rollouts = read_rollouts(run.folder.path / "rollouts" / "step-00000.parquet")
    dropped = [r for r in rollouts if not r.scored]
    assert 0 < len(dropped) == json.loads(line)["dropped"] < len(rollouts)
    assert all(r.advantage is None for r in dropped)


def indifferent(completions):
    return [0.5] * len(completions)


def test_guards_stop_it_and_a_second_scorer_watches(tmp_path):
    run = trained(
        tmp_path, steps=4, learning_rate=0.05, kl_budget=0.01, watch=lambda completions: [0.5] * len(completions)
    )
    assert "KL budget spent" in run.stopped
    assert run.summary["stopped"] == run.stopped
    assert len((run.folder.path / "metrics.jsonl").read_text().splitlines()) < 4
    assert run.summary["watch"]["after"]["mean"] == 0.5


def broken(completions):
    raise ValueError("no score today")


def test_a_scorer_that_fails_stops_it_in_the_scorers_words(tmp_path):
    with pytest.raises(ScorerError, match="no score today"):
        trained(tmp_path, scorer=broken)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(top_p=0.9), r"top_p = 0\.9"),
        (dict(top_k=5, stop=["."]), "top_k = 5.*stop = "),
        (dict(samples_per_prompt=1, loss="reinforce"), "samples_per_prompt = 1"),
        (dict(updates_per_step=3), "updates_per_step = 3"),
        (dict(updates_per_step=2, loss="online_dpo(beta=0.1)"), "updates_per_step = 2.*online_dpo"),
        (dict(device="cuda:1"), "device = 'cuda:1'"),
        (dict(engine_options={"max_steps": 7}), "engine_options: max_steps is decided by the recipe's steps"),
        (dict(engine_options={"use_vlm": True}), "GRPOConfig has no 'use_vlm'.*use_vllm"),
        (dict(engine_options={"use_vllm": True}, engine="lossmith"), "engine_options are of another engine"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_carry_over_is_named_before_the_model_is_loaded(tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr("lossmith.training.prepare.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(RecipeError, match=said):
        trained(tmp_path, **changes)


def test_options_reach_trls_configuration_and_one_that_it_refuses_is_said(tmp_path, monkeypatch):
    from lossmith.adapters.trl import engine

    made = []

    class Recorded(engine.GRPOConfig):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    monkeypatch.setattr(engine, "GRPOConfig", Recorded)
    trained(tmp_path, steps=1, engine_options={"generation_kwargs": {"repetition_penalty": 1.2}, "log_level": "error"})
    assert made[0].generation_kwargs == {"repetition_penalty": 1.2} and made[0].log_level == "error"
    with pytest.raises(RecipeError, match=r"engine_options: TRL refuses them: .*OptimizerNames"):
        trained(tmp_path, steps=1, engine_options={"optim": "no such"})
    with pytest.raises(LossError, match=r"GRPOConfig\(epsilon=0\.5\) is of TRL's own loss"):
        trained(tmp_path, steps=1, engine_options={"epsilon": 0.5})


def test_a_loss_that_needs_a_critic_is_refused(tmp_path):
    with pytest.raises(LossError, match=r"ppo does not fit trl.*Batch\.value"):
        trained(tmp_path, loss="ppo")
