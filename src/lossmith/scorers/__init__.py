"""Scorers: where the rewards come from.

A scorer file may say `from lossmith.scorers import ABSTAIN`, so importing this package loads nothing heavy:
every other name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.lazy import lazy_names
from lossmith.scorers.function import ABSTAIN

if TYPE_CHECKING:
    from lossmith.scorers.best_of_n import BestOf, best_of
    from lossmith.scorers.builtin import BUILTINS
    from lossmith.scorers.callable import FunctionScorer, PathScorer
    from lossmith.scorers.combine import WeightedScorers
    from lossmith.scorers.http import HttpScorer
    from lossmith.scorers.load import check_scorer, list_scorers, load_scorer
    from lossmith.scorers.reward_model import RewardModel
    from lossmith.scorers.scorer import Scorer, close_scorer, score_rollouts
    from lossmith.scorers.settings import ScorerSettings

__all__ = [
    "ABSTAIN",
    "BUILTINS",
    "BestOf",
    "FunctionScorer",
    "HttpScorer",
    "PathScorer",
    "RewardModel",
    "Scorer",
    "ScorerSettings",
    "WeightedScorers",
    "best_of",
    "check_scorer",
    "close_scorer",
    "list_scorers",
    "load_scorer",
    "score_rollouts",
]

if not TYPE_CHECKING:  # a type checker reads the names above
    __getattr__ = lazy_names(__name__, __file__)
