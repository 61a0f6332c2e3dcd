"""A user's typed script passes strict type checkers against the wheel that users install."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
from torch import Tensor
from typing_extensions import assert_type

import lossmith as ls
from lossmith import feedback, reward_model


def step(logp: Tensor, mask: Tensor, reward: Tensor, group: Tensor) -> Tensor:
    loss = assert_type(ls.get_loss("grpo", beta=0.04), ls.Loss)
    batch = assert_type(ls.Batch(logp=logp, mask=mask, reward=reward, group=group), ls.Batch)
    credit = assert_type(loss.credit(batch), ls.Credit)
    assert_type(loss.objective(batch.rows(slice(0, 2)), credit.rows(slice(0, 2))), ls.LossOutput)
    return assert_type(loss(batch).loss, Tensor)


def score(completions: list[str], **columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


run = assert_type(ls.train(scorer=score, steps=3), ls.Run)
policy = assert_type(ls.load_policy(dtype="float32"), ls.Policy)
prompts = list(ls.load_prompts(["Why?"]))
rollouts = ls.sample(policy, prompts, 4, ls.SamplingSettings(), seed=0)
assert_type(ls.score_rollouts(ls.load_scorer(score), rollouts), list[ls.Rollout])
assert_type(ls.audit(ls.get_loss("grpo")), ls.Audit)
sets = assert_type(feedback.read_sets("outputs.jsonl"), list[feedback.OutputSet])
train = reward_model.train_reward_model
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment that has the wheel, and beside it what this one has."""
    pytest.importorskip("hatchling")
    place = tmp_path_factory.mktemp("typed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    venv.create(place / "env", with_pip=False)
    site = next((place / "env").glob("lib*/python*/site-packages"))
    install = ["install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *install, *map(str, place.glob("*.whl"))], check=True)
    (site / "others.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("site-packages")))
    (place / "user.py").write_text(SCRIPT)
    return place


def check(place, *command):
    done = subprocess.run([sys.executable, "-m", *command, "user.py"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_strict(installed):
    check(installed, "mypy", "--strict", "--python-executable", str(installed / "env" / "bin" / "python"))


@pytest.mark.slow
def test_pyright_strict(installed):
    pytest.importorskip("basedpyright")
    (installed / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportMissingTypeStubs": false}')
    check(installed, "basedpyright", "--pythonpath", str(installed / "env" / "bin" / "python"))
