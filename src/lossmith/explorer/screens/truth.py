"""The truth: a policy so small that everything about it is known, trained with the chosen losses side by side.

It writes at most two words of three tokens (rain, wow, the end), so there are seven completions, and every expectation
is a finite sum (`lossmith.proofs.enumeration`).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, LossmithError, quiet_traps
from lossmith.explorer.address import State
from lossmith.explorer.chosen import ByParameters, Chosen
from lossmith.explorer.drawing import Line, chart
from lossmith.losses import Loss
from lossmith.proofs.enumeration import Expectation, Tree, World, bias, group_gradients

__all__ = ["NAMES", "SHOWN", "best_possible", "small_world", "view", "walk"]

TREE = Tree(3, 2)
WORDS = ("rain", "wow", "")
NAMES = tuple(" ".join(WORDS[v] for v in y if v < 2) or "(nothing)" for y in TREE.sequences)
START = (1.2, -0.6, 0.6, 0.4, -0.6, 0.6, 0.2, -0.4, 0.6)  # it likes rain, and seldom writes wow
SECONDS = 0.8  # of walking in one request; the page asks again for the rest
DRIFTS, SIZES = (0.0, 0.25, 0.5, 1.0, 1.5), (2, 3, 4, 5)
_PATHS: OrderedDict[Any, list[Tensor]] = OrderedDict()  # thetas of walks; the least recent go first
_KEPT = 64
_OF = {
    "steps": ("group", "steps", "rate", "reuse", "gap", "seed", "proxy"),
    "gradient": ("group", "gap", "drift", "seed", "proxy"),
    "noise": ("gap", "drift", "seed", "proxy"),
    "drift": ("group", "gap", "seed", "proxy"),
    "proxy": ("beta", "steps", "rate", "group", "seed", "proxy", "gold"),
}
SHOWN = tuple(dict.fromkeys(name for names in _OF.values() for name in names))


@cache
def _drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the policy at the start, the way to the reference, the way to the sampler), [P] each."""
    draw = torch.Generator().manual_seed(seed)
    to_ref, to_sampler, theta = (torch.randn(TREE.size, generator=draw, dtype=torch.float64) for _ in range(3))
    return theta if seed else torch.tensor(START, dtype=torch.float64), to_ref, to_sampler


def small_world(reward: tuple[float, ...], gap: float = 0.0, drift: float = 0.0, seed: int = 0) -> World:
    """The policy at the start; a reference `gap` away from it, and a sampler `drift` away, in fixed directions."""
    theta, to_ref, to_sampler = _drawn(seed)
    return World(
        TREE, theta, theta + drift * to_sampler, theta + gap * to_ref, torch.tensor(reward, dtype=torch.float64)
    )


def walk(
    loss: Loss, reward: tuple[float, ...], gap: float, size: int, rate: float, steps: int,
    reuse: int = 1, seed: int = 0, seconds: float = SECONDS,
) -> list[Tensor]:  # fmt: skip
    """The parameters at the start and after each step along the expected gradient, exactly.

    reuse: steps before there are new completions. Fewer steps than asked for once the seconds are over: the next call
    goes on. LossError: the gradient is not finite.
    """
    key = (ByParameters.of(loss), reward, gap, size, rate, reuse, seed)
    world = small_world(reward, gap, 0.0, seed)
    path = _PATHS.setdefault(key, [world.theta])
    _PATHS.move_to_end(key)
    while len(_PATHS) > _KEPT:
        _PATHS.popitem(last=False)
    until, expected = time.monotonic() + seconds, Expectation(loss, size)
    while len(path) <= steps:
        done = len(path) - 1
        here = World(TREE, path[-1], path[done - done % reuse], world.ref, world.reward)
        gradient = expected.gradient(here)
        if not bool(torch.isfinite(gradient).all()):
            raise LossError(f"step {len(path)}: the expected gradient is not finite; take a smaller learning rate.")
        path.append(path[-1] - rate * gradient)
        if time.monotonic() > until:
            break
    return path[: steps + 1]


def view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """What the chosen part shows; `more`: the page should ask again, for the rest of the walk."""
    part = state["part"]
    known, without = [], []
    makers = {"steps": _steps, "gradient": _gradient, "noise": _noise, "drift": _drift, "proxy": _proxy}
    for one in losses:
        if one.loss is not None:
            known.append(one)
    found: dict[str, Any] = {}
    while True:
        try:
            with quiet_traps():
                found = makers[part](state, known)
            break
        except _Without as stopped:
            without.append((stopped.one, str(stopped.error)))
            known = [one for one in known if one is not stopped.one]
    return {"part": part, "of": _OF[part], "without": without, "names": NAMES, "more": False, **found}


class _Without(Exception):
    """A loss that cannot be evaluated in a small world, and why."""

    def __init__(self, one: Chosen, error: Exception) -> None:
        super().__init__(str(error))
        self.one, self.error = one, error


def _try(one: Chosen, make: Any) -> Any:
    try:
        return make()
    except (LossmithError, NotImplementedError) as error:
        raise _Without(one, error) from None


# -- steps ------------------------------------------------------------------------------------------------------------


def measured(theta: Tensor, world: World, gold: Tensor | None = None) -> dict[str, float]:
    """E[r], KL to the reference (nats), entropy (nats) of the distribution of completions; E[gold] where given."""
    p = TREE.logp(theta).exp()
    found = {
        "reward": float((p * world.reward).sum()),
        "kl": float(TREE.sequence_kl(theta, world.ref)),
        "entropy": float(-(p * p.log()).sum()),
    }
    return found if gold is None else found | {"gold": float((p * gold).sum())}


def _steps(state: State, losses: list[Chosen]) -> dict[str, Any]:
    reward, gap, seed = state["proxy"], state["gap"], state["seed"]
    world = small_world(reward, gap, 0.0, seed)
    rows, more = [], False
    curves: dict[str, list[Line]] = {"reward": [], "kl": [], "entropy": [], "cosine": []}
    settings = (reward, gap, state["group"], state["rate"], state["steps"], state["reuse"], seed)
    seconds = SECONDS / max(len(losses), 1)
    for one in losses:
        path = _try(one, lambda one=one: walk(one.loss, *settings, seconds=seconds))
        more |= len(path) <= state["steps"]
        told = [measured(theta, world) for theta in path]
        for key, lines in curves.items():
            points = _cosines(path, world, _beta(one.loss)) if key == "cosine" else [m[key] for m in told]  # type: ignore[arg-type]
            lines.append(Line(one.place, one.letter, [(float(i), y) for i, y in enumerate(points)], dots=True))
        rows.append({"one": one, "steps": len(path) - 1, **told[-1], "p": TREE.logp(path[-1]).exp().tolist()})
    titles = {"reward": "E[r], the expected reward", "kl": "KL to the reference, nats", "entropy": "Entropy, nats",
              "cosine": "Cosine of each step and the true gradient"}  # fmt: skip
    charts = [
        {
            "title": titles[key],
            "svg": chart(key, lines, "step", "", top=1.05 if key == "cosine" else None, said=f"{titles[key]} by step"),
        }
        for key, lines in curves.items()
        if any(line.points for line in lines)
    ]
    start = measured(world.theta, world) | {"p": TREE.logp(world.theta).exp().tolist()}
    ref = TREE.logp(world.ref).exp().tolist() if gap else None
    return {"rows": rows, "charts": charts, "start": start, "rewards": reward, "ref": ref, "more": more}


def _cosines(path: list[Tensor], world: World, beta: float) -> list[float]:
    """Of every step that was taken with ∇(E[r] - β·KL) where it was taken; NaN where either is 0."""
    found = []
    for theta, after in pairwise(path):
        true, step = World(TREE, theta, theta, world.ref, world.reward).true_gradient(beta), after - theta
        lengths = float(true.norm() * step.norm())
        found.append(float(true @ step) / lengths if lengths > 1e-15 else math.nan)
    return found


# -- the expected gradient --------------------------------------------------------------------------------------------


def _beta(loss: Loss) -> float:
    return float(loss.kl.beta) if loss.kl.active else 0.0


@lru_cache(maxsize=400)
def _bias(
    of: ByParameters, reward: tuple[float, ...], gap: float, drift: float, size: int, seed: int
) -> tuple[Any, Tensor, Tensor]:
    """(bias, expected step, true gradient) of a loss; of what it says to maximize, its KL term included."""
    world = small_world(reward, gap, drift, seed)
    true = world.true_gradient(_beta(of.loss))
    found = group_gradients(of.loss, world, size)
    return bias(found, true), -found.mean(), true


def _moves(step: Tensor, world: World) -> list[float]:
    """How a step of length 1 in this direction changes each completion's probability."""
    length = float(step.norm())
    if not length:
        return [0.0] * len(NAMES)
    slopes = torch.autograd.functional.jacobian(lambda t: TREE.logp(t).exp(), world.theta)
    return (slopes @ (step / length)).tolist()


def _gradient(state: State, losses: list[Chosen]) -> dict[str, Any]:
    reward, gap, drift, size, seed = (state[name] for name in ("proxy", "gap", "drift", "group", "seed"))
    world = small_world(reward, gap, drift, seed)
    rows = []
    for one in losses:
        told, step, true = _try(one, lambda one=one: _bias(ByParameters.of(one.loss), reward, gap, drift, size, seed))
        rows.append(
            {"one": one, "bias": told, "beta": _beta(one.loss), "moves": _moves(step, world),  # type: ignore[arg-type]
             "true": _moves(true, world)}
        )  # fmt: skip
    top = max((abs(x) for row in rows for x in (*row["moves"], *row["true"])), default=1.0) or 1.0
    return {"rows": rows, "top": top, "rewards": reward}


def _noise(state: State, losses: list[Chosen]) -> dict[str, Any]:
    reward, gap, drift, seed = (state[name] for name in ("proxy", "gap", "drift", "seed"))
    rows, lines = [], []
    for one in losses:
        told = [
            _try(one, lambda one=one, n=n: _bias(ByParameters.of(one.loss), reward, gap, drift, n, seed))[0]
            for n in SIZES
        ]
        rows.append({"one": one, "values": [(b.signal_to_noise, b.cosine) for b in told]})
        lines.append(
            Line(one.place, one.letter, [(float(n), b.signal_to_noise) for n, b in zip(SIZES, told, strict=True)])
        )
    svg = chart("noise", lines, "completions in a group, G", "signal to noise", ticks=SIZES, said="noise by group size")
    return {
        "rows": rows,
        "sizes": SIZES,
        "charts": [{"title": "‖E g‖² / variance of one group's gradient", "svg": svg}],
    }


def _drift(state: State, losses: list[Chosen]) -> dict[str, Any]:
    reward, gap, size, seed = (state[name] for name in ("proxy", "gap", "group", "seed"))
    rows, lines = [], []
    for one in losses:
        told = [
            _try(one, lambda one=one, d=d: _bias(ByParameters.of(one.loss), reward, gap, d, size, seed))[0]
            for d in DRIFTS
        ]
        rows.append({"one": one, "values": [(b.cosine, b.scale) for b in told]})
        lines.append(Line(one.place, one.letter, [(d, b.cosine) for d, b in zip(DRIFTS, told, strict=True)]))
    worlds = [small_world(reward, gap, d, seed) for d in DRIFTS]
    kls = [float(TREE.sequence_kl(w.behavior, w.theta)) for w in worlds]
    svg = chart(
        "drift", lines, "how far the sampler is from the policy", "cosine", ticks=DRIFTS, said="cosine by drift"
    )
    return {
        "rows": rows, "drifts": DRIFTS, "kls": kls,
        "charts": [{"title": "Cosine of the expected step and the true gradient", "svg": svg}],
    }  # fmt: skip


# -- over-optimization ------------------------------------------------------------------------------------------------


def best_possible(
    proxy: tuple[float, ...], gold: tuple[float, ...], beta: float, seed: int = 0
) -> tuple[float, float, float]:
    """(√KL, E[proxy], E[gold]) of the policy that maximizes E[proxy] − β·KL, in closed form."""
    world = small_world(proxy, seed=seed)
    p = world.optimum(beta)
    kl = float((p * (p.log() - TREE.logp(world.ref))).nan_to_num().sum())
    wanted = torch.tensor(gold, dtype=torch.float64)
    return max(kl, 0.0) ** 0.5, float((p * world.reward).sum()), float((p * wanted).sum())


def _proxy(state: State, losses: list[Chosen]) -> dict[str, Any]:
    proxy, gold, beta, seed = (state[name] for name in ("proxy", "gold", "beta", "seed"))
    wanted, world = torch.tensor(gold, dtype=torch.float64), small_world(proxy, seed=seed)
    settings = (proxy, 0.0, state["group"], state["rate"], state["steps"], 1, seed)
    seconds = SECONDS / max(len(losses), 1)
    rows, more = [], False
    betas = [10.0 ** (1 - 3 * i / 40) for i in range(41)]
    ideal = sorted(best_possible(proxy, gold, b, seed) for b in betas)
    curves = {
        "proxy": [Line(8, "best", [(d, r) for d, r, _ in ideal])],
        "gold": [Line(8, "best", [(d, g) for d, _, g in ideal])],
    }
    for one in losses:
        loss = _try(one, lambda one=one: _with_beta(one.loss, beta))
        path = _try(one, lambda loss=loss: walk(loss, *settings, seconds=seconds))
        more |= len(path) <= state["steps"]
        told = [measured(theta, world, wanted) for theta in path]
        for key, of in (("proxy", "reward"), ("gold", "gold")):
            points = [(max(m["kl"], 0.0) ** 0.5, m[of]) for m in told]
            curves[key].append(Line(one.place, one.letter, points, dots=True))
        best = max(range(len(told)), key=lambda i: told[i]["gold"])
        rows.append(
            {"one": one, "steps": len(path) - 1, **told[-1], "beta": _beta(loss), "best": told[best]["gold"],
             "when": best, "p": TREE.logp(path[-1]).exp().tolist()}
        )  # fmt: skip
    titles = {"proxy": "Proxy: what is trained on", "gold": "Gold: what was wanted"}
    charts = [
        {
            "title": titles[key],
            "svg": chart(key, lines, "√KL to the start, √nats", "", said=f"{titles[key]} against √KL"),
        }
        for key, lines in curves.items()
    ]
    start = measured(world.theta, world, wanted) | {"p": TREE.logp(world.theta).exp().tolist()}
    return {"rows": rows, "charts": charts, "start": start, "rewards": proxy, "golds": gold, "ref": None, "more": more}


def _with_beta(loss: Loss, beta: float) -> Loss:
    """The loss with this coefficient of its KL term, where it has one."""
    if not beta or "beta" not in loss.to_dict():
        return loss
    try:
        return loss.replace(beta=beta)
    except LossError:
        return loss
