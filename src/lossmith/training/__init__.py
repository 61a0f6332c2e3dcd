"""The rollout-to-update loop: recipe, learner, run folder."""

from lossmith.intervals import Interval
from lossmith.training.bench import Measurement, measure_recipe
from lossmith.training.evaluate import Evaluation
from lossmith.training.learner import Learner, Update
from lossmith.training.loop import Run, Step, learn
from lossmith.training.prepare import Plan, open_run, plan
from lossmith.training.recipe import Recipe

__all__ = [
    "Evaluation",
    "Interval",
    "Learner",
    "Measurement",
    "Plan",
    "Recipe",
    "Run",
    "Step",
    "Update",
    "learn",
    "measure_recipe",
    "open_run",
    "plan",
]
