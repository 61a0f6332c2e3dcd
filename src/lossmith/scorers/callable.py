"""Scoring functions in the convention of TRL: `def reward(prompts, completions, **columns) -> list[float | None]`.

Everything is passed by name. Lists of one length: `prompts`, `completions`, `completion_ids` (lists of token ids) and
every column of the prompts. Beside them `trainer_state` (where the run stands), `log_extra(column, values)` and
`log_metric(name, value)`, whose values are kept with the rollouts and averaged in metrics.jsonl. A function without
`**kwargs` is given only what it names. A text prompt comes with text completions; a chat prompt is a list of messages
and its completion `[{"role": "assistant", "content": ...}]`. A prompt that lacks a column has None there. Coroutine
functions are awaited.

None says that the function is not applicable to a completion, an abstention; so does ABSTAIN, the string "abstain".
NaN is an error, of its own completion alone. A function that raises is called again with each half of the batch, down
to the completion at fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.deadline import DeadlinePassed, DeadlineThread
from lossmith.scorers.function import Caller, CallFailure, ScorerBatch, Signature, Verdict
from lossmith.scorers.parts import in_parts
from lossmith.scorers.process import STARTUP_SECONDS, Worker
from lossmith.scorers.settings import ScorerSettings
from lossmith.user_code import LoadFailure

__all__ = ["FunctionScorer", "PathScorer", "as_batch"]

LISTS = ("prompts", "completions", "completion_ids")
OURS = (*LISTS, "completions_ids", "trainer_state", "log_extra", "log_metric")
# What functions written for other libraries take, and why it is not given.
_ELSEWHERE = {
    **dict.fromkeys(
        ("completion", "prompt", "response", "text"),
        "a function is given all completions of a batch at once",
    ),
    **dict.fromkeys(
        ("solution_str", "data_source", "ground_truth", "extra_info"),
        "that is how verl calls one, completion by completion; here it is given a batch",
    ),
    "environments": "that is TRL's for its environments, which are not here",
}


class FunctionScorer:
    """A live Python function, run in a thread with a deadline.

    A thread cannot be killed: past the limit the run goes on (or stops, loudly) and the late call is left behind.
    Give a path (`PathScorer`) to have a function killed for good, or where it uses `signal.alarm`.

    `columns` are the prompts' column names, None where they are not known yet. Raises ScorerError for a signature
    that cannot work.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        columns: Collection[str] | None = None,
        settings: ScorerSettings | None = None,
    ) -> None:
        try:
            self._caller = Caller(function)
        except LoadFailure as failure:
            raise ScorerError(f"this cannot be a scorer: {failure}") from None
        self.name = self._caller.signature["name"]
        self.columns, self.settings = columns, settings or ScorerSettings()
        _check_signature(self._caller.signature, columns)
        self._thread = DeadlineThread()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        verdicts = in_parts(self._call, as_batch(rollouts, self.columns, self.settings), timeout)
        return [Score(**verdict) for verdict in verdicts]

    def _call(self, batch: ScorerBatch, timeout: float | None, whole: bool) -> list[Verdict]:
        caller = self._caller
        try:
            return self._thread.run(lambda: caller(batch), timeout)
        except DeadlinePassed:
            self._caller = Caller(caller.function)  # the late thread keeps the old one and its event loop
            raise CallFailure(
                f"timeout: no answer within {round(timeout or 0, 2):g} s; the call was left behind in its thread"
            ) from None

    def columns_read(self, names: Set[str]) -> set[str]:
        """Those that the function names; all of them where it takes any."""
        signature = self._caller.signature
        return set(names) if signature["anything"] else set(names & set(signature["named"]))

    def close(self) -> None:
        """End the thread once it is idle."""
        self._thread.stop(last=self._caller.close)


class PathScorer:
    """A function named by its path, `"file.py:function"` or `"module:function"`, run in a process that can be killed.

    The process starts here, so that an import error or a signature that cannot work is a ScorerError at once.
    `columns` are the prompts' column names, None where they are not known yet. `startup` is in seconds.
    """

    def __init__(
        self,
        path: str,
        columns: Collection[str] | None = None,
        settings: ScorerSettings | None = None,
        *,
        startup: float = STARTUP_SECONDS,
    ) -> None:
        self.path = path
        self.columns, self.settings = columns, settings or ScorerSettings()
        self._worker = Worker(path, startup)
        self._signature = signature = self._worker.start()
        self.name = signature["name"]
        try:
            _check_signature(signature, columns)
        except ScorerError:
            self.close()
            raise

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        batch = as_batch(rollouts, self.columns, self.settings)
        verdicts = in_parts(lambda part, left, whole: self._worker.ask(part, left), batch, timeout)
        return [Score(**verdict) for verdict in verdicts]

    def columns_read(self, names: Set[str]) -> set[str]:
        """As `FunctionScorer.columns_read`."""
        signature = self._signature
        return set(names) if signature["anything"] else set(names & set(signature["named"]))

    def close(self) -> None:
        """Kill the process. Asked again, it starts again."""
        self._worker.stop()


def as_batch(
    rollouts: Sequence[Rollout], columns: Collection[str] | None = None, settings: ScorerSettings | None = None
) -> ScorerBatch:
    """Rollouts as the lists a scoring function takes; every list is a copy that it may change."""
    pairs = [_prompt_and_completion(rollout) for rollout in rollouts]
    names = set(columns or ()).union(*(rollout.prompt.columns for rollout in rollouts)) - {*LISTS}
    return ScorerBatch(
        prompts=[prompt for prompt, _ in pairs],
        completions=[completion for _, completion in pairs],
        completion_ids=[list(rollout.completion_ids) for rollout in rollouts],
        columns={name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in sorted(names)},
        state=_state(rollouts, settings or ScorerSettings()),
    )


def _state(rollouts: Sequence[Rollout], run: ScorerSettings) -> dict[str, Any]:
    """The fields of trainer_state: a policy's version counts its optimizer steps."""
    taken = rollouts[0].behavior_logp.distribution.policy_version if rollouts else 0
    return {
        "global_step": taken,
        "max_steps": run.updates,
        "epoch": run.passes * taken / run.updates if run.updates else 0.0,
        "num_train_epochs": math.ceil(run.passes),
    }


def _prompt_and_completion(rollout: Rollout) -> tuple[Any, Any]:
    """Text with text, messages with messages; an answer begun in the prompt is put back in front of its end."""
    content = rollout.prompt.content
    if isinstance(content, str):
        return content, rollout.completion
    messages = [dict(message) for message in content]
    begun = messages.pop().get("content", "") if messages and messages[-1].get("role") == "assistant" else ""
    return messages, [{"role": "assistant", "content": begun + rollout.completion}]


def _check_signature(signature: Signature, columns: Collection[str] | None) -> None:
    name, named = signature["name"], signature["named"]
    write = f"Write it as `def {name}(prompts, completions, **columns)` returning one number per completion."
    for parameter in signature["required"]:
        if parameter in _ELSEWHERE and parameter not in (columns or ()):
            raise ScorerError(f"scorer {name!r} takes {parameter!r}: {_ELSEWHERE[parameter]}. {write}")
    if not signature["anything"] and "completions" not in named:
        takes = ", ".join(named) or "nothing"
        raise ScorerError(f"scorer {name!r} does not take 'completions' (it takes {takes}). {write}")
    if columns is None:
        return
    missing = [p for p in signature["required"] if p not in OURS and p not in columns]
    if missing:
        names = ", ".join(repr(p) for p in missing)
        raise ScorerError(
            f"scorer {name!r} needs {names}, which the prompts do not have as a column."
            f"{nearest(missing[0], columns)} A function is also given {', '.join(OURS[:3] + OURS[4:])}."
            if columns
            else f"scorer {name!r} needs {names}, and the prompts have no columns. Add the column to the prompts, or "
            f"give the parameter a default. A function is also given {', '.join(OURS[:3] + OURS[4:])}."
        )
