"""Output sets of prompts, without training: what people and programs judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lossmith import policy as policies
from lossmith.durable.inputs import Inputs, circumstances, of_code, of_model, of_prompts
from lossmith.durable.stopping import Stopping
from lossmith.errors import PolicyError
from lossmith.feedback.distinct import sample_sets
from lossmith.feedback.output_set import set_of_rollouts
from lossmith.feedback.partial_sets import Part, PartialSets, in_parts, part_size
from lossmith.files import check_writable
from lossmith.policy import Policy, SamplingSettings, check_model, check_samples, load_policy
from lossmith.policy.text import SpecialTokens
from lossmith.project import check_order
from lossmith.prompts import Prompt, default_prompts_path, load_prompts
from lossmith.report.run.code import show_code
from lossmith.report.run.prompts import who_reads
from lossmith.report.run.waiting import Busy
from lossmith.scorers import Scorer, best_of, check_scorer, close_scorer, load_scorer
from lossmith.scorers.address import shown
from lossmith.scorers.weak import doubts
from lossmith.terminal import Terminal

__all__ = ["sample_outputs"]

AT_MOST = 1_000_000  # outputs: they are held in memory until all are there
_COUNTED = {
    "without": "prompts without any score left out",
    "failed": "completions that the scorer failed on",
    "abstained": "completions without an opinion",
    "tied": "prompts with several best; the first was taken",
}
_DECIDES = (
    "n", "model", "max_tokens", "temperature", "top_p", "top_k", "stop", "special_tokens", "chat_template", "seed",
    "resample", "best_by",
)  # fmt: skip


def sample_outputs(
    prompts: str = "default",
    *,
    prompt: tuple[str, ...] = (),
    n: int = 1,
    output: str | Path | None = None,
    model: str = "default",
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: tuple[str, ...] = (),
    special_tokens: SpecialTokens = "answer",
    chat_template: str | None = None,
    seed: int = 0,
    resample: int = 3,
    best_by: str | None = None,
    limit: int | None = None,
    prompt_column: str = "prompt",
    pass_columns: tuple[str, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Sample a set of different outputs for each prompt; the rows of the sets, which `read_sets` reads from a file.

    prompt: texts to sample for, instead of a file of prompts.
    output: a new file for them, JSON lines. What is there when it stops stays in FILE.partial, and the same call goes
    on with the rest. The other options are those of `lossmith sample`. PromptError, PolicyError, ScorerError.
    """
    options = locals()
    given = {key: options[key] for key in _DECIDES}
    console = console or Terminal(stderr=True)
    settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop)
    check_samples(n, settings)
    check_order("sample", prompts)
    if resample < 0:
        raise PolicyError(f"resample = {resample}, but outputs are drawn again 0 times or more.")
    place = None if output is None else check_writable(Path(output), new=True)
    read = load_prompts(_source(prompts, prompt), column=prompt_column, pass_columns=pass_columns, limit=limit)
    chosen = list(read)
    if n * len(chosen) > AT_MOST:
        raise PolicyError(f"n = {n} outputs of {len(chosen)} prompts are more than the {AT_MOST} that fit one file.")
    if best_by is not None:
        show_code(console, scorer=best_by)
        check_scorer(best_by, columns=read.columns)
    check_model(model)
    with Stopping() as stopping:
        policy = load_policy(
            model, device=device, dtype=dtype, special_tokens=special_tokens, chat_template=chat_template
        )
        reported = [read.summary(), *who_reads(policy, chosen)]
        console.print("\n".join(reported), highlight=False, markup=False, soft_wrap=True)
        work = _Work(policy, n, settings, model, seed, resample, best_by, policy.checksum(), {*read.columns})
        file = None if place is None else PartialSets(place, work.inputs(chosen, given))
        with Busy(console, f"sampling {len(chosen)} x {n} completions") as busy:
            parts = _all(work, chosen, file, stopping, console, busy.count)
    rows = [row for part in parts for row in part.sets]
    summary = work.summary(parts)
    if place is not None:
        outputs = sum(len(row["outputs"]) for row in rows)
        summary = f"{outputs} outputs of {len(rows)} prompts written to {place}\n{summary}"
    console.print(summary, highlight=False, markup=False, soft_wrap=True)
    return rows


def _source(prompts: str, texts: tuple[str, ...]) -> Any:
    if texts and prompts != "default":
        raise PolicyError("prompts come from a file or as text, not both: leave out one of the two.")
    return list(texts) if texts else default_prompts_path() if prompts == "default" else prompts


def _all(
    work: _Work,
    prompts: list[Prompt],
    file: PartialSets | None,
    stop: Stopping,
    console: Console,
    count: Callable[[int, int], None],
) -> list[Part]:
    """Every set, in its file where there is one; whatever ends it early says what is kept."""
    if file is None:
        with work:
            return in_parts(prompts, work.n, work.make, stop, None, count)
    if file.done:
        file.notes.insert(0, f"{file.done} of {len(prompts)} prompts are in {file.path}: going on with the others")
    for note in file.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    stop.busy = lambda: False  # a part under way is lost, and nothing else
    try:
        with work:
            parts = in_parts(prompts, work.n, work.make, stop, file, count)
        file.finish()
    except BaseException as error:
        file.close()
        if file.done:
            error.add_note(
                f"{file.done} of {len(prompts)} prompts are in {file.path}. The same command again goes on with the "
                "others."
            )
        raise
    return parts


@dataclass
class _Work:
    """What is done with some of the prompts."""

    policy: Policy
    n: int
    settings: SamplingSettings
    model: str
    seed: int
    resample: int
    best_by: str | None
    checksum: str
    columns: set[str] = field(default_factory=set)
    judge: Scorer | None = None

    def inputs(self, prompts: list[Prompt], given: dict[str, Any]) -> Inputs:
        """What the sets follow from."""
        decisive = {
            "the prompts": of_prompts(prompts),
            **of_model(self.policy),
            **({} if self.best_by is None else of_code("scorer", self.best_by)),
            "prompts sampled together": str(part_size(self.n)),
        }
        return Inputs(given, decisive, circumstances(self.policy.device))

    def __enter__(self) -> None:
        if self.best_by is not None:
            self.judge = load_scorer(self.best_by, columns=self.columns)

    def __exit__(self, *ended: object) -> None:
        close_scorer(self.judge)

    def make(self, prompts: Sequence[Prompt], progress: Callable[[int, int], None]) -> Part:
        """The sets of these."""
        if self.judge is not None:
            return self._best(prompts, progress, self.judge)
        sets = sample_sets(
            self.policy, prompts, self.n, self.settings, model=self.model, seed=self.seed, resample=self.resample,
            checksum=self.checksum, on_progress=progress,
        )  # fmt: skip
        return Part([one.as_row() for one in sets])

    def _best(self, prompts: Sequence[Prompt], progress: Callable[[int, int], None], judge: Scorer) -> Part:
        """Best of n: the output of each prompt that the scorer likes most."""
        rollouts = policies.sample(
            self.policy, prompts, self.n, self.settings, seed=self.seed, step=0, on_progress=progress
        )
        best = best_of(judge, rollouts, timeout=None)
        sets = [
            set_of_rollouts([rollout], self.model, self.settings, self.seed, self.checksum[:16])
            for rollout in best.rollouts
        ]
        return Part([one.as_row() for one in sets], {key: getattr(best, key) for key in _COUNTED})

    def summary(self, parts: list[Part]) -> str:
        """What there is to know of all of them."""
        rows = [row for part in parts for row in part.sets]
        if self.best_by is None:
            return _kinds(rows, self.n)
        scores = [output["score"] for row in rows for output in row["outputs"] if "score" in output]
        line = f"best of {self.n} by {shown(self.best_by)}: mean score {sum(scores) / max(len(scores), 1):.4f}"
        for key, what in _COUNTED.items():
            count = sum(part.counts[key] for part in parts)
            line += f"; {count} {what}" if count else ""
        return "\n".join([line, *(f"! {doubted}" for doubted in doubts(self.best_by))])


def _kinds(rows: list[dict[str, Any]], n: int) -> str:
    """How different the outputs of the sets are."""
    alike = sum(row["near_duplicates"] for row in rows)
    missing = sum(n - len(row["outputs"]) for row in rows)
    lines = [f"{alike} nearly the same as another of their set" if alike else "all different within their set"]
    if missing:
        lines.append(f"{missing} left out: exact repetitions, however often they were drawn again")
    if n > 1 and (alike + missing) > 0.2 * n * len(rows):
        lines.append("many are alike: raise --temperature, or there is little to judge")
    return "; ".join(lines)
