"""From what a person writes to a scorer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.rewards.builtin import BUILTINS
from lossmith.rewards.callable import FunctionScorer, PathScorer
from lossmith.rewards.combine import WeightedSum
from lossmith.rewards.http import HttpScorer
from lossmith.rewards.reward_model import RewardModel, check_reward_model
from lossmith.rewards.scorer import Scorer, close_scorer

__all__ = ["check_scorer", "list_scorers", "load_scorer"]

FORMS = (
    "A scorer is a built-in name, 'path/file.py:function', 'module:function', an http:// or https:// address, "
    "a reward model's folder or hub name ('owner/name'), or several of them with weights."
)
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_COMBINED = ("scorers", "weights", "standardise")


def load_scorer(spec: Any, *, columns: Collection[str] | None = None) -> Scorer:
    """The scorer that `spec` names:

    - a function or other callable: `prompts, completions, **columns` -> numbers (see `callable.py`);
    - an object with a `name` and `score(rollouts)`: itself;
    - the name of a built-in (`list_scorers()`);
    - `"path/file.py:function"` or `"module:function"`: run in a process of its own, killed when it hangs;
    - `"http://..."` or `"https://..."`;
    - a folder or a hub name, `"owner/name"`, of a reward model;
    - a list of these, summed, or `{"scorers": [...], "weights": [...], "standardise": bool}`.

    `columns` are the names of the prompts' columns, against which a function's parameters are checked; None skips
    that check. Raises ScorerError where anything does not load.
    """
    if isinstance(spec, Path):
        spec = str(spec)
    if isinstance(spec, str):
        return _load_text(spec, columns)
    if isinstance(spec, Mapping):
        return _load_combined(spec, columns)
    if isinstance(spec, Sequence):
        return _load_combined({"scorers": spec}, columns)
    if not isinstance(spec, type) and isinstance(spec, Scorer):
        return spec
    if callable(spec):
        return FunctionScorer(spec, columns)
    raise ScorerError(f"{spec!r} is not a scorer. {FORMS}")


def check_scorer(spec: Any, *, columns: Collection[str] | None = None) -> None:
    """Everything `load_scorer` checks, short of loading a reward model's weights; nothing stays behind.

    ScorerError where the scorer cannot work. Functions named by a path are imported, in a process of their own.
    """
    if isinstance(spec, Mapping):
        members, weights, _ = _read_combined(spec)
        for member in members:
            check_scorer(member, columns=columns)
        if weights is not None and len(weights) != len(members):
            raise ScorerError(f"{len(members)} scorers and {len(weights)} weights; give one weight per scorer.")
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        check_scorer({"scorers": spec}, columns=columns)
    elif isinstance(spec, str | Path) and _names_reward_model(str(spec)):
        check_reward_model(spec)
    else:
        scorer = load_scorer(spec, columns=columns)
        if scorer is not spec:  # a live object is its owner's to close
            close_scorer(scorer)


def list_scorers() -> dict[str, str]:
    """Built-in scorers: name -> what it measures, in one line."""
    return {name: builtin.summary for name, builtin in sorted(BUILTINS.items())}


def _load_text(spec: str, columns: Collection[str] | None) -> Scorer:
    if spec in BUILTINS:
        return BUILTINS[spec]
    if spec.startswith(("http://", "https://")):
        return HttpScorer(spec)
    if _names_reward_model(spec):
        return RewardModel(spec)
    if spec.endswith(".py"):
        raise ScorerError(f"scorer {spec!r} names a file but no function in it; write {spec + ':function'!r}.")
    if ":" in spec:
        return PathScorer(spec, columns)
    if "/" in spec:
        raise ScorerError(f"there is no folder {spec!r} (looked from {Path.cwd()}). {FORMS}")
    raise ScorerError(f"there is no scorer {spec!r}.{nearest(spec, BUILTINS)} {FORMS}")


def _names_reward_model(spec: str) -> bool:
    if spec in BUILTINS:
        return False
    return Path(spec).is_dir() or (_HUB_NAME.fullmatch(spec) is not None and not spec.endswith(".py"))


def _load_combined(spec: Mapping[str, Any], columns: Collection[str] | None) -> WeightedSum:
    members, weights, standardise = _read_combined(spec)
    loaded: list[Scorer] = []
    try:
        for member in members:
            loaded.append(load_scorer(member, columns=columns))
        return WeightedSum(loaded, weights, standardise)
    except BaseException:  # leave no process of the first behind when the second does not load
        for scorer, member in zip(loaded, members, strict=False):
            if scorer is not member:
                close_scorer(scorer)
        raise


def _read_combined(spec: Mapping[str, Any]) -> tuple[list[Any], list[float] | None, bool]:
    for key in spec:
        if key not in _COMBINED:
            raise ScorerError(f"a combined scorer has no setting {key!r}.{nearest(key, _COMBINED)}")
    members = spec.get("scorers")
    if not isinstance(members, Sequence) or isinstance(members, str) or not members:
        raise ScorerError(f'a combined scorer is {{"scorers": [...], "weights": [...]}}, not {dict(spec)!r}. {FORMS}')
    weights = spec.get("weights")
    return list(members), None if weights is None else list(weights), bool(spec.get("standardise", False))
