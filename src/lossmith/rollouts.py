"""A rollout: one completion with everything that was recorded about it.

Token ids are the only truth. Text is a view for people and scorers; nothing here turns text back into trained ids.

A file of rollouts has a row a completion (docs/rollout-files.md): what was sampled and scored, and, of a training step,
what the loss saw (`seen.*`, fields of Batch) and the credit that it gave (`credit.*`).
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
from lossmith.losses import Batch, Credit
from lossmith.prompts import Prompt, plain

__all__ = [
    "FINISH_REASONS", "Distribution", "FinishReason", "LogProbs", "Rollout", "Score", "check_schema", "pad_rows",
    "read_rollouts", "rollout_table",
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
    kept: tuple[tuple[int, ...], ...] | None = None  # ids that top-k and top-p left at each token, if the sampler says

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


SCHEMA = (
    "lossmith rollouts 1"  # in the file's metadata under SCHEMA_KEY; a number of its own when columns change meaning
)
SCHEMA_KEY = b"schema"


def rollout_table(
    rollouts: Sequence[Rollout], batch: Batch | None = None, credit: Credit | None = None
) -> pyarrow.Table:
    """The schema of a rollouts file: text for people, token ids and log-probabilities (nats) for replay.

    batch, credit: of those rollouts that have a score, in their order: what the loss saw, and what it made of it.
    """
    distributions = [r.behavior_logp.distribution for r in rollouts]
    floats, numbers = pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.float64())
    columns = {
        "prompt_id": [r.prompt.id for r in rollouts],
        "prompt": [json.dumps(plain(r.prompt.messages), ensure_ascii=False) for r in rollouts],
        "sample": [r.sample for r in rollouts],
        "completion": [r.completion for r in rollouts],
        "prompt_tokens": [list(r.prompt_ids) for r in rollouts],
        "tokens": [list(r.completion_ids) for r in rollouts],
        "behavior_logp": pyarrow.array([r.behavior_logp.values.float().tolist() for r in rollouts], floats),
        "score": pyarrow.array([r.score.value if r.score else None for r in rollouts], pyarrow.float64()),
        "score_error": pyarrow.array([r.score.error if r.score else None for r in rollouts], pyarrow.string()),
        "score_parts": [json.dumps(dict(r.score.parts) if r.score else {}) for r in rollouts],
        "score_logged": [json.dumps(r.score.logged if r.score else {}, default=str) for r in rollouts],
        "score_per_token": pyarrow.array([_per_token(r) for r in rollouts], numbers),
        "advantage": pyarrow.array([r.advantage for r in rollouts], pyarrow.float64()),
        "finish_reason": [r.finish_reason for r in rollouts],
        "truncated": [r.truncated for r in rollouts],
        "policy_version": [d.policy_version for d in distributions],
        "temperature": [d.temperature for d in distributions],
        "top_p": [d.top_p for d in distributions],
        "top_k": [d.top_k for d in distributions],
        "dtype": [d.dtype for d in distributions],
    }
    if batch is not None and credit is not None:
        seen = {f"seen.{name}": x for name, x in batch.given.items() if name not in ("mask", "behavior_logp")}
        seen |= {f"credit.{name}": x for name, x in credit.parts.items()}
        columns |= {name: _by_row(rollouts, x) for name, x in seen.items()}
    return pyarrow.table(columns).replace_schema_metadata({SCHEMA_KEY: SCHEMA.encode()})


def _per_token(rollout: Rollout) -> list[float] | None:
    return None if rollout.score is None or rollout.score.per_token is None else list(rollout.score.per_token)


def _by_row(rollouts: Sequence[Rollout], x: torch.Tensor) -> pyarrow.Array:
    """[N] or [N, T] of the rollouts with a score as a column: null for the others, no padding."""
    rows = iter(x.detach().cpu())
    narrow = x.dtype == torch.float32
    values = [
        next(rows)[: len(r.completion_ids)].tolist() if x.ndim == 2 else next(rows).item() for r in rollouts if r.scored
    ]
    filled = iter(values)
    kind = None if not x.is_floating_point() else pyarrow.float32() if narrow else pyarrow.float64()
    kind = pyarrow.list_(kind) if kind is not None and x.ndim == 2 else kind
    return pyarrow.array([next(filled) if r.scored else None for r in rollouts], kind)


def read_rollouts(path: str | Path, prompts: Mapping[str, Prompt] | None = None) -> list[Rollout]:
    """The completions of a run's rollouts/NAME.parquet, as they were sampled and scored.

    prompts: by id, the prompts themselves. Others are made of the file, which has their messages and not their columns.
    RunError: it is no such file, or one of a newer version.
    """
    try:
        check_schema(path)
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [_rollout(row, (prompts or {}).get(row["prompt_id"]) or _prompt(row)) for row in rows]
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise RunError(f"{str(path)!r} cannot be read as a file of rollouts: {error}") from None


def check_schema(path: str | Path) -> None:
    """RunError: the file was written by a newer version. Files from before there was one are read."""
    found = (pyarrow.parquet.read_schema(path).metadata or {}).get(SCHEMA_KEY, SCHEMA.encode()).decode()
    if found != SCHEMA:
        raise RunError(
            f"{str(path)!r} is of the schema {found!r}, and this version reads {SCHEMA!r}: install a newer one."
        )


def _prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt under the id that it had, so that completions of one prompt stay together."""
    prompt = Prompt(tuple(json.loads(row["prompt"])))
    object.__setattr__(prompt, "id", row["prompt_id"])
    return prompt


def _rollout(row: Mapping[str, Any], prompt: Prompt) -> Rollout:
    distribution = Distribution(*(row[key] for key in ("policy_version", "temperature", "top_p", "top_k")))
    distribution = dataclasses.replace(distribution, dtype=row.get("dtype", "float32"))
    per_token = row.get("score_per_token")
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
        Score(value, value is None and error is None, error, parts, tuple(per_token) if per_token else None, logged),
        row["advantage"],
    )
