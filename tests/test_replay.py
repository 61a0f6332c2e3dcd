"""Recorded rollouts through losses: against what the run itself computed, and against files of other trainers."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

import lossmith as ls
import shell
import tiny
from lossmith.losses import CATALOGUE, example_loss
from lossmith.replay import read_recorded, replay
from lossmith.replay.model import under_model

PROMPTS = [f"Question {i}?" for i in range(8)]


def low_bytes(completions, **columns):
    return [sum(c < "m" for c in text) / 10 for text in completions]


def settings(tmp_path, **changes):
    return dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=2, scorer=low_bytes, steps=2,
        prompts_per_step=2, samples_per_prompt=4, max_tokens=10, learning_rate=3e-3, runs=str(tmp_path), quiet=True,
        seed=1,
    ) | changes  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2])
def run(request, tmp_path_factory):
    """With one update a step, and with two: the second then needs the old policy."""
    folder = tmp_path_factory.mktemp("runs")
    return ls.train(**settings(folder, loss="grpo", updates_per_step=request.param, name="grpo"))


def steps_of(run):
    return read_recorded(run.folder.path)


# -- our own files ----------------------------------------------------------------------------------------------------


def test_a_step_file_holds_what_the_loss_saw(run):
    table = pyarrow.parquet.read_table(run.folder.path / "rollouts" / "step-00000.parquet")
    assert table.schema.metadata[b"schema"] == b"lossmith rollouts 1"
    seen = {name for name in table.column_names if "." in name}
    assert seen - {"seen.old_logp"} == {
        "seen.ref_logp", "seen.reward", "seen.group", "seen.truncated", "seen.lag",
        "credit.advantage", "credit.weight", "credit.mismatch",
    }  # fmt: skip
    for row in table.to_pylist():
        assert all(len(row[name]) == len(row["tokens"]) for name in seen if isinstance(row[name], list))


def test_the_runs_own_loss_gives_its_own_advantages_and_value(run):
    for record, line in zip(steps_of(run), run.folder.metrics(), strict=True):
        (mine,) = replay(record, [run.learner.loss]).losses
        assert record.source == "Lossmith" and record.step == line["step"]
        assert mine.advantage_gap < 1e-6
        if run.recipe.updates_per_step == 1:
            assert mine.value == pytest.approx(line["loss"], abs=1e-5)


def test_a_file_of_a_newer_schema_is_refused(run, tmp_path):
    table = pyarrow.parquet.read_table(run.folder.path / "rollouts" / "step-00000.parquet")
    file = tmp_path / "step-00000.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"schema": b"lossmith rollouts 2"}), file)
    for read in (read_recorded, ls.read_rollouts):
        with pytest.raises(ls.RunError, match="of the schema 'lossmith rollouts 2'"):
            read(file)


def test_the_gradient_under_the_steps_weights_is_the_one_that_was_applied(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo@trl", steps=1, max_grad_norm=1e9))
    (record,) = steps_of(run)
    found = under_model(record, [run.learner.loss], tiny.loaded())
    applied = run.folder.metrics()[0]["grad_norm"]
    assert found.grad_norm["grpo@trl"] == pytest.approx(applied, rel=1e-5)
    assert found.ratio == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert found.kl_behavior == pytest.approx(0.0, abs=1e-9)
    assert found.effective_sample_size == pytest.approx(1.0, abs=1e-6)


def test_gradients_in_parameter_space_have_the_angles_of_autograd(tmp_path):
    run = ls.train(**settings(tmp_path, loss="grpo@trl", steps=1))
    (record,) = steps_of(run)
    losses = [ls.get_loss(name) for name in ("grpo@trl", "dr_grpo(max_length=10)", "reinforce")]
    found = under_model(record, losses, tiny.loaded())
    policy = tiny.loaded()
    rollouts = ls.read_rollouts(run.folder.path / "rollouts" / "step-00000.parquet")
    grads = []
    for loss in losses:
        out = ls.token_outputs(policy, rollouts, run.recipe.sampling)
        fields = {k: v.float() if v.is_floating_point() else v for k, v in record.fields.items()}
        loss(ls.Batch(**fields | {"logp": out.logp})).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]).double())
        policy.model.zero_grad()
    for i, a in enumerate(grads):
        assert found.grad_norm[losses[i].name] == pytest.approx(float(a.norm()), rel=1e-4)
        for j, b in enumerate(grads):
            assert float(found.cosines[i, j]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if "@" not in name])
def test_every_loss_is_replayed_or_says_what_is_missing(run, name):
    record = steps_of(run)[0]
    loss = example_loss(name)
    (found,) = replay(record, [loss]).losses
    if found.refused:
        assert "which the file does not hold" in found.refused or loss.name.split("(")[0] in found.refused
        return
    fields = dict(record.fields)
    fields.setdefault("old_logp", fields["behavior_logp"])
    logp = fields["old_logp"].clone().requires_grad_()
    value = loss(ls.Batch(logp=logp, **fields)).loss
    assert found.value == pytest.approx(float(value.detach()), abs=1e-12)
    grad = torch.autograd.grad(value, logp, allow_unused=True)[0]
    assert torch.equal(found.pull, torch.zeros_like(logp) if grad is None else -grad)


def test_pulls_of_a_loss_and_of_its_negative_point_apart(run):
    record = steps_of(run)[0]
    found = replay(record, [ls.get_loss("grpo@trl"), ls.get_loss("grpo@trl", advantage_mul=-1.0)])
    assert found.cosines[0, 1] == pytest.approx(-1.0)
    pull, other = found.against("reward")
    assert pull == pytest.approx(-other) and pull > 0


# -- other trainers ---------------------------------------------------------------------------------------------------


def trl_file(folder, step, rewards=((1.0, 0.0), (0.0, 0.5))):
    reward = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    groups = reward.view(2, 2)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    table = {"step": [step] * 4, "prompt": ["a", "a", "b", "b"], "completion": ["xx", "y", "zzz", f"w{rewards}"]}
    table |= {"my_reward": reward.tolist(), "advantage": advantage.flatten().tolist()}
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), folder / f"completions_{step:05d}.parquet")


def test_trls_file_gives_trls_advantages_again_and_repeated_rows_are_left_out(tmp_path):
    for step in (1, 2):  # one generation batch, logged twice
        trl_file(tmp_path, step)
    trl_file(tmp_path, 3, ((0.0, 0.2), (1.0, 0.9)))
    first, second = read_recorded(tmp_path)
    assert (first.source, first.step, second.step, len(first)) == ("TRL", 1, 3, 4)
    assert any("4 rows that repeat" in note for note in first.notes)
    (found,) = replay(first, [ls.get_loss("grpo@trl")]).losses
    assert found.advantage_gap < 1e-9
    assert found.value is not None and found.pull is not None


def test_numbers_that_hang_on_unrecorded_log_probabilities_are_not_shown(tmp_path):
    trl_file(tmp_path, 1)
    (record,) = read_recorded(tmp_path)
    (found,) = replay(record, [ls.get_loss("reinforce(advantage='loo')")]).losses
    assert found.value is None  # -A log p
    assert found.pull is not None  # A/Z whatever log p is


def test_the_kl_term_is_left_out_where_the_reference_is_not_recorded(tmp_path):
    trl_file(tmp_path, 1)
    (record,) = read_recorded(tmp_path)
    found, plain = replay(record, [ls.get_loss("grpo"), ls.get_loss("grpo(beta=0)")]).losses
    assert torch.equal(found.pull, plain.pull) and "without its KL term" in found.notes[0]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_verls_lines(tmp_path):
    lines = [
        {"input": "q", "output": text, "gts": None, "score": score, "step": 7}
        for text, score in (("one", 1.0), ("three", 0.0), ("two", 0.25))
    ]
    (record,) = read_recorded(jsonl(tmp_path / "7.jsonl", *lines))
    assert record.source == "verl" and record.step == 7 and len(record) == 3
    assert record.fields["reward"].tolist() == [1.0, 0.0, 0.25] and record.fields["group"].tolist() == [0, 0, 0]
    (found,) = replay(record, [ls.get_loss("grpo@verl")]).losses
    reward = record.fields["reward"]
    expected = (reward - reward.mean()) / (reward.std() + 1e-6)
    assert torch.allclose(found.advantage[:, 0], expected)


def test_nemo_rls_lines(tmp_path):
    line = {
        "content": "text", "rewards": 1.0, "input_lengths": 5, "token_ids": [5, 6, 7, 8, 0], "sample_loss_mask": 1.0,
        "token_loss_mask": [0, 0, 1, 1, 0], "advantages": [0.0, 0.0, 0.7, 0.7, 0.0],
        "generation_logprobs": [0, 0, -1.0, -2.0, 0], "prev_logprobs": [0, 0, -1.1, -2.1, 0], "idx": 0,
    }  # fmt: skip
    other = line | {"rewards": 0.0, "advantages": [0.0, 0.0, -0.7, -0.7, 0.0]}
    (record,) = read_recorded(jsonl(tmp_path / "train_data_step1.jsonl", line, other))
    assert record.source == "NeMo-RL" and record.fields["group"].tolist() == [0, 0]
    assert record.rows[0].tokens == [7, 8] and record.rows[0].prompt_tokens == [5, 6]
    assert record.fields["behavior_logp"].tolist() == [[-1.0, -2.0]] * 2
    assert record.fields["old_logp"].tolist() == [[-1.1, -2.1]] * 2
    assert record.advantage.tolist() == [[0.7, 0.7], [-0.7, -0.7]]


def test_prime_rls_lines_are_replayed_on_their_advantages(tmp_path):
    line = {
        "token_ids": [1, 2, 3], "loss_mask": [False, True, True], "advantages": [0.0, 0.5, 0.5],
        "inference_logprobs": [0.0, -1.0, -0.5], "trainer_logprobs": [0.0, -1.1, -0.4], "entropy": [0.0, 1.0, 1.0],
    }  # fmt: skip
    (record,) = read_recorded(jsonl(tmp_path / "rank_0.jsonl", line, line | {"advantages": [0.0, -1.0, -1.0]}))
    (found,) = replay(record, [ls.get_loss("grpo@trl")]).losses
    assert not found.refused, found.refused
    assert record.source == "prime-rl" and "on the recorded advantages" in found.notes[0]
    assert found.pull.tolist() == [[0.125, 0.125], [-0.25, -0.25]]  # A over four tokens
    weight = torch.tensor([-0.1, 0.1, -0.1, 0.1], dtype=torch.float64).exp()
    expected = float(weight.sum() ** 2 / (4 * (weight**2).sum()))
    assert replay(record, [ls.get_loss("grpo@trl")]).effective_sample_size == pytest.approx(expected)


def test_verifiers_traces(tmp_path):
    def node(parent, role, ids, mask, logprobs=()):
        message = {"role": role, "content": role}
        return {"parent": parent, "message": message, "token_ids": ids, "mask": mask, "logprobs": list(logprobs)}

    nodes = [
        node(None, "user", [1, 2], [False, False]),
        node(0, "assistant", [3, 4, 5], [False, True, True], [-0.5, -0.25]),
        node(1, "tool", [6], [False]),
        node(2, "assistant", [7], [True], [-2.0]),
    ]
    trace = {"nodes": nodes, "rewards": {"a": {"score": 1.0, "weight": 0.5}, "b": {"score": 2.0}, "c": None}}
    (record,) = read_recorded(
        jsonl(tmp_path / "traces.jsonl", {"id": "x", "task": {}, "group": {"id": "g"}, "traces": [trace]})
    )
    assert record.source == "verifiers"
    assert record.fields["mask"].tolist() == [[True, True, False, True]]
    assert record.fields["behavior_logp"].tolist() == [[-0.5, -0.25, 0.0, -2.0]]
    assert record.fields["reward"].tolist() == [2.5]
    assert record.rows[0].tokens == [4, 5, 6, 7]


def test_open_instructs_lines(tmp_path):
    line = {
        "prompt_tokens": [1, 2], "response_tokens": [3, 4], "reward": 1.0, "advantage": 0.7, "finish_reason": "length",
        "logprobs": [-1.0, -1.5], "prompt_idx": 4,
    }  # fmt: skip
    (record,) = read_recorded(jsonl(tmp_path / "r.jsonl", line, line | {"reward": 0.0, "finish_reason": "stop"}))
    assert record.source == "open-instruct" and record.fields["truncated"].tolist() == [True, False]
    assert record.advantage.tolist() == [[0.7, 0.7]] * 2 and record.fields["group"].tolist() == [0, 0]


def test_a_schema_of_ones_own_is_mapped(tmp_path):
    file = jsonl(tmp_path / "own.jsonl", {"text": "ab", "points": 1, "q": 1}, {"text": "c", "points": 0, "q": 1})
    with pytest.raises(ls.RunError, match=r"own.jsonl:1: a line with text, points, q is of no trainer that is known"):
        read_recorded(file)
    (record,) = read_recorded(file, {"reward": "points", "completion": "text", "group": "q"})
    assert record.fields["reward"].tolist() == [1.0, 0.0] and record.fields["mask"].sum(1).tolist() == [2, 1]
    with pytest.raises(ls.RunError, match=r"--map reward=score: .* has no 'score'; it has text, points, q"):
        read_recorded(file, {"reward": "score"})
    with pytest.raises(ls.RunError, match=r"--map rewrd=...: there is no field 'rewrd'. Did you mean 'reward'"):
        read_recorded(file, {"rewrd": "points"})


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pkl", b"\x80\x04", "is a pickle, and reading one runs the code in it"),
        ("a.pt", b"PK", "is a pickle"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"{]\n", "a.jsonl:1: the line is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: the line must be an object"),
        (
            "a.jsonl",
            b'{"input": "a", "output": "b", "score": "high"}\n',
            "a.jsonl:1: score must be a number, not 'high'",
        ),
        ("a.parquet", b"PAR1", "cannot be read as a parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_words(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ls.RunError) as error:
        read_recorded(file)
    assert words in str(error.value)


def test_a_folder_without_rollouts_and_a_path_that_is_none_are_refused(tmp_path):
    with pytest.raises(ls.RunError, match="holds no rollouts"):
        read_recorded(tmp_path)
    with pytest.raises(ls.RunError, match="there is no file or folder"):
        read_recorded(tmp_path / "none")


def test_another_tokenizers_ids_are_refused(tmp_path):
    line = {"prompt_tokens": [1], "response_tokens": [70_000], "reward": 1.0}
    (record,) = read_recorded(jsonl(tmp_path / "r.jsonl", line, line | {"reward": 0.0}))
    with pytest.raises(ls.RunError, match="written with another tokenizer"):
        under_model(record, [ls.get_loss("reinforce")], tiny.loaded())


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_the_runs_own_loss_first_and_writes_json_and_a_picture(run, tmp_path):
    place = run.folder.path
    shown = shell.lossmith("replay", place, "-o", tmp_path / "picture.svg")
    first = next(line for line in shown.stdout.splitlines() if line.startswith("grpo"))
    assert first.endswith("as recorded")  # its advantages are
    assert "cosine of the pulls" in shown.stdout and (tmp_path / "picture.svg").stat().st_size > 5_000
    found = json.loads(
        shell.lossmith("replay", place, "--loss", "grpo", "--loss", "rloo", "--step", 0, "--json").stdout
    )
    assert [x["name"] for x in found["losses"]] == ["grpo", "rloo"] and found["step"] == 0
    assert len(found["losses"][0]["pull"]) == found["completions"]


def test_the_command_refuses_a_step_that_is_not_there(run):
    shown = shell.lossmith("replay", run.folder.path, "--step", 9, code=2)
    assert "--step 9: recorded are 0, 1." in shown.stderr


def test_the_command_asks_a_model_too(run):
    shown = shell.lossmith("replay", run.folder.path, "--loss", "grpo@trl", "--step", 0, "--model", tiny.folder())
    assert "under the model" in shown.stdout and "|dL/dθ|" in shown.stdout
