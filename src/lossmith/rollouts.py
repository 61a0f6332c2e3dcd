"""A rollout: one completion with everything that was recorded about it.

Token ids are the only truth. Text is a view for people and scorers; nothing here turns text back into trained ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import torch

from lossmith.errors import PolicyError, RunError
from lossmith.prompts import Prompt, plain

__all__ = [
    "FINISH_REASONS", "Distribution", "FinishReason", "LogProbs", "Rollout", "Score", "pad_rows", "read_rollouts",
    "rollout_table",
]  # fmt: skip

FinishReason = Literal["eos", "stop", "length"]
FINISH_REASONS: tuple[FinishReason, ...] = ("eos", "stop", "length")


@dataclass(frozen=True)
class Distribution:
    """The distribution whose logarithm a log-probability is.

    `policy_version` is not part of the distribution's definition (a ratio compares two versions on purpose);
    temperature, filters and dtype are, and two log-probabilities that differ there cannot be subtracted.
    """

    policy_version: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    dtype: str = "float32"

    def comparable(self, other: Distribution) -> bool:
        return dataclasses.replace(self, policy_version=other.policy_version) == other


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities [T] or [N, T] (nats, float32 or float64) together with the distribution that they belong to."""

    values: torch.Tensor
    distribution: Distribution

    def __sub__(self, other: LogProbs) -> torch.Tensor:
        """The log-ratio self - other; refused where the two distributions are not comparable."""
        if not self.distribution.comparable(other.distribution):
            raise PolicyError(
                "these log-probabilities were measured under different distributions and cannot be subtracted: "
                f"{self.distribution} and {other.distribution}. Measure both with the same temperature, filters and "
                "dtype."
            )
        return self.values - other.values


@dataclass(frozen=True)
class Score:
    """A scorer's verdict on one completion: a number, an abstention, or an error with its kind.

    Exactly one of `value`, `abstained`, `error` is set. An abstention or an error is never read as 0:
    the rollout leaves its group's statistics.
    """

    value: float | None = None
    abstained: bool = False
    error: str | None = None  # "raised: ...", "timeout: ...", "not finite: nan", ...
    parts: dict[str, float] = field(default_factory=dict)  # the parts of a combined score, by scorer
    per_token: tuple[float, ...] | None = None  # [T], adding up to `value`: what each response token earned
    logged: dict[str, Any] = field(default_factory=dict)  # what a scoring function logged beside it, by name

    @property
    def ok(self) -> bool:
        return self.value is not None


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt.

    `completion_ids` [T] holds the response tokens, the end token included when there was one.
    `behavior_logp` [T] is float32, of the distribution really sampled from (after temperature and filters).
    `finish_reason` comes from the sampler; nothing looks for it in the token ids later.
    """

    prompt: Prompt
    sample: int  # which of the prompt's n completions
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    completion: str
    behavior_logp: LogProbs
    finish_reason: FinishReason
    score: Score | None = None
    advantage: float | None = None  # mean over its tokens, filled once the loss has assigned credit

    @property
    def scored(self) -> bool:
        """Whether its scorer gave it a number, and it can be learned from."""
        return self.score is not None and self.score.ok

    @property
    def truncated(self) -> bool:
        """True where the token budget, not the policy, ended the completion."""
        return self.finish_reason == "length"


def pad_rows(rows: list[torch.Tensor], value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack ragged rows [T_i] into ([N, T], mask [N, T]); T is the longest row (at least 1)."""
    width = max([len(row) for row in rows] + [1])
    dtype = rows[0].dtype if rows else torch.float32
    stacked = torch.full((len(rows), width), value, dtype=dtype)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
        mask[i, : len(row)] = True
    return stacked, mask


def rollout_table(rollouts: Sequence[Rollout]) -> pyarrow.Table:
    """The schema of a rollouts file: text for people, token ids and behavior log-probabilities (nats) for replay."""
    distributions = [r.behavior_logp.distribution for r in rollouts]
    return pyarrow.table(
        {
            "prompt_id": [r.prompt.id for r in rollouts],
            "prompt": [json.dumps(plain(r.prompt.messages), ensure_ascii=False) for r in rollouts],
            "sample": [r.sample for r in rollouts],
            "completion": [r.completion for r in rollouts],
            "prompt_tokens": [list(r.prompt_ids) for r in rollouts],
            "tokens": [list(r.completion_ids) for r in rollouts],
            "behavior_logp": pyarrow.array(
                [r.behavior_logp.values.float().tolist() for r in rollouts], pyarrow.list_(pyarrow.float32())
            ),
            "score": pyarrow.array([r.score.value if r.score else None for r in rollouts], pyarrow.float64()),
            "score_error": pyarrow.array([r.score.error if r.score else None for r in rollouts], pyarrow.string()),
            "score_parts": [json.dumps(dict(r.score.parts) if r.score else {}) for r in rollouts],
            "score_logged": [json.dumps(r.score.logged if r.score else {}, default=str) for r in rollouts],
            "advantage": pyarrow.array([r.advantage for r in rollouts], pyarrow.float64()),
            "finish_reason": [r.finish_reason for r in rollouts],
            "truncated": [r.truncated for r in rollouts],
            "policy_version": [d.policy_version for d in distributions],
            "temperature": [d.temperature for d in distributions],
            "top_p": [d.top_p for d in distributions],
            "top_k": [d.top_k for d in distributions],
        }
    )


def read_rollouts(path: str | Path, prompts: Mapping[str, Prompt] | None = None) -> list[Rollout]:
    """The completions of a run's rollouts/NAME.parquet, as they were sampled and scored.

    prompts: by id, the prompts themselves. Others are made of the file, which has their messages and not their columns.
    Rewards by token are not in the file, and the compute type is read as float32. RunError: it is no such file.
    """
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [_rollout(row, (prompts or {}).get(row["prompt_id"]) or _prompt(row)) for row in rows]
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise RunError(f"{str(path)!r} cannot be read as a file of rollouts: {error}") from None


def _prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt under the id that it had, so that completions of one prompt stay together."""
    prompt = Prompt(tuple(json.loads(row["prompt"])))
    object.__setattr__(prompt, "id", row["prompt_id"])
    return prompt


def _rollout(row: Mapping[str, Any], prompt: Prompt) -> Rollout:
    distribution = Distribution(*(row[key] for key in ("policy_version", "temperature", "top_p", "top_k")))
    value, error = row["score"], row["score_error"]
    parts, logged = json.loads(row["score_parts"]), json.loads(row["score_logged"])
    return Rollout(
        prompt,
        row["sample"],
        tuple(row["prompt_tokens"]),
        tuple(row["tokens"]),
        row["completion"],
        LogProbs(torch.tensor(row["behavior_logp"], dtype=torch.float32), distribution),
        row["finish_reason"],
        Score(value, value is None and error is None, error, parts, logged=logged),
        row["advantage"],
    )
