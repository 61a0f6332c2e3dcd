"""From what a person writes to a scorer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.files import text_at_home
from lossmith.scorers.address import Address, is_address, shown
from lossmith.scorers.builtin import BUILTINS
from lossmith.scorers.callable import FunctionScorer, PathScorer
from lossmith.scorers.combine import Ensemble, WeightedScorers, check_weights
from lossmith.scorers.http import HttpScorer
from lossmith.scorers.reward_model import RewardModel, check_reward_model
from lossmith.scorers.scorer import Scorer, close_scorer
from lossmith.scorers.seal import MANIFEST, Seal
from lossmith.scorers.settings import ScorerSettings
from lossmith.scorers.steps import StepReward

__all__ = ["check_scorer", "list_scorers", "load_scorer"]

FORMS = (
    "A scorer is a built-in name, 'path/file.py:function', 'module:function', an http:// or https:// address, "
    "a reward model's folder or hub name ('owner/name'), or several of them with weights."
)
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_LIKE_ADDRESS = re.compile(r"https?:|\w*://|[^/\\]*:[^/\\]*@", re.IGNORECASE)
_STEPS = ("steps", "segments", "gain")
_SUM = ("scorers", "weights", "standardize")
_ENSEMBLE = ("scorers", "ensemble", "combine", "penalty")


def load_scorer(spec: Any, *, columns: Collection[str] | None = None, settings: ScorerSettings | None = None) -> Scorer:
    """The scorer that `spec` names:

    - a function or other callable: `prompts, completions, **columns` -> numbers (see `callable.py`);
    - an object with a `name` and `score(rollouts)`: itself;
    - the name of a built-in (`list_scorers()`);
    - `"path/file.py:function"` or `"module:function"`: run in a process of its own, killed when it hangs;
    - `"http://..."` or `"https://..."` (see docs/scorers.md), called within the limits of `settings`;
    - a folder or a hub name, `"owner/name"`, of a reward model;
    - a list of these, summed, or `{"scorers": [...], "weights": [...], "standardize": bool}`;
    - an ensemble: `{"scorers": [...], "combine": "mean" | "worst" | "uncertain", "penalty": 1.0}`, or
      `{"ensemble": "RM/", ...}`, or the folder of an ensemble alone;
    - rewards by step: `{"steps": scorer, "segments": "sentence" | "line" | tokens, "gain": "difference" | "correct" |
      "log"}`.

    `columns` are the names of the prompts' columns, against which a function's parameters are checked; None skips
    that check. `settings` are those of a run. Raises ScorerError where anything does not load.
    """
    if isinstance(spec, str | Path):
        return _load_text(text_at_home(str(spec), ScorerError), columns, settings)
    if isinstance(spec, Mapping):
        return _load_combined(spec, columns, settings)
    if isinstance(spec, Sequence):
        return _load_combined({"scorers": spec}, columns, settings)
    if not isinstance(spec, type) and isinstance(spec, Scorer):
        return spec
    if callable(spec):
        return FunctionScorer(spec, columns, settings)
    raise ScorerError(f"{shown(repr(spec))} is not a scorer. {FORMS}")


def check_scorer(spec: Any, *, columns: Collection[str] | None = None) -> None:
    """Everything `load_scorer` checks, short of loading a reward model's weights; nothing stays behind.

    ScorerError where the scorer cannot work. Functions named by a path are imported, in a process of their own.
    """
    if isinstance(spec, str | Path):
        spec = text_at_home(str(spec), ScorerError)
    if isinstance(spec, Mapping):
        members, combine = _read_combined(spec)
        for member in members:
            check_scorer(member, columns=columns)
        combine([BUILTINS["length"]] * len(members))  # the settings of the combination, whatever is combined
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        check_scorer({"scorers": spec}, columns=columns)
    elif isinstance(spec, str) and "ensemble" in _manifest(spec):
        check_scorer({"ensemble": spec}, columns=columns)
    elif isinstance(spec, str) and _names_reward_model(spec):
        check_reward_model(spec)
    else:
        scorer = load_scorer(spec, columns=columns)
        if scorer is not spec:  # a live object is its owner's to close
            close_scorer(scorer)


def list_scorers() -> dict[str, str]:
    """Built-in scorers: name -> what it measures, in one line."""
    return {name: builtin.summary for name, builtin in sorted(BUILTINS.items())}


def _load_text(spec: str, columns: Collection[str] | None, settings: ScorerSettings | None) -> Scorer:
    if spec in BUILTINS:
        return BUILTINS[spec]
    if is_address(spec):
        return HttpScorer(spec, settings=settings)
    if _LIKE_ADDRESS.match(spec):
        Address.of(spec)  # ScorerError, with the key in it hidden
    if "ensemble" in _manifest(spec):
        return _load_combined({"ensemble": spec}, columns, settings)
    if _names_reward_model(spec):
        return RewardModel(spec)
    if spec.endswith(".py"):
        raise ScorerError(f"scorer {spec!r} names a file but no function in it; write {spec + ':function'!r}.")
    if ":" in spec:
        return PathScorer(spec, columns, settings)
    if "/" in spec:
        raise ScorerError(f"there is no folder {spec!r} (looked from {Path.cwd()}). {FORMS}")
    raise ScorerError(f"there is no scorer {spec!r}.{nearest(spec, BUILTINS)} {FORMS}")


def _names_reward_model(spec: str) -> bool:
    if spec in BUILTINS:
        return False
    return os.path.isdir(spec) or (_HUB_NAME.fullmatch(spec) is not None and not spec.endswith(".py"))


def _load_combined(spec: Mapping[str, Any], columns: Collection[str] | None, settings: ScorerSettings | None) -> Scorer:
    """Load the members, and make one scorer of them."""
    members, combine = _read_combined(spec)
    loaded: list[Scorer] = []
    try:
        for member in members:
            loaded.append(load_scorer(member, columns=columns, settings=settings))
        return combine(loaded)
    except BaseException:  # leave no process of the first behind when the second does not load
        for scorer, member in zip(loaded, members, strict=False):
            if scorer is not member:
                close_scorer(scorer)
        raise


def _read_combined(spec: Mapping[str, Any]) -> tuple[list[Any], Callable[[Sequence[Scorer]], Scorer]]:
    """(the members' specs, what makes one scorer of the members)."""
    known = _STEPS if "steps" in spec else _ENSEMBLE if "ensemble" in spec or "combine" in spec else _SUM
    for key in spec:
        if key not in known:
            raise ScorerError(f"a combined scorer has no setting {key!r}.{nearest(key, known)}")
    if known is _STEPS:
        settings = {key: spec[key] for key in ("segments", "gain") if key in spec}
        return [spec["steps"]], lambda scorers: StepReward(scorers[0], **settings)
    defaults: dict[str, Any] = {}
    members = spec.get("scorers")
    if "ensemble" in spec:
        members, defaults = _members(text_at_home(str(spec["ensemble"]), ScorerError))
    if not isinstance(members, Sequence) or isinstance(members, str) or not members:
        spec_text = shown(repr(dict(spec)))
        raise ScorerError(f'a combined scorer is {{"scorers": [...], "weights": [...]}}, not {spec_text}. {FORMS}')
    if any(isinstance(member, Mapping) and "steps" in member for member in members):
        raise ScorerError(
            "rewards by step cannot be summed with others: combine the scorers inside of `steps` instead."
        )
    if known is _ENSEMBLE:
        settings = {key: spec.get(key, defaults.get(key)) for key in ("combine", "penalty")}
        return list(members), lambda scorers: Ensemble(scorers, **{k: v for k, v in settings.items() if v is not None})
    weights, standardize = spec.get("weights"), spec.get("standardize", False)
    check_weights(weights, len(members))
    if not isinstance(standardize, bool):
        raise ScorerError(f"standardize is true or false, not {standardize!r}.")
    return list(members), lambda scorers: WeightedScorers(scorers, weights, standardize)


def _members(folder: str) -> tuple[list[str], dict[str, Any]]:
    """(folders of the members, how they are combined by default) of an ensemble that `lossmith reward train` wrote."""
    manifest = _manifest(folder)
    if "ensemble" not in manifest:
        raise ScorerError(f"{shown(folder)!r} is no ensemble of reward models: train one with `lossmith reward train`.")
    Seal.of(folder)  # its members are those that were trained together
    if not isinstance(manifest["ensemble"], list) or not all(isinstance(name, str) for name in manifest["ensemble"]):
        raise ScorerError(f'{folder!r}: its {MANIFEST} is damaged: "ensemble" is no list of folders.')
    return [str(Path(folder) / name) for name in manifest["ensemble"]], manifest


def _manifest(folder: str) -> dict[str, Any]:
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
