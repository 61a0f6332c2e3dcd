"""The learner: a round of rollouts -> batch -> credit -> gradients of the loss -> new parameters.

The credit half of the loss sees the whole round at once; the objective half runs on micro-batches whose gradients add
up to exactly the gradient of the whole, however the round is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import RunError
from lossmith.losses import KL, Batch, Credit, Loss, PolicyLoss, adapt_coefficient
from lossmith.losses.loss import no_metrics
from lossmith.optimization import clip_gradients, make_optimizer, optimizer_step
from lossmith.policy import (
    Layout,
    Policy,
    Teacher,
    TokenOutputs,
    bfloat16_weights,
    can_checkpoint_activations,
    compile_layers,
    distribution_of,
    sharing_is_exact,
    token_outputs,
)
from lossmith.policy.compiled import leave_uncompiled
from lossmith.policy.distribution import accumulation_dtype
from lossmith.policy.sending import sent
from lossmith.policy.sharded import shard, whole
from lossmith.ranks import Ranks
from lossmith.rollouts import LogProbs, Rollout, pad_rows
from lossmith.training.can_learn import TAUGHT
from lossmith.training.clock import Clock
from lossmith.training.first_pass import FirstPass
from lossmith.training.memory import estimate_memory
from lossmith.training.output_gradients import OutputGradients, added, credit_to, metrics_of, on_cpu
from lossmith.training.passes import micro_batches, of_rank, rows_of_updates, uncompilable
from lossmith.training.recipe import Recipe
from lossmith.training.rewards import rewards_of
from lossmith.training.sampler_gap import OF_SAMPLER, against_sampler, sampler_metrics
from lossmith.training.shards import Shards
from lossmith.training.swapped import swapped_completions
from lossmith.training.weights import WeightWatch

__all__ = ["Learner", "Update"]

_log = logging.getLogger("lossmith")
_Pass = tuple[Tensor, bool]  # row numbers, and whether they count


@dataclass(frozen=True)
class Update:
    """What one round's update did."""

    metrics: dict[str, float]  # those of the loss, gradient norm and learning rate
    skipped: int  # optimizer steps not taken because a gradient was not finite
    seconds: dict[str, float] = field(default_factory=dict)  # by part, from log_probs and credit to optimizer
    old_logp: Tensor | None = None  # [N, T], where the batch had none and the update's own forward pass gave them


class Learner:
    """Holds the optimizer, and the loss with whatever in it moves (an adaptive KL coefficient)."""

    def __init__(
        self,
        policy: Policy,
        loss: Loss,
        recipe: Recipe,
        longest: int = 0,
        ranks: Ranks | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """longest: tokens of the longest prompt there will be, for the estimate of memory. teacher: of a loss that
        learns from one. ranks: the processes that share the work. Every rank has a learner; that of rank 0 makes the
        batch, the credit and the optimizer's step, and the others' forward and backward passes are of their prompts.
        """
        if loss.value.active and policy.value_head is None:
            policy.add_value_head()
        if "value" in loss.needs and not loss.value.active:
            raise RunError(f"{loss.name} reads a critic that nothing trains: give it value_coef > 0, for example 0.5.")
        if loss.needs & TAUGHT and teacher is None:
            raise RunError(f"{loss.name} learns from a teacher: give the learner one.")
        self.policy, self.loss, self.recipe, self.teacher = policy, loss, recipe, teacher
        needed = bool(loss.needs & {"ref_logp", "full_kl"}) or recipe.tracks_kl
        sharing_is_exact(policy)  # found out before there is a copy, which then need not
        self.reference = policy.frozen(narrow=not recipe.shard) if needed else None
        if not policy.parameters():
            raise RunError("the policy has no trainable parameter.")
        self.ranks = ranks or Ranks()
        self._first_pass = FirstPass(self.ranks)
        sharded = recipe.shard and self.ranks.size > 1
        self.layout: Layout = "shared"  # any layout gives the same numbers; this one computes the least
        self._prepare(longest, sharded)
        trained = [(policy.parameters(), recipe.learning_rate)]
        if policy.value_head is not None:
            trained.append((list(policy.value_head.parameters()), recipe.value_learning_rate))
        self.optimizer = make_optimizer(trained, recipe)
        self.shards = Shards(policy, self.optimizer, self.ranks) if sharded else None
        self.weights = WeightWatch(
            trained[0][0],
            [] if self.reference is None else [p for p in self.reference.model.parameters() if not p.requires_grad],
        )
        self._clock = Clock()
        self.ranks.tasks |= {
            "outputs": self._outputs,
            "accumulate": self._accumulate_all,
            "weights": self._weights,
            "look": self.weights.begin,
            "clip": lambda: clip_gradients(self.optimizer, recipe),
            "step": self._step,
            "measured": self.weights.measured,
            "compile": self._compile,
            "pass size": self._pass_size,
        }
        self.bad_in_a_row = 0  # gradients that were not finite
        self.settled = True  # False from the first change that a round makes, until the loop has written the round down
        self._largest = 0.0  # advantage of the round

    def _prepare(self, longest: int, sharded: bool) -> None:
        """How passes are made: layers run again in the backward pass, compiled, or with their weights in parts."""
        policy, recipe, teacher = self.policy, self.recipe, self.teacher
        taught = None if teacher is None else teacher.policy
        parts = self.ranks.size if sharded else 1
        self.estimate = functools.partial(  # of memory, with a recipe
            estimate_memory, policy, reference=self.reference, teacher=taught, longest=longest, parts=parts
        )
        self.memory = self.estimate(recipe)
        self.recompute = self.memory.recompute and can_checkpoint_activations(policy.model)
        self.uncompilable = uncompilable(policy, recompute=self.recompute, sharded=sharded)
        self.compiled = False
        if recipe.compile is True and self.uncompilable:
            _log.warning("compile = true has no effect: %s.", self.uncompilable)
        elif recipe.compile is True:
            self._compile(True)
        if sharded:
            for each in filter(None, (policy, self.reference)):
                shard(each)

    def set_passes(self, tokens: int, compiled: bool) -> None:
        """From here on, on every rank: tokens in one forward and backward pass, and whether its layers are compiled."""
        self.ranks.call("pass size", tokens)
        self.ranks.call("compile", compiled)

    def _pass_size(self, tokens: int) -> None:
        self.recipe = self.recipe.model_copy(update={"micro_batch_tokens": tokens})
        self.memory = dataclasses.replace(self.estimate(self.recipe), budget=self.memory.budget)

    def _compile(self, wanted: bool) -> None:
        if wanted != self.compiled:
            models = (self.policy, self.reference, None if self.teacher is None else self.teacher.policy)
            for each in {id(p.model): p for p in models if p is not None}.values():  # one may stand for two of them
                compile_layers(each) if wanted else leave_uncompiled(each)
        self.compiled = wanted

    # -- the batch --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def make_batch(self, rollouts: Sequence[Rollout], given: Mapping[str, Tensor] | None = None) -> Batch:
        """Scored rollouts -> everything the loss needs about them, except the gradient-carrying forward pass.

        given: fields of the batch that the caller knows and rollouts do not say, rows as in `rollouts`.
        Where the sampler's log-probabilities are unknown (NaN: imported texts) there is no behavior_logp, nor lag.
        """
        recipe, loss = self.recipe, self.loss
        several = recipe.epochs * recipe.updates_per_step > 1
        fields: dict[str, Tensor] = {}
        if (several and loss.uses_old) or loss.needs_old_early or loss.needs & {"value", "old_logp"}:
            now = self.outputs(self.policy, rollouts, frozenset({"value"} & loss.needs))
            fields["old_logp"] = now.logp
            if now.value is not None:
                fields["old_value"] = fields["value"] = now.value
        if self.reference is not None and ("ref_logp" in loss.needs or recipe.tracks_kl):
            fields["ref_logp"] = self.outputs(self.reference, rollouts, frozenset()).logp
        if "teacher_logp" in loss.needs:
            assert self.teacher is not None
            taught = self.teacher.sees(rollouts)
            fields["teacher_logp"] = self.outputs(self.teacher.policy, taught, frozenset()).logp
        if "mismatched_log_ratio" in loss.needs:
            fields["mismatched_log_ratio"] = self._mismatched(rollouts)
        behavior, mask = pad_rows([r.behavior_logp.values for r in rollouts])
        lag = [0] * len(rollouts)
        if not bool(behavior.isnan().any()):
            self._check_distribution(rollouts)
            fields["behavior_logp"] = behavior.to(self.policy.device)
            lag = [self.policy.version - r.behavior_logp.distribution.policy_version for r in rollouts]
        names = {key: i for i, key in enumerate(dict.fromkeys(r.prompt.id for r in rollouts))}
        device, dtype = self.policy.device, accumulation_dtype(self.policy.parameters()[0].dtype)
        fields |= {
            "mask": mask.to(device),
            "reward": rewards_of(rollouts, device, dtype),
            "group": torch.tensor([names[r.prompt.id] for r in rollouts], device=device),
            "truncated": torch.tensor([r.truncated for r in rollouts], device=device),
            "lag": torch.tensor(lag, device=device),
        }
        return Batch(**fields | {name: x.to(device) for name, x in (given or {}).items()})

    def _mismatched(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N]: log-ratio (nats) of another prompt's completion as an answer to each row's prompt, whatever their order.

        0 where there is no such completion that fits the context.
        """
        assert self.reference is not None
        log_ratio = torch.zeros(len(rollouts), device=self.policy.device)
        rows, swapped = swapped_completions(rollouts, self.policy.context_length)
        if not rows:
            return log_ratio
        nothing: frozenset[str] = frozenset()
        ours, theirs = (self.outputs(p, swapped, nothing).logp for p in (self.policy, self.reference))
        gap = (ours - theirs).sum(1)
        return log_ratio.to(gap.dtype).index_copy(0, torch.tensor(rows, device=gap.device), gap)

    def _check_distribution(self, rollouts: Sequence[Rollout]) -> None:
        """PolicyError: the stored log-probabilities are of another distribution than the learner's."""
        ours = LogProbs(torch.zeros(1), distribution_of(self.policy, self.recipe.sampling))
        for distribution in {r.behavior_logp.distribution for r in rollouts}:
            ours - LogProbs(torch.zeros(1), distribution)

    def outputs(self, policy: Policy, rollouts: Sequence[Rollout], want: frozenset[str]) -> TokenOutputs:
        """token_outputs over micro-batches, without gradient, as one [N, T] record in the order of the rollouts."""
        who = "policy" if policy is self.policy else "reference" if policy is self.reference else "teacher"
        parts = self.ranks.call("outputs", who, rollouts, want)
        width = max([len(r.completion_ids) for r in rollouts] + [1])
        outs = [out for part in parts for _, out in part]
        device, dtype = policy.device, outs[0].logp.dtype if outs else torch.float32
        logp = torch.zeros(len(rollouts), width, device=device, dtype=dtype)
        mask = torch.zeros(len(rollouts), width, dtype=torch.bool, device=device)
        value = torch.zeros_like(logp) if "value" in want else None
        for rows, out in (one for part in parts for one in part):
            t, rows = out.logp.shape[1], sent(rows, device)
            logp[rows, :t], mask[rows, :t] = out.logp.to(device), out.mask.to(device)
            if value is not None and out.value is not None:
                value[rows, :t] = out.value.to(device, dtype)
        return TokenOutputs(
            logp=logp, mask=mask, distribution=distribution_of(policy, self.recipe.sampling), value=value
        )

    @torch.no_grad()
    def _outputs(
        self, who: str, rollouts: Sequence[Rollout], want: frozenset[str]
    ) -> list[tuple[Tensor, TokenOutputs]]:
        """Of this rank's rows: (their numbers, their outputs), a micro-batch each."""
        models = {"policy": self.policy, "reference": self.reference}
        policy = models[who] if who in models or self.teacher is None else self.teacher.policy
        assert policy is not None
        found = []

        def measure() -> None:
            for rows, counts in self.passes(rollouts):
                with self._clock("log_probs"):
                    out = token_outputs(
                        policy, [rollouts[i] for i in rows], self.recipe.sampling, layout=self.layout, want=want
                    )
                if counts:
                    found.append((rows, out if self.ranks.size == 1 else on_cpu(out)))

        self.ranks.in_step(measure) if self.shards else measure()
        return found

    def passes(self, rollouts: Sequence[Rollout]) -> Iterator[_Pass]:
        """The rows of each of this rank's passes through the model, and whether they count.

        Ranks that hold parts of the weights make the same number: one with fewer rows ends with some that do not.
        """
        mine = list(self.micro_batches(rollouts, of_rank(rollouts, self.ranks)))
        spare = self.ranks.most(len(mine)) - len(mine) if self.shards else 0
        shortest = min(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids + rollouts[i].completion_ids))
        return chain(zip(mine, repeat(True)), repeat((torch.tensor([shortest]), False), spare))

    # -- credit and update ------------------------------------------------------------------------------------------

    def credit(self, batch: Batch) -> Credit:
        """The advantage of every token, and what its weight is divided by: of the whole round at once."""
        with self._clock("credit"):
            return self.loss.credit(batch)

    def update(self, rollouts: Sequence[Rollout], batch: Batch, credit: Credit, step: int) -> Update:
        """theta <- argmin L, by recipe.epochs passes of recipe.updates_per_step optimizer steps.

        rollouts: those that `batch` was made of, and `credit` of that.
        """
        self._largest = float(credit.advantage.abs().max()) if credit.advantage.numel() else 0.0
        metrics: list[dict[str, float]] = []  # of each optimizer step
        skipped = 0
        self._everywhere("look")
        for rows in rows_of_updates(batch, self.recipe, step):
            there = sent(rows, self.policy.device)  # once, not for every tensor of the batch
            part, share = batch.rows(there), credit.rows(there)
            if len(rows) < len(rollouts):
                share = self.loss.as_whole(share, part)
            of_loss = self.accumulate([rollouts[i] for i in rows], part, share)
            with self._clock("optimizer"):
                moved, norm = self._optimizer_step(step)
            skipped += not moved
            metrics.append(of_loss | {"grad_norm": norm})
        old_logp = None if credit.mismatch is not None else self._first_pass.of_round(batch, rows)
        names = [name for name in metrics[-1] if not name.startswith(OF_SAMPLER)]
        means = {name: sum(m.get(name, 0.0) for m in metrics) / len(metrics) for name in names}
        means |= sampler_metrics(metrics) | self._everywhere("measured")
        means |= credit.metrics | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        self._adapt(means, len(rollouts))
        return Update(means, skipped, self._clock.read(), old_logp)

    def accumulate(self, rollouts: Sequence[Rollout], batch: Batch, credit: Credit) -> dict[str, float]:
        """Add dL/dtheta of these rows to the gradients, micro-batch by micro-batch; returns the loss's metrics.

        A loss that is not separable is evaluated once on all rows, over outputs without a graph; each micro-batch's
        forward pass is then given its share of dL/d(outputs). That costs one more forward pass.
        """
        if self.ranks.size == 1:
            return self._accumulate(rollouts, batch, credit)
        kl = self.loss.kl if isinstance(self.loss, PolicyLoss) else None
        plain = credit_to(dataclasses.replace(credit, compute_metrics=no_metrics), "cpu")
        given = {name: x.cpu() for name, x in batch.given.items()}
        metrics: dict[str, float] = {}
        for share in self.ranks.call("accumulate", rollouts, given, plain, kl):
            metrics = added(metrics, share)
        return metrics

    def _accumulate_all(
        self, rollouts: Sequence[Rollout], given: dict[str, Tensor], credit: Credit, kl: KL | None
    ) -> dict[str, float]:
        """This rank's share of an update's gradients, and of its metrics; on rank 0, the gradients of all."""
        device = self.policy.device
        if kl is not None and isinstance(self.loss, PolicyLoss) and self.loss.kl != kl:
            self.loss = self.loss.replace(kl=kl)
        batch = Batch(**given).to(device)
        metrics = self._accumulate(rollouts, batch, credit_to(credit, device))
        if not self.shards:
            with self._clock("gradients"):
                self.ranks.add_gradients(self._trained())
        return metrics

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def share_weights(self) -> None:
        """Every rank's policy, as rank 0's has become; a rank that holds its part has it already."""
        if self.ranks.size > 1 and not self.shards:
            self.ranks.call("weights", self.policy.version)

    def _weights(self, version: int) -> None:
        self.ranks.copy_from_first(self._trained())
        self.policy.version = version

    def _accumulate(self, rollouts: Sequence[Rollout], batch: Batch, credit: Credit) -> dict[str, float]:
        together = self.ranks.in_step if self.shards else self.ranks.together
        self._first_pass.begin()

        def backward() -> dict[str, float]:
            total = {} if of_all is None or self.ranks.rank else of_all.metrics
            for one in self.passes(rollouts):
                total = added(total, self._backward(rollouts, batch, credit, one, of_all))
            return total

        with self.ready():
            of_all = None if self.loss.separable else self._output_gradients(rollouts, batch, credit, together)
            found: dict[str, float] = together(backward)
        return found

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within, passes can be made, backward ones too."""
        full_kl = self.reference if self.reference is not None and "full_kl" in self.loss.needs else None
        with (
            bfloat16_weights(self.policy) if self.compiled else contextlib.nullcontext(),
            whole(full_kl) if full_kl is not None else contextlib.nullcontext(),  # its head, in the backward pass too
        ):
            yield

    def _backward(
        self, rollouts: Sequence[Rollout], batch: Batch, credit: Credit, one: _Pass, of_all: OutputGradients | None
    ) -> dict[str, float]:
        """Add the gradient of these rows, if they count; returns their share of the metrics."""
        rows, counts = one
        there = sent(rows, self.policy.device)
        mine, owed = batch.rows(there), credit.rows(there)
        with torch.enable_grad():
            with self._clock("forward"):
                graded = self.graded([rollouts[i] for i in rows], batch.valid.shape[1])
            if counts and credit.mismatch is None:
                self._first_pass.note(rows, graded["logp"])
            with self._clock("loss"):
                if not counts:
                    share, total = {}, torch.zeros((), device=self.policy.device)
                elif of_all is None:
                    result = self.loss.objective(mine.replace(**graded), owed)
                    share, total = metrics_of(result), result.loss
                else:
                    share, total = {}, of_all.surrogate_loss(graded, there)
                if self.shards:  # a backward pass through every weight, on every rank
                    total = total + torch.stack([(0 * x).sum() for x in graded.values()]).sum()
            if total.requires_grad:
                with self._clock("backward"):
                    total.backward()
        return share | (against_sampler(graded["logp"], mine, owed) if counts else {})

    def graded(self, rollouts: Sequence[Rollout], width: int) -> dict[str, Tensor]:
        """The outputs that the loss needs from a forward pass, [N, width]."""
        want = frozenset({"entropy", "full_kl", "value"} & self.loss.needs)
        want |= {"divergence"} if self.loss.divergence is not None else set()
        out = token_outputs(
            self.policy,
            rollouts,
            self.recipe.sampling,
            layout=self.layout,
            want=want,
            reference=self.reference if "full_kl" in want else None,
            teacher=self.teacher,
            divergence=self.loss.divergence,
            activation_checkpointing=self.recompute,
        )
        graded = {name: getattr(out, name) for name in ("logp", *want)}
        return {k: torch.nn.functional.pad(v, (0, width - v.shape[1])) for k, v in graded.items()}

    def _output_gradients(
        self, rollouts: Sequence[Rollout], batch: Batch, credit: Credit, together: Callable[[Callable[[], None]], None]
    ) -> OutputGradients:
        """dL/d(outputs) of all rows at once, on every rank: each makes the outputs of its own."""
        dtype = accumulation_dtype(self.policy.parameters()[0].dtype)
        names = ["logp", *sorted({"entropy", "full_kl", "value"} & self.loss.needs)]
        leaves = {name: torch.zeros(batch.valid.shape, dtype=dtype, device=self.policy.device) for name in names}

        def fill() -> None:
            with torch.no_grad():
                for rows, counts in self.passes(rollouts):
                    for name, x in self.graded([rollouts[i] for i in rows], batch.valid.shape[1]).items():
                        if counts:
                            leaves[name][sent(rows, x.device)] = x.to(dtype)

        together(fill)
        leaves = {name: self.ranks.add_up(x).requires_grad_() for name, x in leaves.items()}
        with torch.enable_grad():
            result = self.loss.objective(batch.replace(**leaves), credit)
            grads = torch.autograd.grad(result.loss, list(leaves.values()), allow_unused=True)
        known = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
        return OutputGradients(known, metrics_of(result))

    def micro_batches(self, rollouts: Sequence[Rollout], of: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Row numbers of each pass. of: the rows to cut up, all if not given."""
        rows = range(len(rollouts)) if of is None else of
        return micro_batches(rollouts, rows, self.recipe.pass_tokens, sharing_is_exact(self.policy))

    def _optimizer_step(self, step: int) -> tuple[bool, float]:
        """(whether the parameters moved, gradient norm before clipping). A non-finite gradient moves nothing."""
        norm = self._everywhere("clip")
        finite = math.isfinite(norm)
        bad = 0 if finite else self.bad_in_a_row + 1
        if bad == 3:
            raise RunError(f"step {step + 1}: the gradient was not finite three times in a row; {self._cure()}.")
        self.settled, self.bad_in_a_row = False, bad
        self._everywhere("step", step, finite)
        if finite:
            self.share_weights()
        return finite, norm if finite else 0.0

    def _everywhere(self, task: str, *given: Any) -> Any:
        """On every rank, where each holds its part; else on this one, which holds all."""
        return self.ranks.call(task, *given)[0] if self.shards else self.ranks.tasks[task](*given)

    def _step(self, step: int, finite: bool) -> None:
        """Move what this rank holds, if it may be moved, and forget the gradient."""
        if finite:
            optimizer_step(self.optimizer, self.recipe, step, self.recipe.steps)
            self.policy.version += 1
        self.optimizer.zero_grad(set_to_none=True)

    def _cure(self) -> str:
        """What to do about gradients that are not finite: rewards may be the cause, or the learning rate."""
        if self._largest < 1e6:
            return "lower learning_rate"
        return (
            f"the rewards make advantages of {self._largest:.1e}, which gradients cannot carry: let the scorer give "
            "smaller numbers, or choose a loss that divides by their spread (advantage_scale='group_std')"
        )

    def _adapt(self, metrics: dict[str, float], completions: int) -> None:
        """Move an adaptive KL coefficient by the KL of a completion that was just seen."""
        self.settled = False
        if isinstance(self.loss, PolicyLoss) and self.loss.kl.active and "kl_ref" in metrics:
            metrics["kl_coefficient"] = self.loss.kl.beta
            per_completion = metrics["kl_ref"] * metrics["tokens"] / max(metrics["completions"], 1)
            if self.loss.kl.control == "fixed":
                return
            self.loss = self.loss.replace(kl=adapt_coefficient(self.loss.kl, per_completion, completions))
