"""The loop of docs/your-own-loop.md, run as it is printed, moves the policy as `lossmith train` does."""

from pathlib import Path

import torch

import lossmith as ls
import tiny
from lossmith.training.learner import Learner

PAGE = Path(__file__).parents[1] / "docs" / "your-own-loop.md"


def test_the_page_takes_the_same_steps_as_the_learner():
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 50
    changes = {
        '"default"': repr(str(tiny.folder())),
        '"helpful"': "lambda completions, **_: [float(len(set(c))) for c in completions]",
        "max_tokens=48": "max_tokens=9",
        "lr=1e-5": "lr=1e-3",
    }
    for printed, here in changes.items():
        assert code.count(printed) == 1
        code = code.replace(printed, here)
    page: dict = {}
    exec(code, page)

    recipe = ls.Recipe.make(
        loss="grpo(beta=0.04)", temperature=1.0, max_tokens=9, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0,
        micro_batch_tokens=64,
    )  # fmt: skip
    learner = Learner(tiny.loaded(), recipe.policy_loss(), recipe)
    before = [p.clone() for p in learner.policy.parameters()]
    for step in range(2):
        rollouts = ls.sample(learner.policy, page["prompts"], 4, page["settings"], seed=0, step=step)
        tiny.update(learner, ls.score_rollouts(page["scorer"], rollouts), step)
    after = learner.policy.parameters()
    assert any(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    for mine, theirs in zip(page["policy"].parameters(), after, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    page["scorer"].close()
