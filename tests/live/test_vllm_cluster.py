"""vLLM's servers beneath a cluster's samplers, on a real Ray: LOSSMITH_VLLM names the Python that vLLM is in.

LOSSMITH_VLLM=/opt/vllm/bin/python python -m pytest -m parity tests/live/test_vllm_cluster.py      # minutes
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster_runs import SERVED, kill, left, recipe, rollouts, train

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif("LOSSMITH_VLLM" not in os.environ, reason="LOSSMITH_VLLM names no Python with vLLM"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
ON_RAY = ("--cluster", "ray", "--samplers", "2")


def ended(run, path, name):
    code = run.wait(timeout=1200)
    return code, (path.parent / f"{name}.log").read_text()


def metrics(path, name):
    return [json.loads(x) for x in (path.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the recipe, what its run has written)."""
    path = recipe(tmp_path_factory.mktemp("served"), steps=4, checkpoint_every=1, **SERVED)
    code, said = ended(train(path, "undisturbed", *ON_RAY), path, "undisturbed")
    assert code == 0, said
    return path, rollouts(path.parent / "runs" / "undisturbed")


def test_every_push_is_proven_on_each_sampler_and_recorded(undisturbed):
    path, written = undisturbed
    assert len(written) == len({row[:3] for row in written}) == 4 * 4 * 4
    for line in metrics(path, "undisturbed"):
        assert line["push_samplers"] == 2 and line["push_tensors"] > 0 and line["push_tokens"] > 0
        assert line["push_gap"] < 1e-4
    assert left(path, "undisturbed") == []


@pytest.mark.parametrize("kind", ["EngineCore", "SamplerProcess", "LearnerProcess"])
def test_whoever_is_killed_no_rollout_is_lost_or_used_twice_and_no_server_is_left(undisturbed, kind):
    path, expected = undisturbed
    run = train(path, kind, *ON_RAY)
    killed = kill(run, path, kind, kind, times=1, seed=1)
    code, said = ended(run, path, kind)
    assert code == 0 and len(killed) == 1, said
    written = rollouts(path.parent / "runs" / kind)
    assert [row[:3] for row in written] == [row[:3] for row in expected]
    same = [mine == theirs for mine, theirs in zip(written, expected, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # another batch shape may round the other way
    assert all(line["push_gap"] < 1e-4 for line in metrics(path, kind) if "push_gap" in line)
    assert sum(line.get("push_restarts", 0) for line in metrics(path, kind)) == (kind == "EngineCore")
    assert left(path, kind) == []


def test_a_push_that_never_arrives_at_one_of_them_stops_the_run(tmp_path, monkeypatch):
    program = tmp_path / "python"
    between = Path(__file__).with_name("dropping.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {between} {os.environ["LOSSMITH_VLLM"]} 2 "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LOSSMITH_VLLM", str(program))
    path = recipe(tmp_path, steps=6, **SERVED)
    code, said = ended(train(path, "dropped", *ON_RAY), path, "dropped")
    assert code == 2 and "did not arrive" in said and "lossmith train --resume" in said, said
    assert len(metrics(path, "dropped")) == 2  # the pushes of the first two steps arrived
    assert left(path, "dropped") == []
