"""A run on a Ray cluster: the numbers of one process, whoever is lost; and samplers that are not too far ahead."""

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lossmith as ls
import tiny
from cluster_runs import KINDS, kill, learned, recipe, rollouts, steps_done, train
from lossmith.cluster.ahead import Ahead, Buffer
from lossmith.cluster.remote import together
from lossmith.prompts import Prompt, PromptSet
from lossmith.ranks import Ranks
from lossmith.rollouts import Distribution, LogProbs, Rollout, Score
from lossmith.training.metrics import of_lag
from lossmith.training.sharing import Sampling

PROMPTS = PromptSet(tuple(Prompt(({"role": "user", "content": f"Say {k}."},)) for k in range(12)), "prompts")


# -- rounds ahead ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Policy:
    version: int = 0


class Samplers:
    """Texts that say which weights wrote them, a moment after they were asked for."""

    def __init__(self, policy, pause=0.0):
        self.policy, self.pause, self.version, self.asked, self.measured = policy, pause, 0, [], {}

    def push(self):
        self.version, self.measured = self.policy.version, {"push_samplers": 0}
        return self.measured

    def as_of_now(self):
        new = Samplers(self.policy, self.pause)
        new.version, new.asked = self.version, self.asked
        return new

    def sample(self, prompts, n, *, seed, step, on_progress=None, on_group=None):
        self.asked.append((step, self.version))
        time.sleep(self.pause)
        self.measured |= {"push_samplers": 1, "of": self.version}
        behavior = LogProbs(torch.tensor([-1.0]), Distribution(self.version))
        return [Rollout(p, k, (1,), (2,), f"{step}", behavior, "eos") for p in prompts for k in range(n)]

    def close(self):
        pass


class One:
    name = "one"

    def score(self, rollouts):
        return [Score(1.0) for _ in rollouts]


def loop(folder, staleness, steps=6, first=0, updates=1, samplers=None, buffer=None):
    """The rounds of a run in which each moves the policy by so many versions: (versions that wrote them, the task)."""
    samplers = samplers or Samplers(Policy(first * updates))
    recipe = ls.Recipe.make(
        steps=steps, prompts_per_step=3, samples_per_prompt=2, max_staleness=staleness, updates_per_step=updates
    )
    own = Sampling(recipe, samplers, One(), Ranks())
    ahead = Ahead(own, samplers, samplers.policy, PROMPTS, buffer or Buffer(folder, first, fresh=False))
    seen = []
    for step in range(first, steps):
        pushed = samplers.push()
        prompts = PROMPTS.batch(step, 3, recipe.seed)
        found, _ = ahead(prompts, 2, step)
        written = [(r.prompt.id, r.sample, r.completion) for r in found]
        assert written == [(p.id, k, f"{step}") for p in prompts for k in range(2)]
        seen.append({r.behavior_logp.distribution.policy_version for r in found})
        assert pushed.get("of") in (None, *seen[-1])  # the recorded proof is of the weights that wrote the round
        assert pushed["push_samplers"] == ((step, pushed.get("of")) in samplers.asked)
        samplers.policy.version += updates
    return seen, ahead


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("pause", [0.0, 0.02])  # samplers that wait for the learner, and a learner that waits
@pytest.mark.parametrize("updates", [1, 2])
def test_a_round_is_written_by_the_policy_of_so_many_rounds_before_whoever_is_slow(tmp_path, staleness, pause, updates):
    seen, _ = loop(tmp_path, staleness, updates=updates, samplers=Samplers(Policy(), pause))
    assert seen == [{updates * max(step - staleness, 0)} for step in range(6)]


def test_held_out_prompts_are_written_by_the_policy_as_it_is(tmp_path):
    samplers = Samplers(Policy())
    _, ahead = loop(tmp_path, 2, samplers=samplers)
    samplers.push()
    found, _ = ahead(list(PROMPTS)[:2], 1, -1)
    assert {r.behavior_logp.distribution.policy_version for r in found} == {6}


def test_rounds_that_were_kept_are_learned_from_by_the_next_learner_and_not_written_again(tmp_path):
    loop(tmp_path, 2, steps=6)  # lost after its last step, with a checkpoint of step 4
    samplers = Samplers(Policy(4))
    seen, _ = loop(tmp_path, 2, steps=6, first=4, samplers=samplers)
    assert seen == [{2}, {3}] and samplers.asked == []
    assert {p.name for p in (tmp_path / "buffer").iterdir()} == {"step-00004.parquet", "step-00005.parquet"}


def test_rounds_of_other_settings_or_outside_the_bound_are_written_again(tmp_path):
    loop(tmp_path, 0, steps=6)
    samplers = Samplers(Policy(4))
    loop(tmp_path, 0, first=4, samplers=samplers, buffer=Buffer(tmp_path, 4, fresh=True))
    assert samplers.asked == [(4, 4), (5, 5)]
    behind = Samplers(Policy(9))  # another number of updates came before than when the rounds were kept
    seen, _ = loop(tmp_path, 0, first=4, samplers=behind)
    assert seen == [{9}, {10}]
    damaged = tmp_path / "buffer" / "step-00005.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    assert Buffer(tmp_path, 4, fresh=False).read(5, PROMPTS.batch(5, 3, 0), 2) is None


def test_rounds_are_forgotten_once_no_checkpoint_goes_back_to_them(tmp_path):
    _, ahead = loop(tmp_path, 0)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step:05d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00006.partial").mkdir()
    ahead.buffer.forget()
    assert sorted(int(p.stem[-5:]) for p in (tmp_path / "buffer").iterdir()) == [2, 3, 4, 5]


def test_of_several_samplers_the_worst_proof_is_recorded():
    proofs = [
        {"push_tensors": 9.0, "push_gap": 0.1, "push_tokens": 40.0, "push_restarts": 2.0},
        {"push_tensors": 8.0, "push_gap": 0.3, "push_tokens": 30.0},
    ]
    expected = {"push_tensors": 8.0, "push_gap": 0.3, "push_tokens": 70.0, "push_restarts": 2.0, "push_samplers": 2.0}
    assert together(proofs) == expected


def test_lag_is_counted_in_optimizer_steps():
    batch = ls.Batch(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), lag=torch.tensor([0, 3]))
    assert of_lag(batch) == {"lag": 1.5, "lag_most": 3.0}
    assert of_lag(batch.replace(lag=torch.tensor([0, 0]))) == {}


# -- what is refused before anything starts ----------------------------------------------------------------------------


def test_a_cluster_is_refused_in_words_before_anything_starts(tmp_path, monkeypatch):
    settings = dict(
        model=str(tiny.folder("llama")),
        runs=str(tmp_path),
        prompts=["a", "b", "c", "d"] * 4,
        held_out=2,
        prompts_per_step=2,
    )
    with pytest.raises(ls.RecipeError, match=r"samplers = 0: .* at least one"):
        ls.Placement(samplers=0)
    with pytest.raises(ls.RecipeError, match=r"max_staleness = 1 .*--cluster ray"):
        ls.train(max_staleness=1, **settings)
    with pytest.raises(ls.RecipeError, match="prompts cannot be given to the processes of a cluster"):
        ls.train_on_cluster(quiet=True, **settings)
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\ne\n")
    settings["prompts"] = str(tmp_path / "p.txt")
    with pytest.raises(ls.RecipeError, match="sampler_url names one server"):
        ls.train_on_cluster(quiet=True, sampler="vllm", sampler_url="http://127.0.0.1:1", **settings)
    with pytest.raises(ls.RecipeError, match="engine = 'trl'"):
        ls.train_on_cluster(quiet=True, engine="trl", **settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ls.RunError, match=r"pip install 'lossmith\[ray\]'"):
        ls.train_on_cluster(quiet=True, **settings)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_policy_that_runs_ahead_has_its_ratio_corrected():
    assert "tis" in str(ls.Recipe.make(loss="grpo", max_staleness=1).policy_loss().to_dict()["mismatch"])
    assert ls.Recipe.make(loss="grpo").policy_loss().to_dict()["mismatch"] == "none"


# -- a real cluster of this machine ------------------------------------------------------------------------------------

ON_RAY = ("--cluster", "ray", "--samplers", "2")


@pytest.fixture(scope="module")
def a_cluster():
    """Some machines that tests run on let no cluster start: that is not what is tested here."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    start = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); ray.get(ray.put(1))"
    try:
        tried = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip("Ray does not start within 3 minutes on this machine")
    if tried.returncode:
        pytest.skip(f"Ray does not start on this machine: {tried.stderr[-300:]}")


def ended(run, path, name):
    code = run.wait(timeout=600)
    return code, (path.parent / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(recipe, the folder of its run in one process)."""
    path = recipe(tmp_path_factory.mktemp("cluster"), pause=0.3, steps=6, checkpoint_every=2)
    assert ended(train(path, "alone"), path, "alone")[0] == 0
    return path, path.parent / "runs" / "alone"


@pytest.mark.slow
@pytest.mark.usefixtures("a_cluster")
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_run_on_a_cluster_is_that_of_one_process_whoever_is_killed(alone, kind):
    """kill -9 twice; ten times each is `python tests/cluster_runs.py`."""
    path, one = alone
    name = kind or "undisturbed"
    run, folder = train(path, name, *ON_RAY), path.parent / "runs" / name
    killed = [] if kind is None else kill(run, path, name, kind, times=2, seed=1)
    code, said = ended(run, path, name)
    assert code == 0 and len(killed) == (0 if kind is None else 2), said
    assert rollouts(folder) == rollouts(one)  # none lost, none used twice
    mine, theirs = learned(folder), learned(one)
    assert [r["reward"] for r in mine] == [r["reward"] for r in theirs]
    for ours, its in zip(mine, theirs, strict=True):
        assert ours == pytest.approx(its, rel=1e-5, abs=1e-6)  # of a batch of another shape the last bits differ
    assert not (folder / "buffer").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("a_cluster")
def test_ctrl_c_finishes_the_step_and_one_process_goes_on(alone):
    path, one = alone
    run, folder = train(path, "stopped", *ON_RAY), path.parent / "runs" / "stopped"
    while run.poll() is None and steps_done(folder) < 2:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    code, said = ended(run, path, "stopped")
    assert code == 130 and "lossmith train --resume" in said, said
    ls.resume(folder, console=ls.terminal.Terminal(quiet=True))
    assert rollouts(folder) == rollouts(one)


@pytest.mark.slow
@pytest.mark.usefixtures("a_cluster")
@pytest.mark.parametrize("slow", ["sampler", "learner"])
def test_samplers_that_run_ahead_stay_within_the_bound_with_two_learners(tmp_path, slow):
    (tmp_path / "loss.py").write_text(
        "import time, lossmith as ls\n"
        "def slow(batch):\n"
        "    time.sleep(0.5)\n"
        "    return (-batch.logp * batch.reward[:, None] * batch.mask).sum() / batch.mask.sum()\n"
    )
    settings = {"loss": "loss.py:slow"} if slow == "learner" else {}
    path = recipe(tmp_path, pause=0.5 if slow == "sampler" else 0.0, steps=5, max_staleness=1, **settings)
    code, said = ended(train(path, "ahead", *ON_RAY, "--ranks", "2"), path, "ahead")
    assert code == 0, said
    lines = map(json.loads, Path(tmp_path, "runs", "ahead", "metrics.jsonl").read_text().splitlines())
    assert [line.get("lag_most", 0) for line in lines] == [0, 1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("a_cluster")
def test_what_fails_over_there_is_said_here(tmp_path):
    path = recipe(tmp_path, steps=2)
    (tmp_path / "score.py").write_text("def score(prompts, completions, **_):\n    raise ValueError('no such word')\n")
    code, said = ended(train(path, "wrong", *ON_RAY), path, "wrong")
    assert code == 2 and "no such word" in said and "Traceback" not in said, said
