"""Whole runs on a tiny model: the folder, the resumption, the figures, and everything that must be refused first."""

import json
import math
import tomllib

import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import lossmith as ls
import tiny
from lossmith.errors import LossError, PolicyError, PromptError, RecipeError, RunError, ScorerError
from lossmith.optimization import rate_factor
from lossmith.rollouts import rollout_table
from lossmith.training.run import check_disk

PROMPTS = [f"Prompt number {i}?" for i in range(12)]


def even_bytes(completions, **_):
    """A score that a random model can learn: the share of characters with an even code."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


def settings(tmp_path, **changes):
    base = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=4, scorer=even_bytes,
        steps=3, prompts_per_step=2, samples_per_prompt=4, max_tokens=10, learning_rate=3e-3,
        runs=str(tmp_path / "runs"), loss="reinforce(advantage='loo')", quiet=True,
    )  # fmt: skip
    return base | changes


def metrics(run):
    return [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]


# -- what a run leaves behind -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ls.train(**settings(tmp_path_factory.mktemp("a"), loss="grpo", name="one", checkpoint_every=2))


def test_the_folder_holds_all_it_promises(finished):
    names = {p.name for p in finished.folder.path.iterdir()}
    assert names == {
        "recipe.toml", "inputs.json", "metrics.jsonl", "rollouts", "checkpoints", "policy", "summary.json",
        "findings.jsonl",
    }  # fmt: skip
    recipe = tomllib.loads((finished.folder.path / "recipe.toml").read_text())
    assert set(ls.Recipe.model_fields) - set(recipe) <= {
        "prompt_limit",
        "watch",
        "kl_budget",
        "memory_gb",
        "track",
        "chat_template",
        "sampler_url",
        "quantize",
        "teacher",
        "teacher_column",
    }  # complete; None has no TOML
    assert recipe["scorer"] == "python: test_training.even_bytes"


def test_the_policy_loads_with_plain_transformers_and_is_what_was_trained(finished):
    folder = finished.folder.path / "policy"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for (_, a), (_, b) in zip(model.named_parameters(), finished.policy.model.named_parameters(), strict=True):
        assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.TEMPLATE
    assert ls.load_policy(folder, device="cpu").checksum() == finished.summary["policy_checksum"]


def test_every_logged_figure_follows_from_the_stored_rollouts(finished):
    """Reward, length, ended, advantages: recomputed from parquet, away from the library."""
    for record in metrics(finished):
        table = pyarrow.parquet.read_table(finished.folder.path / "rollouts" / f"step-{record['step']:05d}.parquet")
        rows = table.to_pylist()
        assert len(rows) == 8
        assert record["reward"] == pytest.approx(sum(r["score"] for r in rows) / 8)
        assert record["length"] == pytest.approx(sum(len(r["tokens"]) for r in rows) / 8)
        logps = [x for r in rows for x in r["behavior_logp"]]
        assert record["sampled_entropy"] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)
        assert record["ended"] == pytest.approx(sum(not r["truncated"] for r in rows) / 8)
        assert record["performance_loss"] == pytest.approx(-record["reward"], abs=1e-6)
        for prompt in {r["prompt_id"] for r in rows}:
            group = [r for r in rows if r["prompt_id"] == prompt]
            scores = torch.tensor([r["score"] for r in group], dtype=torch.float64)
            expected = (scores - scores.mean()) / (scores.std() + 1e-6) if scores.max() > scores.min() else scores * 0
            found = torch.tensor([r["advantage"] for r in group], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert all(len(r["tokens"]) == len(r["behavior_logp"]) for r in rows)
        assert {r["policy_version"] for r in rows} == {record["step"]}


def test_the_summary_follows_from_the_held_out_rollouts(finished):
    summary = json.loads((finished.folder.path / "summary.json").read_text())
    scores = {}
    for when in ("before", "after"):
        rows = pyarrow.parquet.read_table(finished.folder.path / "rollouts" / f"held-out-{when}.parquet").to_pylist()
        scores[when] = {r["prompt_id"]: r["score"] for r in rows}
        assert summary["held_out"][when]["mean"] == pytest.approx(sum(scores[when].values()) / 4)
    assert scores["before"].keys() == scores["after"].keys()
    differences = [scores["after"][k] - scores["before"][k] for k in scores["before"]]
    assert summary["held_out"]["difference"]["mean"] == pytest.approx(sum(differences) / 4)
    trained = pyarrow.parquet.read_table(finished.folder.path / "rollouts" / "step-00000.parquet").to_pylist()
    assert not {r["prompt_id"] for r in trained} & set(scores["before"])


def test_the_first_step_is_on_policy(finished):
    first = metrics(finished)[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clip_fraction"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-8)
    assert first["sampler_gap"] < 1e-5
    assert metrics(finished)[-1]["kl"] > 0


def test_the_models_own_sampler_is_sent_nothing_and_no_time_is_written_down_for_it(finished):
    assert not any("push" in name for record in metrics(finished) for name in record)


def test_training_raises_the_held_out_score(tmp_path):
    run = ls.train(**settings(tmp_path, steps=12, samples_per_prompt=8, prompts_per_step=4, prompts=PROMPTS * 1))
    assert run.summary["held_out"]["difference"]["mean"] > 0.1


@pytest.mark.parametrize("loss", ["ppo", "a2c", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"])
def test_every_loss_trains(tmp_path, loss):
    run = ls.train(**settings(tmp_path, loss=loss, steps=2, epochs=2, updates_per_step=2))
    records = metrics(run)
    assert len(records) == 2 and all(math.isfinite(v) for r in records for v in r.values())
    assert run.policy.version == 8


# -- exactly again ----------------------------------------------------------------------------------------------------


def weights_of(run):
    return [p.detach().clone() for p in run.policy.model.parameters()]


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    first, second = (ls.train(**settings(tmp_path)) for _ in range(2))
    assert first.folder.path != second.folder.path
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))
    other = ls.train(**settings(tmp_path, seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(other), strict=True))


def test_the_micro_batch_budget_changes_no_result(tmp_path):
    first, second = (ls.train(**settings(tmp_path, micro_batch_tokens=tokens)) for tokens in (4096, 1))
    for a, b in zip(weights_of(first), weights_of(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # AdamW turns rounding of a near-zero gradient into a step
    for a, b in zip(metrics(first), metrics(second), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("loss", ["grpo(beta=0.1, kl_control='adaptive')", "ppo"])
@pytest.mark.parametrize("stop_at", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path, monkeypatch, loss, stop_at):
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "def score(completions, **_):\n    return [sum(ord(c) % 2 == 0 for c in t) / 10 for t in completions]\n"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    common = settings(
        tmp_path, loss=loss, steps=4, checkpoint_every=1, epochs=2, warmup_steps=2, schedule="linear",
        scorer=f"{scorer}:score", prompts=str(prompts),
    )  # fmt: skip
    straight = ls.train(**common, name="straight")

    common.pop("quiet")
    stopped = ls.open_run(ls.plan(ls.Recipe.make(**common, name="stopped")))
    for step in ls.learn(stopped):
        if step.index + 1 == stop_at:
            break  # as a killed process would: nothing is closed or finished
    resumed = ls.resume(stopped.folder.path, console=Console(quiet=True))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(straight), weights_of(resumed), strict=True))
    changing = {"tokens_per_second"} | {key for key in metrics(straight)[0] if key.startswith("seconds_")}
    for a, b in zip(metrics(straight), metrics(resumed), strict=True):
        assert {k: v for k, v in a.items() if k not in changing} == {k: v for k, v in b.items() if k not in changing}
    assert straight.summary["held_out"] == resumed.summary["held_out"]


# -- refused before a model is loaded ---------------------------------------------------------------------------------


def refuse(tmp_path, error, message, **changes):
    """The error comes from `plan`, which loads no model, and names what to do."""
    fields = settings(tmp_path, **changes)
    fields.pop("quiet")
    with pytest.raises(error, match=message):
        ls.plan(ls.Recipe.make(**fields))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (RecipeError, "no setting 'learning_rat'.*Did you mean 'learning_rate'", dict(learning_rat=1)),
        (RecipeError, "steps = 0.*above 0", dict(steps=0)),
        (RecipeError, "steps = 'many'", dict(steps="many")),
        (RecipeError, "schedule = 'cosin'.*'cosine'", dict(schedule="cosin")),
        (RecipeError, "temperature = 0 with samples_per_prompt = 4", dict(temperature=0)),
        (RecipeError, "no log-probabilities|greedy", dict(temperature=0, samples_per_prompt=1)),
        (RecipeError, "warmup_steps = 9 exceeds", dict(warmup_steps=9)),
        (RecipeError, "updates_per_step = 3 exceeds prompts_per_step = 2", dict(updates_per_step=3)),
        (RecipeError, "prompts_per_step = 9, but only 8 prompts", dict(prompts_per_step=9)),
        (PolicyError, "stop holds an empty string", dict(stop=[""])),
        (LossError, "no loss 'grop'. Did you mean 'grpo'", dict(loss="grop")),
        (LossError, "no parameter 'bta'. Did you mean 'beta'", dict(loss="grpo(bta=1)")),
        (LossError, "cannot read the loss", dict(loss="grpo(beta=open('x'))")),
        (LossError, "at least 0", dict(loss="grpo(beta=-1.0)")),
        (LossError, "value_coef", dict(loss={"name": "grpo", "value_coef": 0.5})),
        (RecipeError, "known trap: k1 in the loss.*allow_traps", dict(loss="grpo(kl_estimator='k1')")),
        (RecipeError, "known trap", dict(loss="book_clip")),
        (PromptError, "there is no prompt file", dict(prompts="missing.jsonl")),
        (PromptError, "cannot hold out 12 of 12", dict(held_out=12)),
        (RecipeError, "an interval needs at least two", dict(held_out=1)),
        (PromptError, "looks like a target", dict(prompts=[{"prompt": f"p{i}", "answer": "4"} for i in range(9)])),
        (ScorerError, "no_such_module", dict(scorer="no_such_module:score")),
        (ScorerError, "Did you mean 'helpfulness'", dict(scorer="helpfulnes")),
        (PolicyError, "no model folder", dict(model="/no/such/folder")),
    ],
)
def test_bad_input_is_refused_before_the_model_loads(tmp_path, error, message, changes):
    refuse(tmp_path, error, message, **changes)


def test_a_scorer_with_the_wrong_signature_is_refused_before_the_model_loads(tmp_path):
    refuse(tmp_path, ScorerError, "gold", scorer=lambda prompts, completions, gold: [0.0])


def test_a_prompt_longer_than_the_context_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(RecipeError, match=r"memory:13: the prompt has \d+ tokens"):
        ls.train(**settings(tmp_path, prompts=[*PROMPTS, "long " * 80]))
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_exists_is_never_overwritten(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "keep.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists.*Choose another name"):
        ls.train(**settings(tmp_path, name="mine"))
    assert (tmp_path / "runs" / "mine" / "keep.txt").read_text() == "mine"
    with pytest.raises(RunError, match="letters, digits"):
        ls.train(**settings(tmp_path, name="../escape"))


def test_a_full_disk_is_found_before_the_run(tmp_path):
    with pytest.raises(RunError, match="are free there"):
        check_disk(tmp_path / "not" / "yet", 10**18)
    check_disk(tmp_path, 1)


def test_a_scorer_that_fails_stops_the_run_or_costs_that_rollout(tmp_path):
    def sometimes(completions, **_):
        return [math.nan if i == 1 else 0.5 + i / 100 for i, _ in enumerate(completions)]

    with pytest.raises(ScorerError, match="Prompt number"):
        ls.train(**settings(tmp_path, scorer=sometimes))
    run = ls.train(**settings(tmp_path, scorer=sometimes, scorer_errors="drop"))
    assert [r["dropped"] for r in metrics(run)] == [1, 1, 1]


def test_a_reward_function_of_trl_trains_unchanged(tmp_path):
    steps = []

    def reward(completions, trainer_state, log_extra=None, log_metric=None, **kwargs):
        steps.append((trainer_state.global_step, trainer_state.max_steps, round(trainer_state.epoch, 3)))
        log_extra("letters", [len(text) for text in completions])
        log_metric("half", 0.5)
        return [None if i == 1 else 0.5 + i / 100 for i, _ in enumerate(completions)]

    run = ls.train(**settings(tmp_path, scorer=reward, updates_per_step=2))
    # held-out before, three steps of two updates, held-out after, the first texts again: 8 prompts, 2 a step
    assert steps == [(0, 6, 0.0), (0, 6, 0.0), (2, 6, 0.25), (4, 6, 0.5), (6, 6, 0.75), (0, 6, 0.0)]
    assert [r["dropped"] for r in metrics(run)] == [1, 1, 1]
    assert [r["scorer/half"] for r in metrics(run)] == [0.5] * 3
    table = pyarrow.parquet.read_table(run.folder.path / "rollouts" / "step-00000.parquet").to_pydict()
    assert [json.loads(row)["letters"] for row in table["score_logged"]] == [len(text) for text in table["completion"]]


def test_too_few_scores_to_compare_are_said_and_written_as_json_can(tmp_path, capsys):
    def only_in_training(completions, **_):
        return [None] * len(completions) if len(completions) == 4 else [len(c) / 10 for c in completions]

    run = ls.train(**settings(tmp_path, scorer=only_in_training, scorer_errors="drop", quiet=False))
    assert "Too few held-out prompts (0)" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((run.folder.path / "summary.json").read_text(), parse_constant=lambda _: pytest.fail("NaN"))
    assert summary["held_out"]["difference"] == {"mean": None, "ci95_low": None, "ci95_high": None, "n": 0}


def test_traps_train_when_the_recipe_says_so(tmp_path):
    run = ls.train(**settings(tmp_path, loss="book_ppo_clip", allow_traps=True, steps=1))
    assert run.policy.version == 1


# -- small pieces -----------------------------------------------------------------------------------------------------


def test_a_loss_is_carried_whole_by_the_recipe(tmp_path):
    loss = ls.get_loss("grpo", beta=0.3).replace(trust=ls.Clip(0.1, 0.4), name="mine")
    run = ls.train(**settings(tmp_path, loss=loss, steps=1))
    written = tomllib.loads((run.folder.path / "recipe.toml").read_text())["loss"]
    assert ls.PolicyLoss.from_dict(written) == loss


def test_schedules():
    def factors(**fields):
        recipe = ls.Recipe.make(steps=5, **fields)
        return [round(rate_factor(recipe, step, recipe.steps), 4) for step in range(5)]

    assert factors() == [1, 1, 1, 1, 1]
    assert factors(schedule="linear") == [1, 0.8, 0.6, 0.4, 0.2]
    assert factors(schedule="cosine", warmup_steps=1) == [0.5, 1, 0.8536, 0.5, 0.1464]


def test_a_recipe_has_about_fifty_fields_and_each_says_what_it_is():
    assert len(ls.Recipe.model_fields) <= 67  # four are a LoRA adapter's, three a teacher's and a server's
    assert all(field.description for field in ls.Recipe.model_fields.values())


def test_rollout_files_are_read_back(finished):
    """What the file holds, and what `rollout_table` makes of it again."""
    for file in sorted((finished.folder.path / "rollouts").glob("*.parquet")):
        rollouts = ls.read_rollouts(file)
        table = pyarrow.parquet.read_table(file)
        sampled = table.select([name for name in table.column_names if "." not in name])  # not what the loss saw
        assert rollout_table(rollouts).to_pylist() == sampled.to_pylist()
        assert all(len(r.completion_ids) == len(r.behavior_logp.values) for r in rollouts)
    with pytest.raises(ls.RunError, match="cannot be read as a file of rollouts"):
        ls.read_rollouts(finished.folder.path / "metrics.jsonl")
