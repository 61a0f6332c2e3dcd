"""Several processes are one: every loss, the runs of the command, and what happens when a rank ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import lossmith as ls
import tiny
from lossmith.losses import CATALOGUE, example_loss
from lossmith.policy.sharded import shard
from lossmith.training.recipe import PROVIDED

PROGRAM = Path(__file__).with_name("ranks_program.py")
AT_REST = {"kl_only"}  # it starts at its minimum, where AdamW makes steps of what rounding is left
TRAINS = [n for n in CATALOGUE if n not in AT_REST and example_loss(n).needs <= PROVIDED | {"max_length"}]
OF_ALL_TOKENS = {n for n in TRAINS if "full_kl" in example_loss(n).needs}  # the reference's too
# One of each way of working: by token, by completion, of the whole batch, of pairs, with a critic, all vocabulary, ...
SOME = [
    "grpo", "gspo", "ppo", "reinforce", "dapo", "online_dpo", "rloo", "drgrpo_full_kl", "m2po", "opo", "grpo@trl",
    "grpo@verl", "kto", "full_kl", "reinforce_pp", "gkd", "rlsd",
]  # fmt: skip


def processes(size, command, started=None):
    """The command as every rank, as torchrun starts it; as the first so many, if it starts the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(started or size)
    ]


def ended(those, timeout=600):
    return [(p.communicate(timeout=timeout)[0], p.returncode) for p in those]


def together_and_alone(tmp_path, size, dtype, prompts, losses, held="copies"):
    out = tmp_path / "found.json"
    said = ended(processes(size, [str(PROGRAM), str(out), dtype, str(prompts), held, *losses], started=1))
    assert out.exists(), said
    return json.loads(out.read_text())


def hold(found, parameters, metrics):
    wrong = {name: f for name, f in found.items() if f["parameters"] > parameters or f["metrics"] > metrics}
    assert not wrong
    assert sum(f["moved"] > 1e-3 for f in found.values()) > 0.8 * len(found)


@pytest.mark.slow
def test_ranks_train_as_one_process_does_even_where_one_has_no_completions(tmp_path):
    losses = [name for name in SOME if name in TRAINS]
    assert len(losses) > 8
    hold(together_and_alone(tmp_path, 3, "float64", 2, losses), 1e-10, 1e-9)


@pytest.mark.slow
def test_two_ranks_that_hold_parts_of_the_weights_train_as_one_process_does(tmp_path):
    """Rank 0 has two prompts' completions and rank 1 one's, so that it makes passes that count nothing."""
    hold(together_and_alone(tmp_path, 2, "float64", 3, ["grpo"], "parts"), 1e-10, 1e-9)


@pytest.mark.slow
def test_three_ranks_that_hold_parts_train_as_one_process_does_even_where_one_has_no_completions(tmp_path):
    losses = [name for name in [*SOME, *sorted(OF_ALL_TOKENS)] if name in TRAINS]
    hold(together_and_alone(tmp_path, 3, "float64", 2, losses, "parts"), 1e-10, 1e-9)


@pytest.mark.slow
def test_an_adapter_trains_on_ranks_as_in_one_process_and_is_all_that_is_sent(tmp_path):
    pytest.importorskip("peft")
    found = together_and_alone(tmp_path, 2, "float64", 3, ["grpo", "grpo+lora", "ppo+lora"])
    hold(found, 1e-10, 1e-9)
    assert 0 < found["grpo+lora"]["sent"] < found["grpo"]["sent"] / 5


@pytest.mark.slow
def test_an_adapter_beside_4_bits_trains_on_ranks_as_in_one_process(tmp_path):
    pytest.importorskip("bitsandbytes")
    hold(together_and_alone(tmp_path, 2, "float32", 3, ["grpo+qlora"]), 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_loss_trains_on_ranks_as_in_one_process(tmp_path, size):
    found = together_and_alone(tmp_path, size, "float64", 3, TRAINS)
    assert found.keys() == set(TRAINS)
    # nearly all are within 1e-12; where a gradient is nearly 0, AdamW divides rounding by rounding (1.2e-10 was seen)
    hold(found, 1e-9, 1e-9)


PROMPTS = [f"Question number {i}?" for i in range(12)]


def recipe(tmp_path, **changes):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    fields = dict(
        model=str(tiny.folder()), prompts=str(tmp_path / "p.txt"), held_out=3, scorer="length", steps=3, device="cpu",
        prompts_per_step=3, samples_per_prompt=3, max_tokens=6, dtype="float32", learning_rate=0.01,
        runs=str(tmp_path), checkpoint_every=1,
    ) | changes  # fmt: skip
    file = tmp_path / f"{fields.get('name', 'r')}.toml"
    file.write_text(tomli_w.dumps(fields))
    return file


def lossmith(*words):
    command = [sys.executable, "-m", "lossmith", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def numbers(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one_and_ends_as_one_that_never_stopped(tmp_path):
    """What is sampled is the same to the letter, and so is what is learned, to rounding."""
    alone = ls.train(**ls.Recipe.read(recipe(tmp_path, name="alone")), quiet=True)
    done = lossmith("train", recipe(tmp_path, name="two", steps=2), "--ranks", 2)
    assert done.returncode == 0, done.stderr
    again = lossmith("train", "--resume", tmp_path / "two", "--steps", 3, "--ranks", 1)
    assert again.returncode == 0, again.stderr
    for a, b in zip(numbers(alone.folder.path), numbers(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    texts = [
        [r.completion for step in range(3) for r in ls.read_rollouts(folder / "rollouts" / f"step-0000{step}.parquet")]
        for folder in (alone.folder.path, tmp_path / "two")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_run_in_parts_goes_on_with_one_rank_and_with_three_and_ends_as_one_that_never_stopped(tmp_path):
    more = dict(keep_best=True, evaluate_every=2, loss="grpo(beta=0.1)", weight_decay=0.1)
    alone = ls.train(**ls.Recipe.read(recipe(tmp_path, name="alone", steps=4, **more)), quiet=True)
    done = lossmith("train", recipe(tmp_path, name="parts", steps=2, shard=True, **more), "--ranks", 2)
    assert done.returncode == 0, done.stderr
    for steps, ranks in ((3, 1), (4, 3)):
        again = lossmith("train", "--resume", tmp_path / "parts", "--steps", steps, "--ranks", ranks)
        assert again.returncode == 0, again.stderr
        assert ("shard = true has no effect in one process" in again.stdout) == (ranks == 1)
    for a, b in zip(numbers(alone.folder.path), numbers(tmp_path / "parts"), strict=True):
        assert a == pytest.approx({k: b[k] for k in a}, rel=1e-4, abs=1e-6)
    for kept in ("policy", "policy-best"):
        ours, theirs = (
            load_file(folder / kept / "model.safetensors") for folder in (alone.folder.path, tmp_path / "parts")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(x, theirs[name], atol=1e-5) for name, x in ours.items())


def next_step(tmp_path, name, ranks, shard, of):
    """The same run, gone on with by so many ranks, as the recipe in its folder then says."""
    folder = shutil.copytree(of, tmp_path / name)
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(re.sub(r"(?m)^shard = .*$", f"shard = {str(shard).lower()}", text))
    again = lossmith("train", "--resume", folder, "--steps", 3, "--ranks", ranks)
    assert again.returncode == 0, again.stderr
    return folder


def hold_as_one_that_never_stopped(alone, folder):
    for a, b in zip(numbers(alone), numbers(folder), strict=True):
        assert a == pytest.approx({k: b[k] for k in a}, rel=1e-4, abs=1e-6)
    ours, theirs = (load_file(one / "policy" / "model.safetensors") for one in (alone, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(x, theirs[name], atol=1e-5) for name, x in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2])
def test_the_next_step_is_the_same_whoever_wrote_the_checkpoint_and_whoever_reads_it(tmp_path, writers):
    more = dict(loss="ppo", weight_decay=0.1)  # with a critic, in parts too
    alone = ls.train(**ls.Recipe.read(recipe(tmp_path, name="alone", **more)), quiet=True).folder.path
    shard = writers > 1
    done = lossmith("train", recipe(tmp_path, name="first", steps=2, shard=shard, **more), "--ranks", writers)
    assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "first" / "checkpoints" / "step-00002").glob("*.safetensors"))
    of_ranks = [f"rank-{rank:05d}-00000.safetensors" for rank in range(writers)]
    assert files == (of_ranks if shard else ["optimizer.safetensors", "weights.safetensors"])
    for readers, parts in ((1, True), (2, False), (2, True), (3, True))[0 if shard else 2 :]:
        name = f"{readers}-{parts}"
        hold_as_one_that_never_stopped(alone, next_step(tmp_path, name, readers, parts, tmp_path / "first"))


# What makes a rank's writing of a file go wrong, once; Python runs it before anything else.
AT_WRITING = """
import os, signal
import lossmith.{module} as module
true, calls = module.save_file, []

def save_file(*given, **more):
    calls.append(1)
    if os.environ.get("RANK") == "{rank}" and len(calls) == {call} and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        {what}
    return true(*given, **more)

module.save_file = save_file
"""
FULL = 'raise OSError(28, "No space left on device")'
AT_CHECKPOINT = dict(module="durable.parts", call=2)
# what happens: (to whom, what the run says, the checkpoints that it then has)
INTERRUPTED = {
    "the disk is full on one rank": (dict(AT_CHECKPOINT, rank=1, what=FULL), ["disk is full", "(on rank 1)"], [1, 2]),
    "a rank is killed": (
        dict(AT_CHECKPOINT, rank=1, what="os.kill(os.getpid(), signal.SIGKILL)"), ["rank 1 ended with -9"], [1],
    ),
    "Ctrl-C": (
        dict(AT_CHECKPOINT, rank=0, what="os.kill(os.getpid(), signal.SIGINT)"), ["saved after step 2 of 3"], [1, 2],
    ),
    "the disk is full for the policy": (
        dict(module="policy.saving", call=1, rank=0, what=FULL), ["disk is full"], [2, 3],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_checkpoint_is_whole_or_absent_and_the_run_goes_on(tmp_path, monkeypatch, what):
    wrong, words, kept = INTERRUPTED[what]
    (tmp_path / "sitecustomize.py").write_text(AT_WRITING.format(mark=str(tmp_path / "once"), **wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    alone = ls.train(**ls.Recipe.read(recipe(tmp_path, name="alone")), quiet=True).folder.path
    done = lossmith("train", recipe(tmp_path, name="run", shard=True), "--ranks", 2)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0 and all(word in said for word in words), said
    assert "Traceback" not in said
    found = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*") if not p.suffix)
    assert found == [f"step-{step:05d}" for step in kept]
    again = lossmith("train", "--resume", tmp_path / "run", "--ranks", 2)
    assert again.returncode == 0, again.stderr
    hold_as_one_that_never_stopped(alone, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.slow
def test_where_one_ranks_file_is_damaged_the_checkpoint_before_is_used(tmp_path):
    alone = ls.train(**ls.Recipe.read(recipe(tmp_path, name="alone")), quiet=True).folder.path
    done = lossmith("train", recipe(tmp_path, name="parts", steps=2, shard=True), "--ranks", 2)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "parts" / "checkpoints" / "step-00002" / "rank-00001-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    again = lossmith("train", "--resume", tmp_path / "parts", "--steps", 3, "--ranks", 3)
    assert again.returncode == 0, again.stderr
    assert f"damaged checkpoint (step-00002: {file.name} is damaged)" in " ".join(again.stdout.split())
    hold_as_one_that_never_stopped(alone, tmp_path / "parts")


def test_one_process_has_nobody_to_share_the_weights_with(tmp_path):
    with pytest.raises(
        ls.RecipeError, match="shard = true deals the weights out to several processes, and this run has"
    ):
        ls.train(**ls.Recipe.read(recipe(tmp_path, shard=True)), quiet=True)


def test_a_model_that_cannot_be_dealt_out_is_refused_in_words(monkeypatch):
    policy = tiny.policy()
    next(policy.model.parameters()).requires_grad_(False)
    with pytest.raises(ls.PolicyError, match="of LlamaForCausalLM only some are"):
        shard(policy)
    monkeypatch.setattr("lossmith.policy.sharded.model_layers", lambda model: [])
    with pytest.raises(ls.PolicyError, match="LlamaForCausalLM is not made of layers as transformers has them"):
        shard(tiny.policy())


@pytest.mark.slow
def test_ranks_that_were_given_different_recipes_are_told_which_field_differs(tmp_path):
    files = [recipe(tmp_path, name="a"), recipe(tmp_path, name="b", learning_rate=0.02)]
    code = "import sys, os; sys.argv = ['lossmith', 'train', sys.argv[1 + int(os.environ['RANK'])]]; "
    those = processes(2, ["-c", code + "from lossmith.cli import main; main()", *map(str, files)])
    said = " ".join(ended(those)[0][0].split())
    assert "the ranks do not agree on the recipe: learning_rate is 0.01 on rank 0 and 0.02 on rank 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_rank_that_is_killed_ends_the_run_which_is_saved_and_goes_on(tmp_path, in_parts):
    file = recipe(tmp_path, name="killed", steps=30, shard=in_parts)
    run = subprocess.Popen(
        [sys.executable, "-m", "lossmith", "train", str(file), "--ranks", "2"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = [int(x) for x in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(worker, signal.SIGKILL)
    said = " ".join(run.communicate(timeout=60)[0].split())
    assert run.returncode != 0 and "a rank has ended or does not answer: rank 1 ended with -9" in said
    assert "Go on with: lossmith train --resume" in said
    assert lossmith("train", "--resume", tmp_path / "killed", "--ranks", 2).returncode == 0


@pytest.mark.slow
def test_a_rank_whose_scorer_fails_says_so_in_the_scorers_words(tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import os\n\n\ndef score(prompts, completions):\n    if os.environ.get('RANK') == '1':\n"
        "        raise ValueError('no score on this one')\n    return [1.0] * len(completions)\n"
    )
    done = lossmith("train", recipe(tmp_path, name="s", scorer=f"{scorer}:score"), "--ranks", 2)
    assert done.returncode == 2 and "no score on this one" in done.stderr and "on rank 1" in done.stderr
