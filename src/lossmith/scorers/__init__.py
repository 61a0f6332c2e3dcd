"""Scorers: where the rewards come from.

A scorer file may say `from lossmith.scorers import ABSTAIN`, so importing this package loads nothing heavy:
every other name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lossmith.scorers.function import ABSTAIN

if TYPE_CHECKING:
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
    "FunctionScorer",
    "HttpScorer",
    "PathScorer",
    "RewardModel",
    "Scorer",
    "ScorerSettings",
    "WeightedScorers",
    "check_scorer",
    "close_scorer",
    "list_scorers",
    "load_scorer",
    "score_rollouts",
]

_HOMES = {
    "BUILTINS": "builtin",
    "FunctionScorer": "callable",
    "HttpScorer": "http",
    "PathScorer": "callable",
    "RewardModel": "reward_model",
    "Scorer": "scorer",
    "ScorerSettings": "settings",
    "WeightedScorers": "combine",
    "check_scorer": "load",
    "close_scorer": "scorer",
    "list_scorers": "load",
    "load_scorer": "load",
    "score_rollouts": "scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
