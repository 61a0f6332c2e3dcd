"""The rollout-to-update loop: recipe, learner, run folder."""

from lossmith.training.evaluate import Evaluation, Interval
from lossmith.training.learner import Learner, Update
from lossmith.training.loop import Plan, Run, Step, learn, open_run, plan
from lossmith.training.recipe import Recipe

__all__ = [
    "Evaluation",
    "Interval",
    "Learner",
    "Plan",
    "Recipe",
    "Run",
    "Step",
    "Update",
    "learn",
    "open_run",
    "plan",
]
