"""Against a real vLLM: LOSSMITH_VLLM names the Python of an environment that it is installed in.

LOSSMITH_VLLM=/opt/vllm/bin/python python -m pytest -m parity tests/live/test_vllm_server.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from lossmith.errors import RunError
from lossmith.policy import SamplingSettings, token_outputs
from lossmith.samplers import open_vllm

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif("LOSSMITH_VLLM" not in os.environ, reason="LOSSMITH_VLLM names no Python with vLLM"),
]
SAMPLING = SamplingSettings(temperature=0.7, max_tokens=16)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    made = open_vllm(
        tiny.policy(tiny.served()), SAMPLING, url=None, timeout=600.0, folder=tmp_path_factory.mktemp("s"),
        probe=tiny.prompts()[0], context=128,
    )  # fmt: skip
    yield made
    made.close()


def move(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(policy.version)))
    policy.version += 1


def test_after_every_push_the_servers_numbers_are_the_learners(sampler):
    for _ in range(3):
        measured = sampler.push()
        print(sampler.policy.version, measured)
        assert measured["push_gap"] < 1e-4 and measured["push_tensors"] > 0
        rollouts = sampler.sample(tiny.prompts(), 8, seed=0, step=0)
        ours = token_outputs(sampler.policy, rollouts, SAMPLING)
        for row, rollout in zip(ours.logp, rollouts, strict=True):
            assert torch.allclose(row[: len(rollout.completion_ids)], rollout.behavior_logp.values, atol=1e-3)
            assert rollout.behavior_logp.distribution.policy_version == sampler.policy.version
        move(sampler.policy)


def test_drawn_again_the_texts_are_the_same(sampler):
    first, again, other = (sampler.sample(tiny.prompts(), 8, seed=0, step=s) for s in (4, 4, 5))
    same = [a.completion_ids == b.completion_ids for a, b in zip(first, again, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # another batch shape may round the other way
    assert [r.completion_ids for r in first] != [r.completion_ids for r in other]


def test_a_push_that_is_lost_on_the_way_is_caught(sampler, monkeypatch):
    ask = sampler.routes.ask
    sampler.push()
    move(sampler.policy)
    monkeypatch.setattr(sampler.routes, "ask", lambda path, *a, **k: None if "rpc" in path else ask(path, *a, **k))
    with pytest.raises(RunError, match=r"did not arrive.*server\.log.*resume it"):
        sampler.push()
    monkeypatch.undo()
    assert sampler.push()["push_gap"] < 1e-4


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_leaves_no_server_behind_however_it_ends(tmp_path, end):
    (tmp_path / "scorer.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Prompt {i}?"}}\n' for i in range(12)))
    options = {
        "prompts": "prompts.jsonl", "scorer": "scorer.py:score", "model": str(tiny.folder("served")),
        "steps": "1000", "held-out": "4",
        "prompts-per-step": "2", "samples-per-prompt": "4", "max-tokens": "8", "runs": "runs", "name": "r",
        "sampler": "vllm", "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("--" + key, value)]
    run = subprocess.Popen(
        [sys.executable, "-m", "lossmith", "train", *words], cwd=tmp_path, env=os.environ | {"PWD": str(tmp_path)}
    )
    within(600, lambda: (tmp_path / "runs/r/metrics.jsonl").exists() or run.poll() is not None)
    servers = [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in environment(p)]
    assert len(servers) > 3  # the run, the shell, the server and what it started
    run.send_signal(end)
    run.wait(60)
    within(30, lambda: not any(p.exists() for p in servers))


def environment(process):
    """What a process was told, the run's working folder for one."""
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def within(seconds, true):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
