"""Exact expectations on a policy small enough to know everything about.

A tabular softmax policy over V tokens (the last one ends the completion) with at most L tokens: one row of logits for
each prefix. All completions are listed, so the expected gradient of a loss over groups of G sampled completions is a
finite sum, and so is the true gradient of E[r] - β·KL(π‖π_ref). Groups are multisets with multinomial weights: the
loss must not depend on the order of rows (a check of its own). With more multisets than LIMIT, groups are sampled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import ProofError
from lossmith.losses import Batch, PolicyLoss
from lossmith.proofs.random_batches import LEAVES, batch_fields

__all__ = [
    "LIMIT",
    "WORLD_FIELDS",
    "Bias",
    "Expectation",
    "GroupGradients",
    "Tree",
    "World",
    "bias",
    "default_world",
    "group_gradients",
    "long_world",
]

LIMIT = 1500  # multisets up to which groups are enumerated


@dataclass(frozen=True)
class Tree:
    """Every completion of at most `limit` tokens over `vocabulary` tokens, the last of which ends it.

    Parameters theta [K·V]: the logits of V tokens after each of K prefixes.
    """

    vocabulary: int = 3
    limit: int = 2

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """The K states: prefixes without an end token, shorter than the limit."""
        going = range(self.vocabulary - 1)
        return [p for length in range(self.limit) for p in itertools.product(going, repeat=length)]

    @cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """The S completions: ended by the end token, or by the limit."""
        end, every = self.vocabulary - 1, range(self.vocabulary)
        return [(*p, v) for p in self.prefixes for v in every if v == end or len(p) + 1 == self.limit]

    @cached_property
    def mask(self) -> Tensor:
        """[S, L]"""
        return torch.arange(self.limit) < torch.tensor([len(y) for y in self.sequences])[:, None]

    @cached_property
    def state(self) -> Tensor:
        """[S, L], the number of the prefix before each token; 0 where there is no token."""
        number = {p: k for k, p in enumerate(self.prefixes)}
        rows = [[number[y[:t]] if t < len(y) else 0 for t in range(self.limit)] for y in self.sequences]
        return torch.tensor(rows)

    @cached_property
    def token(self) -> Tensor:
        """[S, L], 0 where there is no token."""
        return torch.tensor([[*y, *[0] * (self.limit - len(y))] for y in self.sequences])

    @cached_property
    def truncated(self) -> Tensor:
        """[S] bool: the limit ended it."""
        return torch.tensor([y[-1] != self.vocabulary - 1 for y in self.sequences])

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return len(self.prefixes) * self.vocabulary

    def states(self, theta: Tensor) -> Tensor:
        """Log-probabilities of all tokens after each prefix, [K, V], with gradient."""
        return theta.view(len(self.prefixes), self.vocabulary).log_softmax(1)

    def at(self, per_state: Tensor) -> Tensor:
        """[K] -> [S, L]: a number of the prefix before each token, 0 where there is no token."""
        return torch.where(self.mask, per_state[self.state], 0.0)

    def token_logp(self, theta: Tensor) -> Tensor:
        """[S, L], with gradient; 0 where there is no token."""
        return torch.where(self.mask, self.states(theta)[self.state, self.token], 0.0)

    def logp(self, theta: Tensor) -> Tensor:
        """Of whole completions, [S], with gradient."""
        return self.token_logp(theta).sum(1)

    def entropy(self, theta: Tensor) -> Tensor:
        """[S, L], with gradient."""
        states = self.states(theta)
        return self.at(-(states.exp() * states).sum(1))

    def full_kl(self, theta: Tensor, ref: Tensor) -> Tensor:
        """KL(theta ‖ ref) over the vocabulary before each token, [S, L], with gradient."""
        states = self.states(theta)
        return self.at((states.exp() * (states - self.states(ref))).sum(1))

    def vocabulary_logp(self, theta: Tensor) -> Tensor:
        """Log-probabilities of all tokens before each token, [S, L, V], with gradient; 0 where there is no token."""
        return torch.where(self.mask[..., None], self.states(theta)[self.state], 0.0)

    def sequence_kl(self, a: Tensor, b: Tensor) -> Tensor:
        """KL(a ‖ b) of the distributions of completions, nats, with gradient."""
        la, lb = self.logp(a), self.logp(b)
        return (la.exp() * (la - lb)).sum()

    def state_kl(self, at: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Σ_t E_{prefix ~ at}[KL(a(·|prefix) ‖ b(·|prefix))]: the KL at sampled states, the states held fixed."""
        la, lb = self.states(a), self.states(b)
        return (self.logp(at).exp().detach()[:, None] * self.at((la.exp() * (la - lb)).sum(1))).sum()


@dataclass(frozen=True, eq=False)
class World:
    """One prompt: a policy, who sampled, a reference, and the reward of each completion."""

    tree: Tree
    theta: Tensor  # [P]
    behavior: Tensor  # [P], sampled the completions
    ref: Tensor  # [P]
    reward: Tensor  # [S]
    old: Tensor | None = None  # [P], the policy at the start of the update; None: the behavior policy
    exact_critic: bool = False  # values are E[r | prefix] under the behavior policy, not somewhere near the mean
    truncates: bool = True  # what the length limit ended counts as truncated

    @cached_property
    def probability(self) -> Tensor:
        """Of each completion under the behavior policy, [S]."""
        return self.tree.logp(self.behavior).exp()

    @cached_property
    def jacobians(self) -> dict[str, Tensor]:
        """{leaf: d leaf / d theta [S, L, P]}, [S, L·V, P] of a vocabulary; a critic has parameters of its own."""
        tree, functional = self.tree, torch.autograd.functional
        return {
            "logp": functional.jacobian(tree.token_logp, self.theta),
            "entropy": functional.jacobian(tree.entropy, self.theta),
            "full_kl": functional.jacobian(lambda theta: tree.full_kl(theta, self.ref), self.theta),
            "divergence": functional.jacobian(lambda theta: tree.full_kl(theta, self.teacher), self.theta),
            "vocab_logp": functional.jacobian(tree.vocabulary_logp, self.theta).flatten(1, 2),
        }

    @property
    def teacher(self) -> Tensor:
        """[P], a teacher: as far from the policy as the reference, on the other side."""
        return 2 * self.theta - self.ref

    def gradient(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        """d value(theta) / d theta, [P]."""
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(value(theta), theta)[0]

    def sampled_by(self, behavior: Tensor) -> World:
        """The same prompt, with completions sampled by this policy [P]."""
        return dataclasses.replace(self, behavior=behavior)

    def expected_reward(self, theta: Tensor) -> Tensor:
        return (self.tree.logp(theta).exp() * self.reward).sum()

    def true_gradient(self, beta: float = 0.0) -> Tensor:
        """∇(E[r] - β·KL(π‖π_ref)) at theta, of the distribution of completions, exactly. [P]"""
        return self.gradient(lambda t: self.expected_reward(t) - beta * self.tree.sequence_kl(t, self.ref))

    def optimum(self, beta: float) -> Tensor:
        """The probabilities of completions that maximize E[r] - β·KL(π‖π_ref), any policy: π_ref·exp(r/β)/Z. [S]"""
        return (self.tree.logp(self.ref) + self.reward / beta).softmax(0)

    def field(self, name: str) -> Tensor:
        """A batch field of all S completions. ProofError: this world does not have it."""
        if name not in WORLD_FIELDS:
            raise ProofError(f"an enumerated policy has no {name}")
        return WORLD_FIELDS[name](self)


def default_world(seed: int = 0) -> World:
    """On-policy: seven completions of one or two tokens, random logits, a reference 0.7 away, rewards in [0, 1]."""
    return _world(Tree(3, 2), seed, going=0.0)


def long_world(seed: int = 0) -> World:
    """On-policy: seven completions of one to six tokens, so that what depends on the length shows."""
    return _world(Tree(2, 6), seed, going=1.2)


def _world(tree: Tree, seed: int, going: float) -> World:
    """going: added to the logits of every token but the end."""
    draw = torch.Generator().manual_seed(seed)
    theta, step = (torch.randn(tree.size, generator=draw, dtype=torch.float64) for _ in range(2))
    reward = torch.rand(len(tree.sequences), generator=draw, dtype=torch.float64)
    theta = 0.7 * theta + going * (torch.arange(tree.size) % tree.vocabulary < tree.vocabulary - 1)
    return World(tree, theta, theta, theta + 0.7 * step, reward)


def _prefix_table(world: World, seed: int) -> Tensor:
    """A fixed number for each prefix, at each token. [S, L]"""
    draw = torch.Generator().manual_seed(seed)
    return world.tree.at(torch.randn(len(world.tree.prefixes), generator=draw, dtype=torch.float64) * 0.3)


def _greedy(world: World) -> Tensor:
    """The reward of the most likely token at every step, for each row. [S]"""
    best, prefix = world.tree.states(world.theta).argmax(1), tuple[int, ...]()
    number = {p: k for k, p in enumerate(world.tree.prefixes)}
    while prefix in number:
        prefix = (*prefix, int(best[number[prefix]]))
    return world.reward[world.tree.sequences.index(prefix)].expand(len(world.reward))


def _reference_rewards(world: World) -> Tensor:
    """Rewards of 64 reference completions, spread evenly over their distribution. [S, 64]"""
    probability, order = world.tree.logp(world.ref).exp(), world.reward.argsort()
    middle = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    index = torch.searchsorted(probability[order].cumsum(0), middle).clamp(max=len(order) - 1)
    return world.reward[order][index].expand(len(world.reward), -1)


def _true_values(world: World) -> Tensor:
    """E[r | prefix] before each token. [S, L]"""
    starts = [[y[: len(p)] == p for y in world.tree.sequences] for p in world.tree.prefixes]
    inside = torch.tensor(starts, dtype=torch.float64) * world.probability  # [K, S]
    return world.tree.at(inside @ world.reward / inside.sum(1))


def _mean_reward(world: World) -> Tensor:
    return (world.probability * world.reward).sum().expand(len(world.reward))


# Every field a loss may need: what it is in an enumerated world, for all S completions.
WORLD_FIELDS: dict[str, Callable[[World], Tensor]] = {
    "logp": lambda w: w.tree.token_logp(w.theta),
    "mask": lambda w: w.tree.mask,
    "old_logp": lambda w: w.tree.token_logp(w.behavior if w.old is None else w.old),
    "behavior_logp": lambda w: w.tree.token_logp(w.behavior),
    "ref_logp": lambda w: w.tree.token_logp(w.ref),
    "full_kl": lambda w: w.tree.full_kl(w.theta, w.ref),
    "teacher_logp": lambda w: w.tree.token_logp(w.teacher),
    "vocab_logp": lambda w: w.tree.vocabulary_logp(w.theta),
    "teacher_vocab_logp": lambda w: w.tree.vocabulary_logp(w.teacher),
    "divergence": lambda w: w.tree.full_kl(w.theta, w.teacher),
    "entropy": lambda w: w.tree.entropy(w.theta),
    "reward": lambda w: w.reward,
    "group": lambda w: torch.zeros(len(w.reward), dtype=torch.int64),
    "advantage": lambda w: w.reward - _mean_reward(w),
    "value": lambda w: _true_values(w) if w.exact_critic else w.reward @ w.probability + _prefix_table(w, 5),
    "old_value": lambda w: w.field("value"),
    "returns": lambda w: torch.where(w.tree.mask, w.reward[:, None], 0.0),
    "truncated": lambda w: w.tree.truncated & w.truncates,
    "sum_prob_sq": lambda w: w.tree.at((2 * w.tree.states(w.theta)).exp().sum(1)),
    "reward_parts": lambda w: torch.stack([0.5 * w.reward, 0.5 * w.reward, torch.zeros_like(w.reward)], 1),
    "reward_greedy": _greedy,
    "reference_reward": _reference_rewards,
    "baseline": _mean_reward,
    "potential": lambda w: _prefix_table(w, 6),
    "off_policy": lambda w: torch.zeros(len(w.reward), dtype=torch.bool),
    "lag": lambda w: torch.zeros(len(w.reward), dtype=torch.int64),
    "mismatched_log_ratio": lambda w: w.tree.sequence_kl(w.theta, w.ref).expand(len(w.reward)),
    "pair_probability": lambda w: torch.ones_like(w.reward),
    "pair_weight": lambda w: torch.ones_like(w.reward),
}


@dataclass(frozen=True, eq=False)
class GroupGradients:
    """The gradient of the loss of every group of G completions, and how likely the group is."""

    weight: Tensor  # [M], sums to 1
    terms: dict[str, Tensor]  # {"loss", and each term of the loss: [M, P]}
    exact: bool  # all groups, not a sample

    @property
    def main(self) -> str:
        """The term that follows the reward: the policy term where the loss has one."""
        return "policy" if "policy" in self.terms else "loss"

    def plus(self, *terms: str) -> GroupGradients:
        """These terms added up, as the loss."""
        total = torch.stack([self.terms[term] for term in terms]).sum(0)
        return GroupGradients(self.weight, {"loss": total}, self.exact)

    def mean(self, term: str = "loss") -> Tensor:
        """The expected gradient, [P]."""
        return self.weight @ self.terms[term]

    def variance(self, term: str = "loss") -> float:
        """Trace of the covariance of one group's gradient."""
        centered = self.terms[term] - self.mean(term)
        return float(self.weight @ (centered**2).sum(1))


def group_gradients(
    loss: Any, world: World, size: int = 4, samples: int = LIMIT, seed: int = 0, main: bool = False
) -> GroupGradients:
    """The gradients of the loss, and of each of its terms, over groups of `size` completions of the behavior policy.

    main: only what follows the reward, the policy term where there is one (faster).
    """
    columns = {name: world.field(name).detach() for name in batch_fields(loss)}
    groups, weight, exact = _groups(world.probability, size, samples, seed)
    terms = _at_once(loss, columns, world, groups, main) if _keeps_groups_apart(loss) else None
    if terms is None:
        found = [_alone(loss, columns, world, rows, main) for rows in groups]
        nothing = torch.zeros(1, world.tree.size, dtype=torch.float64)
        names = sorted({term for one in found for term in one})  # it may be absent where it has nothing to say
        terms = {term: torch.cat([one.get(term, nothing) for one in found]) for term in names}
    return GroupGradients(weight, terms, exact)


class Expectation:
    """The expected gradient of a loss at one policy after the other, over all groups of `size`: the mean of
    `group_gradients`, by one backward pass where the loss keeps groups apart.

    What a token counts in its group (1/Z) does not depend on the policy, and is worked out once, at the first world.
    """

    def __init__(self, loss: Any, size: int) -> None:
        self.loss, self.size = loss, size
        self._weights: dict[str, Tensor] | None = None

    def gradient(self, world: World) -> Tensor:
        """dE[L]/dtheta, [P]. ProofError, LossError: the loss cannot be evaluated here."""
        completions = len(world.probability)
        if not _keeps_groups_apart(self.loss) or math.comb(completions + self.size - 1, self.size) > LIMIT:
            return group_gradients(self.loss, world, self.size).mean()
        groups, weight, _ = _groups(world.probability, self.size, LIMIT, 0)
        theta = world.theta.clone().requires_grad_()
        here = dataclasses.replace(world, theta=theta)
        columns = {name: here.field(name) for name in batch_fields(self.loss)}
        fields = {name: x[groups.flatten()] for name, x in columns.items()}
        if "group" in fields:
            fields["group"] = torch.arange(len(groups)).repeat_interleave(self.size)
        batch = Batch(**fields)
        credit = self.loss.credit(batch)
        if self._weights is None:
            self._weights = _weights_alone(self.loss, batch, credit, self.size)
        of_rows = weight.repeat_interleave(self.size)[:, None]
        parts: dict[str, Any] = {name: x * of_rows for name, x in self._weights.items()}
        total = self.loss.objective(batch, dataclasses.replace(credit, **parts)).loss
        return torch.autograd.grad(total, theta)[0] if total.requires_grad else torch.zeros_like(world.theta)


def _weights_alone(loss: PolicyLoss, batch: Batch, credit: Any, size: int) -> dict[str, Tensor]:
    """{name: [N, T]} of the credit's weights, each group counted as if it were alone."""
    parts = [slice(start, start + size) for start in range(0, len(batch.valid), size)]
    alone = [loss.as_whole(credit.rows(part), batch.rows(part)).parts for part in parts]
    return {name: torch.cat([part[name] for part in alone]) for name in alone[0] if name.endswith("weight")}


def _keeps_groups_apart(loss: Any) -> bool:
    """Whether it says that the rows of a group are all that their gradient depends on, but for what it divides by."""
    return isinstance(loss, PolicyLoss) and loss.separable and loss.coupling != "batch"


def _at_once(
    loss: PolicyLoss, columns: dict[str, Tensor], world: World, groups: Tensor, main: bool
) -> dict[str, Tensor] | None:
    """{term: gradients [M, P]} of all groups as one batch, each with the counts that it has alone: ten times as fast.

    None: three of them, evaluated alone, give something else.
    """
    batch, leaves = _batch(columns, groups)
    credit = loss.credit(batch)
    weights: dict[str, Any] = _weights_alone(loss, batch, credit, groups.shape[1])
    found = _terms(loss.objective(batch, dataclasses.replace(credit, **weights)), leaves, world, groups, main)
    for i in (0, len(groups) // 2, len(groups) - 1):
        for term, gradient in _alone(loss, columns, world, groups[i], main).items():
            if not torch.allclose(found[term][i], gradient[0], rtol=1e-9, atol=1e-12):
                return None
    return dict(sorted(found.items()))


def _alone(loss: Any, columns: dict[str, Tensor], world: World, rows: Tensor, main: bool) -> dict[str, Tensor]:
    """{term: gradient [1, P]} of one group."""
    batch, leaves = _batch(columns, rows[None])
    return _terms(loss(batch), leaves, world, rows[None], main)


def _batch(columns: dict[str, Tensor], groups: Tensor) -> tuple[Batch, dict[str, Tensor]]:
    """(the completions of these groups [M, G] as a batch, its leaves)."""
    fields = {name: column[groups.flatten()] for name, column in columns.items()}
    if "group" in fields:
        fields["group"] = torch.arange(len(groups)).repeat_interleave(groups.shape[1])
    leaves = {name: fields[name].clone().requires_grad_() for name in LEAVES if name in fields}
    return Batch(**{**fields, **leaves}), leaves


def _terms(output: Any, leaves: dict[str, Tensor], world: World, groups: Tensor, main: bool) -> dict[str, Tensor]:
    """{term: gradients [M, P]}: the gradient at the leaves of the loss, carried on to theta by the Jacobians."""
    wanted = {"loss": output.loss}
    if len(output.terms) > 1:
        wanted = {"policy": output.terms["policy"]} if main and "policy" in output.terms else wanted | output.terms
    found: dict[str, Tensor] = {}
    for term, value in wanted.items():
        gradient = torch.zeros(len(groups), world.tree.size, dtype=torch.float64)
        if value.requires_grad:
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
            for leaf, slope in zip(leaves, slopes, strict=True):
                if slope is not None and leaf in world.jacobians:
                    of_groups = slope.reshape(*groups.shape, -1)
                    gradient = gradient + torch.einsum("mgl,mglp->mp", of_groups, world.jacobians[leaf][groups])
        found[term] = gradient
    return found | ({"policy": found["loss"]} if "policy" in output.terms and "policy" not in found else {})


def _groups(probability: Tensor, size: int, samples: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """(rows of each group [M, G], its probability [M], whether these are all)."""
    completions = len(probability)
    if math.comb(completions + size - 1, size) <= LIMIT:
        groups = torch.tensor(list(itertools.combinations_with_replacement(range(completions), size)))
        counts = torch.nn.functional.one_hot(groups, completions).sum(1).double()
        ways = math.lgamma(size + 1) - torch.lgamma(counts + 1).sum(1)
        return groups, (ways + counts @ probability.log()).exp(), True
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(probability, samples * size, replacement=True, generator=draw).view(samples, size)
    return drawn, torch.full((samples,), 1 / samples, dtype=torch.float64), False


@dataclass(frozen=True)
class Bias:
    """The expected gradient g of a loss (which is minimized) against a true gradient g* (which is climbed).

    scale          c = <-g, g*> / <g*, g*>: how much of g* the loss follows
    residual       ‖-g - c·g*‖ / ‖c·g*‖: 0 means that the loss climbs exactly c times the objective; inf where c is 0
    cosine         of -g and g*
    norm_ratio     ‖g‖ / ‖g*‖
    variance       trace of the covariance of one group's gradient
    signal_to_noise  ‖g‖² / variance
    interval       half width of a 95 % interval of g, relative to its norm; 0 where all groups were enumerated
    """

    scale: float
    residual: float
    cosine: float
    norm_ratio: float
    variance: float
    signal_to_noise: float
    exact: bool
    interval: float


def bias(gradients: GroupGradients, true: Tensor, term: str = "loss") -> Bias:
    """One term's expected gradient against this direction of ascent [P]."""
    climbs, variance = -gradients.mean(term), gradients.variance(term)
    size, length = float(climbs.norm()), float(true.norm())
    nothing = size <= 1e-12 * max(1.0, math.sqrt(variance))  # a sum of terms that cancel: no direction
    scale = float(climbs @ true) / length**2 if length else math.nan
    off = float((climbs - scale * true).norm())
    return Bias(
        scale=0.0 if nothing else scale,
        residual=math.inf if nothing or not scale else off / abs(scale * length),
        cosine=0.0 if nothing else float(climbs @ true) / (size * length) if length else math.nan,
        norm_ratio=0.0 if nothing else size / length if length else math.inf,
        variance=variance,
        signal_to_noise=0.0 if nothing else size**2 / variance if variance > 0 else math.inf,
        exact=gradients.exact,
        interval=0.0 if gradients.exact else 1.96 * math.sqrt(variance / len(gradients.weight)) / max(size, 1e-300),
    )
