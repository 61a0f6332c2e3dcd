"""Every key of metrics.jsonl is documented with its unit, the page is the list, and KL has one unit."""

import json
from pathlib import Path

import pytest
import torch

import lossmith as ls
import tiny
from batches import evaluate, quiet_loss, random_fields
from lossmith.cluster.remote import together
from lossmith.detectors.signal import without_signal
from lossmith.report.run.metrics_page import page
from lossmith.training.guards import kl_of_completion
from lossmith.training.metrics import METRICS, documented, in_completions, of_lag
from lossmith.training.offline.loop import PreferenceRecipe, learn_preferences, open_preferences, plan_preferences
from vllm_server import FakeVllm

GIVEN = {"ppo@rlax": "advantage", "value_clipped": "returns"}  # what a user computes for these
PROMPTS = [f"Prompt number {i}?" for i in range(12)]


def records(run):
    return [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]


def train(tmp_path, loss="grpo", **changes):
    fixed = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=4, steps=2, quiet=True,
        prompts_per_step=2, samples_per_prompt=4, max_tokens=8, learning_rate=3e-3, runs=str(tmp_path),
        scorer=lambda completions, **_: [float(len(set(c))) for c in completions],
    )  # fmt: skip
    return ls.train(loss=loss, **fixed | changes)


def measured(name):
    """Names of all that a loss of the catalogue says about itself."""
    fields = random_fields(0)
    out = evaluate(quiet_loss(name), fields | ({GIVEN[name]: fields["value"]} if name in GIVEN else {}))[0]
    return {f"loss_{term}" for term in out.terms} | in_completions(out.metrics).keys()


def test_the_page_is_the_list():
    written = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert written.read_text(encoding="utf-8") == page(), "python -m lossmith.report.run.metrics_page > docs/metrics.md"
    assert all(meaning for meaning, _ in METRICS.values())


@pytest.mark.parametrize("name", sorted(ls.losses.CATALOGUE))
def test_no_loss_of_the_catalogue_measures_what_is_not_documented(name):
    assert not {key for key in measured(name) if not documented(key)}


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("grpo(beta=0.1)", {"watch": "length"}),
        ("ppo", {"updates_per_step": 2, "epochs": 2}),
        ("online_dpo", {}),
        ("reinforce_pp", {"kl_budget": 1e9}),
        ("rejection_sampling", {"loss": "grpo", "scorer_errors": "drop"}),
    ],
)
def test_a_run_writes_no_undocumented_key_and_counts_steps_from_0_in_files(tmp_path, loss, more):
    found = records(train(tmp_path, **{"loss": loss} | more))
    assert not {key for record in found for key in record if not documented(key)}
    assert [record["step"] for record in found] == [0, 1]


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
def test_nor_does_a_run_on_preferences(tmp_path, loss):
    rows = [{"prompt": p, "chosen": "aaaa", "rejected": "zz"} for p in PROMPTS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = PreferenceRecipe.make(
        preferences=str(tmp_path / "p.jsonl"), model=str(tiny.folder()), device="cpu", dtype="float32", loss=loss,
        runs=str(tmp_path / "runs"), held_out=4,
    )  # fmt: skip
    run = open_preferences(plan_preferences(recipe))
    for step in learn_preferences(run):
        assert not {key for key in step.record if not documented(key)} and "kl_ref" not in step.record
    run.finish()


def test_what_is_documented_is_what_is_written_and_no_more(tmp_path):
    """Each name of the list is measured by something: the catalogue, or one of these runs."""
    seen = set().union(*map(measured, ls.losses.CATALOGUE))
    for record in records(train(tmp_path, "ppo(beta=0.1)", watch="length", max_tokens=16, evaluate_every=1)):
        seen |= record.keys()
    with FakeVllm() as server:
        for record in records(train(tmp_path, sampler="vllm", sampler_url=server.url)):
            seen |= record.keys()
    taught = {"teacher": str(tiny.folder("gpt2")), "temperature": 1.0, "name": "taught"}
    for record in records(train(tmp_path, "opd(extra='reverse_kl')", **taught)):
        seen |= record.keys()
    lagging = ls.Batch(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), lag=torch.tensor([0, 2]))
    seen |= of_lag(lagging).keys()  # of samplers that run ahead: tests/test_cluster.py
    seen |= together([{"push_restarts": 1.0}]).keys()  # of a cluster's samplers: tests/live/test_vllm_cluster.py
    assert {name for name in METRICS if "*" not in name} <= seen
    assert "loss_policy" in seen and "seconds_update_backward" in seen


def test_the_kl_of_a_record_is_that_of_whole_completions():
    """k3 of each token, e^-κ - 1 + κ, summed over a completion, and the mean of the completions."""
    fields = random_fields(0)
    metrics = evaluate(quiet_loss("grpo", beta=0.1), fields)[0].metrics
    gap = torch.where(fields["mask"], fields["logp"] - fields["ref_logp"], torch.zeros(()).double())
    by_completion = (torch.exp(-gap) - 1 + gap).sum(1)[fields["mask"].any(1)]
    found = in_completions(metrics)
    assert found["kl"] == pytest.approx(float(by_completion.mean()), rel=1e-9)
    assert kl_of_completion(found) == kl_of_completion(metrics) == found["kl"]  # older runs wrote it by token
    assert "kl_ref" not in found and "kl_old" not in found


def test_the_budget_is_in_the_unit_of_the_record(tmp_path):
    run = train(tmp_path, "rloo(beta=0)", kl_budget=1e-6, steps=5)
    last = records(run)[-1]
    assert last["kl"] > 1e-6 and f"{last['kl']:.2f} nats a completion" in run.stopped


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"reward": 0.5, "advantage_abs": 0.0}, True),
        ({"reward": 0.3, "advantage_abs": 1e-9, "groups": 4.0, "constant_groups": 4.0}, True),  # rounding
        ({"reward": 0.3, "advantage_abs": 0.3, "groups": 4.0, "constant_groups": 4.0}, False),  # compares nothing
        ({"reward": 0.3, "advantage_abs": 1e-9, "groups": 4.0, "constant_groups": 3.0}, False),  # tiny, and real
        ({"reward": 0.3, "units": 0.0}, True),
        ({"reward": 0.3, "units": 2.0}, False),
        ({"reward": 0.3}, False),
    ],
)
def test_a_step_without_signal(record, expected):
    assert without_signal(record) is expected
