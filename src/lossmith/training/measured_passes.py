"""What a pass through the model is to be on the machine at hand: how many tokens, and compiled or as it was written.

`micro_batch_tokens = "auto"` and `compile = "auto"` are decided once, before the first step, from forward and backward
passes over the run's own prompts with made-up completions. Nothing is sampled or scored for it, and the gradients are
forgotten. Two ways are timed in turn; the other one is taken only where it was faster every time than the present one
ever was, so a machine that is busy with other things changes nothing. What was decided stands in inputs.json, and a
resumed run keeps to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lossmith.durable.inputs import Inputs
from lossmith.policy import distribution_of, sharing_is_exact
from lossmith.policy.compiled import compiler_found
from lossmith.prompts import Prompt
from lossmith.rollouts import LogProbs, Rollout
from lossmith.training.learner import Learner
from lossmith.training.passes import of_rank
from lossmith.training.run import RunFolder

__all__ = ["offer_passes", "settle_passes"]

ROUNDS = 3  # each way is timed so often, after a first time that warms up: of two alike, one wins once in 20 (3!·3!/6!)
SHARE = 0.05  # of the run's forward and backward passes, what the measurement may take
COMPILING = 30.0  # seconds reckoned for the compiler, whose first use alone takes 12 of an idle core
_NAMES = ("micro_batch_tokens", "compile")
_DECIDED = "passes"  # their name in inputs.json

Tell = Callable[[str, int, int], None]


class _Way(NamedTuple):
    tokens: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.tokens} tokens" + ", compiled" * self.compiled


@dataclass(frozen=True)
class _Trial:
    """Seconds of each way for the same rows, in the order they were measured; tokens: of those rows."""

    tokens: int
    seconds: dict[_Way, list[float]]

    def better(self, way: _Way, than: _Way) -> bool:
        return max(self.seconds[way]) < min(self.seconds[than])

    def compared(self, way: _Way, other: _Way) -> str:
        return f"{_range(self.seconds[way])} s against {_range(self.seconds[other])} for {self.tokens:,} tokens"


def settle_passes(learner: Learner, folder: RunFolder, prompts: Sequence[Prompt], tell: Tell) -> list[str]:
    """Decide what the learner's recipe leaves to be measured, or take what was decided when the run began.

    prompts: of the first step. Returns what is to be said of it, a line each.
    """
    asked = [name for name in _NAMES if getattr(learner.recipe, name) == "auto"]
    if not asked:
        return []
    inputs = Inputs.read(folder.path)
    known = {} if inputs is None else inputs.known.get(_DECIDED, {})
    if not all(_possible(name, known.get(name)) for name in asked):
        known = _Measurement(learner, prompts, tell).decide(asked)
        if inputs is not None:
            inputs.known[_DECIDED] = known
            inputs.write(folder.path)
        return [f"{name} = {_value(known[name])}: {known['why'][name]}." for name in asked]
    notes = [f"{name} = {_value(known[name])}, as was decided when the run began." for name in asked]
    compiled = bool(known["compile"]) if "compile" in asked else learner.compiled
    if compiled and (why := _no_compiler(learner)):
        notes.append(f"the layers are not compiled, as they were before: {why}. The last bits may differ.")
        compiled = False
    learner.set_passes(
        known["micro_batch_tokens"] if "micro_batch_tokens" in asked else learner.recipe.pass_tokens, compiled
    )
    return notes


def offer_passes(learner: Learner) -> None:
    """On every rank: the task that is timed."""
    learner.ranks.tasks["timed passes"] = lambda rollouts: _timed(learner, rollouts)


def _timed(learner: Learner, rollouts: Sequence[Rollout]) -> float:
    """Seconds of this rank's forward and backward passes over its share of the rollouts."""

    def work() -> float:
        with learner.ready(), torch.enable_grad():
            start = time.perf_counter()
            for rows, _ in learner.passes(rollouts):
                graded = learner.graded([rollouts[i] for i in rows], learner.recipe.max_tokens)
                torch.stack([x.sum() for x in graded.values()]).sum().backward()
            if learner.policy.device.type != "cpu":
                torch.accelerator.synchronize()
            return time.perf_counter() - start

    seconds: float = learner.ranks.in_step(work) if learner.shards else learner.ranks.together(work)
    learner.optimizer.zero_grad(set_to_none=True)
    return seconds


def _no_compiler(learner: Learner) -> str:
    """Why layers cannot be compiled here, if they cannot."""
    return learner.uncompilable or ("" if compiler_found() else "there is no C++ compiler (g++ or clang++)")


def _possible(name: str, value: Any) -> bool:
    return type(value) is bool if name == "compile" else type(value) is int and value > 0


def _value(value: Any) -> str:
    return str(value).lower()  # true, as a recipe has it


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.3g} to {max(seconds):.3g}"


class _Measurement:
    """Of one learner, on prompts of its first step."""

    def __init__(self, learner: Learner, prompts: Sequence[Prompt], tell: Tell) -> None:
        self.learner, self.tell = learner, tell
        self.rollouts = list(_made_up(learner, prompts))
        recipe, ranks = learner.recipe, learner.ranks
        self.step_tokens = self._cost(of_rank(self.rollouts, ranks))  # of this rank
        self.update_tokens = self.step_tokens / min(recipe.updates_per_step, max(1, len(prompts) // ranks.size))
        self.run_tokens = recipe.steps * recipe.epochs * self.step_tokens
        self.spent = 0.0  # tokens of the measurement, so far
        self.rate: float | None = None  # seconds a token, once it is known

    def decide(self, asked: Sequence[str]) -> dict[str, Any]:
        """What stands in inputs.json: the settings, why, and what was measured."""
        why, now = {}, _Way(self.learner.recipe.pass_tokens, self.learner.compiled)
        measured: list[_Trial] = []
        if "micro_batch_tokens" in asked:
            now, why["micro_batch_tokens"] = self._size(now, measured)
        if "compile" in asked:
            now, why["compile"] = self._compile(now, measured)
        self.learner.set_passes(*now)
        found = [{"tokens": one.tokens} | {str(k): v for k, v in one.seconds.items()} for one in measured]
        chosen = {"micro_batch_tokens": now.tokens, "compile": now.compiled}
        return {name: chosen[name] for name in asked} | {"why": why, "seconds": found}

    def _size(self, now: _Way, measured: list[_Trial]) -> tuple[_Way, str]:
        """Twice as many tokens as long as that is faster."""
        told = ""
        while True:
            more = now._replace(tokens=2 * now.tokens)
            ending = self._too_much(more)
            if ending:
                return now, f"{told}; {ending}" if told else ending
            trial = self._trial([now, more])
            measured.append(trial)
            self.rate = statistics.median(trial.seconds[now]) / trial.tokens
            if not trial.better(more, now):
                less = f"{more.tokens} was not faster every time ({trial.compared(more, now)}, {ROUNDS} times each)"
                return now, f"{told}; {less}" if told else less
            told = f"faster every time than {now.tokens} ({trial.compared(more, now)}, {ROUNDS} times each)"
            now = more

    def _too_much(self, more: _Way) -> str:
        """Why so many tokens are not tried, if they are not."""
        learner = self.learner
        if more.tokens / 2 >= self.update_tokens:
            return f"an update has no more than about {self.update_tokens:,.0f} tokens"
        need = learner.estimate(learner.recipe.model_copy(update={"micro_batch_tokens": more.tokens}))
        budget = learner.memory.budget
        if learner.recompute or (budget is not None and need.fixed + need.activations > budget):
            return f"{more.tokens} would take more memory than there is"
        cost = (ROUNDS + 1) * 2 * more.tokens
        if self.spent + cost > SHARE * self.run_tokens:
            return (
                f"measuring {more.tokens} would take {cost:,} tokens, and the whole run about {self.run_tokens:,} (at "
                f"most {SHARE:.0%} of it are spent so)"
            )
        return ""

    def _compile(self, now: _Way, measured: list[_Trial]) -> tuple[_Way, str]:
        """Whether compiled layers are faster, in a run that is long enough to find out."""
        why = _no_compiler(self.learner)
        if why:
            return now, why
        if self.rate is None:
            rows = self._rows(now.tokens)
            self._time(now, rows)
            self.rate = self._time(now, rows) / self._cost_of(rows)
        all_passes = self.rate * self.run_tokens
        if SHARE * all_passes < COMPILING:
            return now, (
                f"compiling may take {COMPILING:.0f} s, and all passes of the run about {all_passes:,.0f} s (at most "
                f"{SHARE:.0%} of it are spent so)"
            )
        compiled = now._replace(compiled=True)
        self.tell("compiling", 0, 0)
        first = self._time(compiled, self._rows(now.tokens))
        trial = self._trial([now, compiled])
        measured.append(trial)
        better = trial.better(compiled, now)
        told = f"{'' if better else 'not '}faster every time ({trial.compared(compiled, now)}, {ROUNDS} times each)"
        return compiled if better else now, f"{told}; the first pass took {first:.0f} s"

    def _trial(self, ways: Sequence[_Way]) -> _Trial:
        """Each way, in turn, over rows that fill a pass of the longest."""
        rows = self._rows(max(way.tokens for way in ways))
        seconds: dict[_Way, list[float]] = {way: [] for way in ways}
        for k in range(ROUNDS + 1):
            for way in ways[:: 1 if k % 2 else -1]:
                self.tell("measuring passes", k, ROUNDS + 1)
                took = self._time(way, rows)
                if k:
                    seconds[way].append(took)
        return _Trial(self._cost_of(rows), seconds)

    def _time(self, way: _Way, rows: Sequence[Rollout]) -> float:
        self.learner.set_passes(*way)
        self.spent += self._cost_of(rows)
        return max(self.learner.ranks.call("timed passes", rows))

    def _rows(self, tokens: int) -> list[Rollout]:
        """Of each rank as many rollouts as fill a pass of so many tokens, or all."""
        ids = list(dict.fromkeys(r.prompt.id for r in self.rollouts))
        chosen: list[int] = []
        for rank in range(self.learner.ranks.size):
            mine = set(ids[rank :: self.learner.ranks.size])
            taken: list[int] = []
            for i in (i for i, r in enumerate(self.rollouts) if r.prompt.id in mine):
                if self._cost(taken) >= tokens:
                    break
                taken.append(i)
            chosen += taken
        return [self.rollouts[i] for i in sorted(chosen)]  # in this order they are dealt out to the same ranks

    def _cost_of(self, rollouts: Sequence[Rollout]) -> int:
        """Tokens of this rank's share of them."""
        known = {id(r): i for i, r in enumerate(self.rollouts)}
        return self._cost([known[id(rollouts[i])] for i in of_rank(rollouts, self.learner.ranks)])

    def _cost(self, rows: Sequence[int]) -> int:
        """Tokens that a forward pass of these rows encodes."""
        chosen = [self.rollouts[i] for i in rows]
        shares = sharing_is_exact(self.learner.policy)
        prompts = {r.prompt.id if shares else id(r): len(r.prompt_ids) for r in chosen}
        return sum(prompts.values()) + sum(len(r.completion_ids) for r in chosen)


def _made_up(learner: Learner, prompts: Sequence[Prompt]) -> Iterator[Rollout]:
    """A step's rollouts, whose completions are random tokens, as long as they may be."""
    policy, recipe = learner.policy, learner.recipe
    generator = torch.Generator().manual_seed(0)
    distribution = distribution_of(policy, recipe.sampling)
    known = min(len(policy.tokenizer), policy.model.get_input_embeddings().weight.shape[0])
    for prompt in prompts:
        prompt_ids = tuple(policy.encode(prompt))
        for k in range(recipe.samples_per_prompt):
            ids = tuple(torch.randint(known, (recipe.max_tokens,), generator=generator).tolist())
            unknown = LogProbs(torch.full((recipe.max_tokens,), torch.nan), distribution)
            yield Rollout(prompt, k, prompt_ids, ids, "", unknown, "length")
