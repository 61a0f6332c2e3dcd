"""What the hooks of other trainers carry, as data, and which losses that is enough for.

A hook gives the credit half some fields of the whole batch, hands what it made (all of it, or an advantage alone) to
the objective half, and gives that some fields of some rows. `HOOKS["verl"].check(loss)` is a LossError that names what
does not come through, and which hooks carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lossmith.errors import LossError, quiet_traps
from lossmith.losses import PolicyLoss
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.batch import FIELDS
from lossmith.losses.loss import Loss

__all__ = ["HOOKS", "Hook"]

_WITH_GRADIENT = frozenset(name for name, about in FIELDS.items() if about.gradient) - {"logp"}


@dataclass(frozen=True)
class Hook:
    """One way into one trainer. Fields are those of Batch; mask goes everywhere, logp to the objective."""

    name: str
    function: str  # what the trainer calls, by its own name
    credit: frozenset[str] | None  # what the credit half sees, of the whole batch; None: the trainer makes advantages
    objective: frozenset[str]  # what the objective half sees of its rows
    rows: str  # which rows those are: "micro-batch", "completion" or "all"
    carries: str  # what of the credit comes through with the rows: "credit", "weights" (A and 1/Z) or "advantage"
    weights: str  # who makes 1/Z: "loss" (on the credit side), "counts" (the loss, of the trainer's), "scaled" (the
    # trainer multiplied A with it: homogeneous losses only), "tokens" (the trainer divides by the number of tokens)
    per_completion: bool = False  # an advantage is one number a completion
    old_sampled: bool = False  # the old policy is the one that sampled: there is no other
    at_once: str = ""  # what to set so that the objective gets all rows of an update; "" where nothing does
    one_field: frozenset[str] = frozenset()  # fields that are one and the same there: a loss may read one of them
    adds: Mapping[str, str] = field(default_factory=dict)  # terms that the trainer adds: {"kl": the setting that does}

    @property
    def own_credit(self) -> bool:
        """The loss's own estimator makes the advantages, not the trainer's."""
        return self.credit is not None

    @property
    def logp_only(self) -> bool:
        """The gradient goes through the log-probabilities alone: no entropy, no critic, no full KL."""
        return not self.objective & _WITH_GRADIENT

    def check(self, loss: Loss, *, at_once: bool = False) -> None:
        """LossError that names what of the loss does not come through, and which hooks carry it.

        at_once: the trainer is set so that each update is one micro-batch on one rank (see `at_once` of the hook).
        """
        reasons = self.reasons(loss, at_once=at_once)
        if not reasons:
            return
        others = [hook for hook in HOOKS.values() if not hook.reasons(loss)]
        able = ", ".join(f"{hook.name} ({hook.function})" for hook in others)
        where = f" It comes through: {able}." if able else " No hook carries it; `lossmith train` does."
        raise LossError(f"{loss.name} does not fit {self.name} ({self.function}): {'; '.join(reasons)}.{where}")

    def reasons(self, loss: Loss, *, at_once: bool = False) -> list[str]:
        """What of the loss does not come through, one sentence each; none where all of it does."""
        missing = sorted(loss.needs - FIELDS.keys())
        found = [f"it needs {name}=..., which has no agreed default" for name in missing]
        found += self._rows(loss, at_once)
        found += self._credit(loss)
        found += self._unseen("objective", loss, loss.objective_reads - self.objective)
        read = loss.objective_reads | (loss.credit_reads if self.makes_own_credit(loss) else frozenset())
        if len(both := sorted(read & self.one_field)) > 1:
            found.append(
                f"it reads {' and '.join(f'Batch.{name}' for name in both)}, and the hook has one field for them"
            )
        if isinstance(loss, PolicyLoss) and self.carries != "credit":
            found += self._mismatch(loss)
            found += [] if self.weights == "loss" else self._weights(loss)
            found += self._other_weights(loss)
        return found

    def makes_own_credit(self, loss: Loss) -> bool:
        """Whether the objective half can make the advantages itself: they look at nothing but its rows' own fields."""
        return loss.credit_reads <= self.objective and loss.coupling in ("token", "sequence")

    def trainers_estimator(self, loss: Loss) -> bool:
        """Whether the advantages are the trainer's own, so that its estimator must be set to what the loss wants."""
        return not self.own_credit and isinstance(loss, PolicyLoss) and not self.makes_own_credit(loss)

    # -- reasons ----------------------------------------------------------------------------------------------------

    def _rows(self, loss: Loss, at_once: bool) -> Iterator[str]:
        if loss.separable or self.rows == "all" or (at_once and self.at_once):
            return
        cure = f" (it gets them all with {self.at_once})" if self.at_once else ""
        yield f"it looks at all rows of an update at once, and the hook is given one {self.rows} at a time{cure}"

    def _credit(self, loss: Loss) -> Iterator[str]:
        if self.credit is None:
            return
        unseen = loss.credit_reads - self.credit
        yield from self._unseen("credit", loss, unseen if self.carries == "credit" else unseen - _of_mismatch(loss))
        if self.per_completion and isinstance(loss, PolicyLoss) and (loss.advantage.per_token or loss.kl.in_reward):
            yield "its advantages differ between the tokens of a completion, and the hook has one number a completion"

    def _unseen(self, half: str, loss: Loss, names: frozenset[str]) -> Iterator[str]:
        if names:
            fields = " and ".join(f"Batch.{name}" for name in sorted(names))
            hints = "".join(self._hint(loss, name) for name in sorted(names))
            yield f"its {half} half reads {fields}, which the hook is not given{hints}"

    def _hint(self, loss: Loss, name: str) -> str:
        """How to do without a term of the loss, where the trainer has it too."""
        terms = {
            "kl": (loss.kl.active, "beta=0", ("ref_logp", "full_kl")),
            "entropy": (True, "entropy_coef=0", ("entropy",)),
            "value": (loss.value.active, "value_coef=0", ("value",)),
        }
        for term, (there, off, fields) in terms.items():
            if there and name in fields and term in self.adds:
                return f" (build the loss with {off}; the trainer adds that term itself: {self.adds[term]})"
        return ""

    def _mismatch(self, loss: PolicyLoss) -> Iterator[str]:
        if not loss.mismatch.acts:
            return
        if not {"behavior_logp", "old_logp"} <= self.objective:
            correction = f" (build it with mismatch='none'; {self.adds['mismatch']})" if "mismatch" in self.adds else ""
            yield f"its mismatch correction reads Batch.behavior_logp, which the hook is not given{correction}"
        elif loss.mismatch.coupling == "batch":
            yield "its mismatch weights are divided by their mean over the batch, and the hook is given some rows only"

    def _weights(self, loss: PolicyLoss) -> Iterator[str]:
        """Why 1/Z is not right: neither of the trainer's counts, nor as a factor of A."""
        if self.weights == "tokens" and (not loss.counted or loss.aggregate.option != "token_mean"):
            yield (
                f"its normalizer is not the number of tokens (aggregate='{loss.aggregate.option}'"
                f"{', with completions left out' if not loss.counted else ''}), by which the trainer divides"
            )
        if self.weights == "counts" and not loss.counted and not self.own_credit:
            cure = "" if not loss.group_filter.acts else " (build it with group_filter='none'; the trainer may filter)"
            yield (
                "its normalizer does not follow from counts of tokens and completions, and the trainer makes the "
                f"advantages{cure}"
            )
        if not self.folds(loss):
            return
        if not loss.homogeneous:
            yield (
                "its normalizer comes as a factor of the advantage, and "
                f"trust='{loss.trust.option}' is not homogeneous in A"
            )
        beside = {"a KL term": loss.kl.in_loss, "an entropy bonus": loss.entropy_coef > 0}
        beside |= {f"extra='{loss.extra.option}'": loss.extra.acts, "a critic": loss.value.active}
        for term in (name for name, there in beside.items() if there):
            yield f"it has {term}, and its normalizer comes as a factor of the advantage, which that does not have"

    def _other_weights(self, loss: PolicyLoss) -> Iterator[str]:
        """Why the normalizer of a term that has one of its own is not right: it is made of counts."""
        for term, how in (("KL term", loss.kl_aggregate), ("entropy bonus", loss.entropy_aggregate)):
            if how == "same":
                continue
            counts = loss.counted and AGGREGATE[how].coupling == "token"
            if not (how == "token_mean" if self.weights == "tokens" else counts):
                yield f"its {term} has a normalizer of its own (aggregate='{how}'), not given by the trainer's counts"

    def folds(self, loss: PolicyLoss) -> bool:
        """Whether 1/Z is a factor of the advantage."""
        return self.weights == "scaled" or (self.weights == "counts" and self.own_credit and not loss.counted)


def _of_mismatch(loss: Loss) -> frozenset[str]:
    """Fields that of the credit half the mismatch correction alone reads: it can be made beside the objective."""
    if not isinstance(loss, PolicyLoss):
        return frozenset()
    with quiet_traps():
        return loss.credit_reads - loss.replace(mismatch="none").credit_reads


_EVERYTHING = frozenset(FIELDS) - {"logp", "mask", "advantage"}
_SCORED = frozenset({"reward", "group"})
_POLICIES = frozenset({"old_logp", "behavior_logp", "ref_logp"})
_TRL = _SCORED | _POLICIES | {"reward_parts", "truncated", "lag"}

_VERL_AT_ONCE = (
    "one data-parallel rank, use_dynamic_bsz=False and ppo_micro_batch_size_per_gpu = ppo_mini_batch_size * rollout.n"
)
_VERL_ADDS = {
    "kl": "actor.use_kl_loss, kl_loss_coef and kl_loss_type, or algorithm.use_kl_in_reward",
    "entropy": "actor.entropy_coeff",
    "value": "its critic",
    "mismatch": "verl's own correction is algorithm.rollout_correction",
}

HOOKS: dict[str, Hook] = {
    hook.name: hook
    for hook in (
        Hook(
            "trl",
            "GRPOTrainer._compute_loss",
            credit=_TRL,
            objective=_TRL | {"entropy"},
            rows="micro-batch",
            carries="credit",
            weights="loss",
            at_once="one process and gradient_accumulation_steps=1",
        ),
        Hook(
            "verl",
            "register_adv_est and register_policy_loss",
            credit=_SCORED,
            objective=frozenset({"old_logp"}),
            rows="micro-batch",
            carries="advantage",
            weights="counts",
            at_once=_VERL_AT_ONCE,
            adds=_VERL_ADDS,
        ),
        Hook(
            "verl_loss_fn",
            "register_adv_est and set_loss_fn",
            credit=_SCORED,
            objective=_SCORED | _POLICIES | {"entropy"},
            rows="micro-batch",
            carries="weights",
            weights="loss",
            at_once=_VERL_AT_ONCE,
            adds={"value": "its critic"},
        ),
        Hook(
            "openrlhf",
            "actor_loss_fn",
            credit=None,
            objective=frozenset({"old_logp", "behavior_logp"}),
            rows="micro-batch",
            carries="advantage",
            weights="counts",
            at_once="one GPU and --train.micro_batch_size = --train.batch_size",
            adds={
                "kl": "--algo.kl.use_loss and --algo.kl.init_coef",
                "entropy": "--actor.entropy_coef",
                "value": "its critic",
            },
        ),
        Hook(
            "skyrl",
            "register_advantage_estimator and register_policy_loss",
            credit=_SCORED | {"value", "old_value"},
            objective=frozenset({"old_logp", "behavior_logp"}),
            rows="micro-batch",
            carries="advantage",
            weights="scaled",
            adds={
                "kl": "trainer.algorithm.use_kl_loss and kl_loss_coef, or use_kl_in_reward",
                "entropy": "trainer.algorithm.use_entropy_loss and entropy_loss_coef",
                "value": "its critic",
            },
        ),
        Hook(
            "prime_rl",
            '[trainer.loss] type = "custom"',
            credit=None,
            objective=_POLICIES | {"teacher_logp"},
            rows="completion",
            carries="advantage",
            weights="tokens",
            old_sampled=True,
            one_field=frozenset({"ref_logp", "teacher_logp"}),
        ),
        Hook(
            "nemo_rl",
            "grpo_train(loss_fn=...)",
            credit=None,
            objective=_POLICIES,
            rows="micro-batch",
            carries="advantage",
            weights="counts",
            at_once="one GPU and policy.train_micro_batch_size = policy.train_global_batch_size",
        ),
        Hook(
            "slime",
            "--custom-reward-post-process-path and --custom-loss-function-path",
            credit=_SCORED | {"truncated"},
            objective=_POLICIES | {"entropy"},
            rows="micro-batch",
            carries="advantage",
            weights="counts",
            per_completion=True,
        ),
        Hook(
            "tinker",
            "forward_backward_custom",
            credit=_EVERYTHING - _WITH_GRADIENT,
            objective=_EVERYTHING - _WITH_GRADIENT,
            rows="all",
            carries="credit",
            weights="loss",
        ),
    )
}
