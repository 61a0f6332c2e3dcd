"""Lossmith: policy learning for RLHF with a loss that is what its name says.

import lossmith as ls
loss = ls.get_loss("grpo", beta=0.04)          # a value: print(loss) is its formula
out = loss(ls.Batch(logp, mask, old_logp=..., ref_logp=..., reward=..., group=...))
run = ls.train(scorer=my_function, loss=loss)  # the whole loop on a real model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.lazy import lazy_names

__version__ = "0.1.0"

# Names are imported when they are first used: `import lossmith.losses` must load torch and nothing more.
if TYPE_CHECKING:
    from lossmith import losses
    from lossmith.api import prefer, resume, resume_on_cluster, resume_preferences, train, train_on_cluster
    from lossmith.cluster import ClusterRun, Placement
    from lossmith.errors import (
        AddressError,
        FeedbackError,
        FinishedError,
        LossError,
        LossmithError,
        PolicyError,
        PromptError,
        ProofError,
        RecipeError,
        RunError,
        ScorerError,
        StageError,
        TrapWarning,
    )
    from lossmith.explanation import explain
    from lossmith.losses import (
        GAE,
        KL,
        TD,
        Batch,
        Clip,
        CompletionLoss,
        Credit,
        LogP,
        Loss,
        LossOutput,
        Normalizer,
        NoTrust,
        PolicyLoss,
        ValueLoss,
        all_parameters,
        get_loss,
        list_losses,
        register_loss,
    )
    from lossmith.outputs import sample_outputs
    from lossmith.policy import (
        LoraSettings,
        Policy,
        SamplingSettings,
        load_policy,
        merge_adapter,
        sample,
        token_outputs,
    )
    from lossmith.project import Project
    from lossmith.prompts import Prompt, PromptSet, load_prompts
    from lossmith.proofs import Audit, audit, check_loss, prove
    from lossmith.replay import read_recorded
    from lossmith.report.loss import Comparison, compare
    from lossmith.report.page import write_report
    from lossmith.report.run.doctor import doctor
    from lossmith.report.run.frontier import plot_frontier
    from lossmith.reward_model import train_reward_model
    from lossmith.rollouts import Distribution, LogProbs, Rollout, Score, read_rollouts
    from lossmith.scorers import ABSTAIN, best_of, load_scorer, score_rollouts
    from lossmith.training import Measurement, Recipe, Run, learn, measure_recipe, open_run, plan
    from lossmith.training.hardware import Gpus, plan_hardware

__all__ = [
    "ABSTAIN",
    "GAE",
    "KL",
    "TD",
    "AddressError",
    "Audit",
    "Batch",
    "Clip",
    "ClusterRun",
    "Comparison",
    "CompletionLoss",
    "Credit",
    "Distribution",
    "FeedbackError",
    "FinishedError",
    "Gpus",
    "LogP",
    "LogProbs",
    "LoraSettings",
    "Loss",
    "LossError",
    "LossOutput",
    "LossmithError",
    "Measurement",
    "NoTrust",
    "Normalizer",
    "Placement",
    "Policy",
    "PolicyError",
    "PolicyLoss",
    "Project",
    "Prompt",
    "PromptError",
    "PromptSet",
    "ProofError",
    "Recipe",
    "RecipeError",
    "Rollout",
    "Run",
    "RunError",
    "SamplingSettings",
    "Score",
    "ScorerError",
    "StageError",
    "TrapWarning",
    "ValueLoss",
    "all_parameters",
    "audit",
    "best_of",
    "check_loss",
    "compare",
    "doctor",
    "explain",
    "get_loss",
    "learn",
    "list_losses",
    "load_policy",
    "load_prompts",
    "load_scorer",
    "losses",
    "measure_recipe",
    "merge_adapter",
    "open_run",
    "plan",
    "plan_hardware",
    "plot_frontier",
    "prefer",
    "prove",
    "read_recorded",
    "read_rollouts",
    "register_loss",
    "resume",
    "resume_on_cluster",
    "resume_preferences",
    "sample",
    "sample_outputs",
    "score_rollouts",
    "token_outputs",
    "train",
    "train_on_cluster",
    "train_reward_model",
    "write_report",
]

if not TYPE_CHECKING:  # a type checker reads the names above
    __getattr__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
