"""Guards: the detectors, looking after every step. What they find is said, written down, and may end the run.

The first two that there were: a second score that nothing trains on, and a budget of KL. A reward is a proxy. Pushed
far enough, it goes on rising while what it stands for falls (Goodhart); the distance that the policy has moved is
measured as KL(π_θ || π_ref), and the fall shows against its square root (arXiv:2210.10760).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lossmith.detectors import LEVELS, Diagnosis, Evidence, Finding, Level, Place, StepSeen, examine
from lossmith.losses import Loss
from lossmith.policy import Policy
from lossmith.rollouts import Rollout
from lossmith.scorers.seal import scale_of
from lossmith.training.metrics import in_completions
from lossmith.training.recipe import Recipe
from lossmith.training.run import RunFolder

__all__ = ["Guards", "kl_of_completion", "left_out", "prompt_means"]


@dataclass
class Guards:
    """The detectors of a run, over the steps that it has made so far."""

    guards: Mapping[str, str] = field(default_factory=dict)  # of the recipe
    evidence: Evidence = field(default_factory=lambda: Evidence([]))
    told: dict[str, Level] = field(default_factory=dict)  # the worst level of each detector that was said

    @classmethod
    def of(cls, recipe: Recipe, loss: Loss, policy: Policy) -> Guards:
        evidence = Evidence(
            [],
            recipe.as_toml(),
            cut=left_out(loss),
            dtype=str(policy.compute_dtype).removeprefix("torch."),
            vocabulary=policy.model.config.get_text_config().vocab_size,
            reward_scale=scale_of(recipe.scorer),
        )
        return cls(recipe.guards, evidence)

    def go_on(self, records: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
        """The steps of a run that stopped, and what was said of them; what was said of later ones is forgotten."""
        self.evidence = replace(self.evidence, steps=[StepSeen(r["step"], _numbers(r)) for r in records])
        kept = folder.restore_findings({r["step"] for r in records})
        self.told = {line["detector"]: line["level"] for line in kept}

    def after(self, record: Mapping[str, Any], places: Mapping[str, Sequence[Place]]) -> list[Finding]:
        """What one more step shows that was not said before, or not as badly."""
        seen = StepSeen(record["step"], _numbers(record), places)
        self.evidence = replace(self.evidence, steps=[*self.evidence.steps, seen])
        return self._new(examine(self.evidence, self.guards))

    def at_end(self, rescored: Mapping[str, Any] | None) -> tuple[Diagnosis, list[Finding]]:
        """(all that is found in the whole run, what of it is new)."""
        diagnosis = examine(replace(self.evidence, rescored=rescored), self.guards)
        return diagnosis, self._new(diagnosis)

    def _new(self, diagnosis: Diagnosis) -> list[Finding]:
        found = [f for f in diagnosis.findings if f.detector not in self.told or _worse(f.level, self.told[f.detector])]
        self.told |= {f.detector: f.level for f in found}
        return found


def _worse(level: Level, than: Level) -> bool:
    return LEVELS.index(level) > LEVELS.index(than)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return in_completions({k: v for k, v in record.items() if isinstance(v, int | float)})


def left_out(loss: Loss) -> str:
    """What a loss does with completions that the token budget cut, where nothing can be learned from them; or ""."""
    cut = {"mask": "leaves those out", "zero": "gives those reward 0"}.get(loss.of_truncated, "")
    return f"{loss.name} {cut}" if cut else ""


def kl_of_completion(record: Mapping[str, Any]) -> float | None:
    """KL(π_θ || π_ref) of a step's record, nats a completion; None where it was not measured."""
    return in_completions(record).get("kl")


def prompt_means(rollouts: Sequence[Rollout]) -> list[float]:
    """The mean score of each prompt's completions; prompts without a score are left out."""
    groups: dict[str, list[float]] = {}
    for r in rollouts:
        if r.score is not None and r.score.value is not None:
            groups.setdefault(r.prompt.id, []).append(r.score.value)
    return [statistics.fmean(values) for values in groups.values()]
