"""The truth: a policy so small that everything about it is known, trained with the chosen losses side by side.

It writes at most two words of three tokens (rain, wow, the end), so there are seven completions, and every expectation
is a finite sum (`lossmith.proofs.enumeration`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from functools import cache, lru_cache
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
    "steps": ("group", "steps", "rate", "gap", "proxy"),
    "gradient": ("group", "gap", "drift", "proxy"),
    "noise": ("gap", "drift", "proxy"),
    "drift": ("group", "gap", "proxy"),
    "proxy": ("beta", "steps", "rate", "group", "proxy", "gold"),
}
SHOWN = tuple(dict.fromkeys(name for names in _OF.values() for name in names))


@cache
def _directions() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(TREE.size, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore


def small_world(reward: tuple[float, ...], gap: float = 0.0, drift: float = 0.0) -> World:
    """The policy at the start; a reference `gap` away from it, and a sampler `drift` away, in fixed directions."""
    theta = torch.tensor(START, dtype=torch.float64)
    to_ref, to_sampler = _directions()
    return World(
        TREE, theta, theta + drift * to_sampler, theta + gap * to_ref, torch.tensor(reward, dtype=torch.float64)
    )


def walk(loss: Loss, reward: tuple[float, ...], gap: float, size: int, rate: float, steps: int) -> list[Tensor]:
    """The parameters at the start and after each step along the expected gradient, on-policy, exactly.

    Fewer steps than asked for where the time is up: the next call goes on.
    """
    key = (ByParameters.of(loss), reward, gap, size, rate)
    path = _PATHS.setdefault(key, [small_world(reward, gap).theta])
    _PATHS.move_to_end(key)
    while len(_PATHS) > _KEPT:
        _PATHS.popitem(last=False)
    until, expected = time.monotonic() + SECONDS, Expectation(loss, size)
    world = small_world(reward, gap)
    while len(path) <= steps and time.monotonic() < until:
        here = World(TREE, path[-1], path[-1], world.ref, world.reward)
        path.append(path[-1] - rate * expected.gradient(here))
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
    reward, gap = state["proxy"], state["gap"]
    world = small_world(reward, gap)
    rows, more = [], False
    curves: dict[str, list[Line]] = {"reward": [], "kl": [], "entropy": []}
    for one in losses:
        path = _try(one, lambda one=one: walk(one.loss, reward, gap, state["group"], state["rate"], state["steps"]))
        more |= len(path) <= state["steps"]
        told = [measured(theta, world) for theta in path]
        for key, lines in curves.items():
            lines.append(Line(one.place, one.letter, [(float(i), m[key]) for i, m in enumerate(told)], dots=True))
        rows.append({"one": one, "steps": len(path) - 1, **told[-1], "p": TREE.logp(path[-1]).exp().tolist()})
    titles = {"reward": "E[r], the expected reward", "kl": "KL to the reference, nats", "entropy": "Entropy, nats"}
    charts = [
        {"title": titles[key], "svg": chart(key, lines, "step", "", said=f"{titles[key]} by step")}
        for key, lines in curves.items()
        if lines
    ]
    start = measured(world.theta, world) | {"p": TREE.logp(world.theta).exp().tolist()}
    return {"rows": rows, "charts": charts, "start": start, "rewards": reward, "best": max(reward), "more": more}


# -- the expected gradient --------------------------------------------------------------------------------------------


def _beta(loss: Loss) -> float:
    return float(loss.kl.beta) if loss.kl.active else 0.0


@lru_cache(maxsize=400)
def _bias(
    of: ByParameters, reward: tuple[float, ...], gap: float, drift: float, size: int
) -> tuple[Any, Tensor, Tensor]:
    """(bias, expected step, true gradient) of a loss; of what it says to maximize, its KL term included."""
    world = small_world(reward, gap, drift)
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
    reward, gap, drift, size = state["proxy"], state["gap"], state["drift"], state["group"]
    world = small_world(reward, gap, drift)
    rows = []
    for one in losses:
        told, step, true = _try(one, lambda one=one: _bias(ByParameters.of(one.loss), reward, gap, drift, size))
        rows.append(
            {"one": one, "bias": told, "beta": _beta(one.loss), "moves": _moves(step, world),  # type: ignore[arg-type]
             "true": _moves(true, world)}
        )  # fmt: skip
    top = max((abs(x) for row in rows for x in (*row["moves"], *row["true"])), default=1.0) or 1.0
    return {"rows": rows, "top": top, "rewards": reward}


def _noise(state: State, losses: list[Chosen]) -> dict[str, Any]:
    reward, gap, drift = state["proxy"], state["gap"], state["drift"]
    rows, lines = [], []
    for one in losses:
        told = [
            _try(one, lambda one=one, n=n: _bias(ByParameters.of(one.loss), reward, gap, drift, n))[0] for n in SIZES
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
    reward, gap, size = state["proxy"], state["gap"], state["group"]
    rows, lines = [], []
    for one in losses:
        told = [
            _try(one, lambda one=one, d=d: _bias(ByParameters.of(one.loss), reward, gap, d, size))[0] for d in DRIFTS
        ]
        rows.append({"one": one, "values": [(b.cosine, b.scale) for b in told]})
        lines.append(Line(one.place, one.letter, [(d, b.cosine) for d, b in zip(DRIFTS, told, strict=True)]))
    worlds = [small_world(reward, gap, d) for d in DRIFTS]
    kls = [float(TREE.sequence_kl(w.behavior, w.theta)) for w in worlds]
    svg = chart(
        "drift", lines, "how far the sampler is from the policy", "cosine", ticks=DRIFTS, said="cosine by drift"
    )
    return {
        "rows": rows, "drifts": DRIFTS, "kls": kls,
        "charts": [{"title": "Cosine of the expected step and the true gradient", "svg": svg}],
    }  # fmt: skip


# -- over-optimization ------------------------------------------------------------------------------------------------


def best_possible(proxy: tuple[float, ...], gold: tuple[float, ...], beta: float) -> tuple[float, float, float]:
    """(√KL, E[proxy], E[gold]) of the policy that maximizes E[proxy] − β·KL, in closed form."""
    world = small_world(proxy)
    p = world.optimum(beta)
    kl = float((p * (p.log() - TREE.logp(world.ref))).nan_to_num().sum())
    wanted = torch.tensor(gold, dtype=torch.float64)
    return max(kl, 0.0) ** 0.5, float((p * world.reward).sum()), float((p * wanted).sum())


def _proxy(state: State, losses: list[Chosen]) -> dict[str, Any]:
    proxy, gold, beta = state["proxy"], state["gold"], state["beta"]
    wanted, world = torch.tensor(gold, dtype=torch.float64), small_world(proxy)
    rows, more = [], False
    betas = [10.0 ** (1 - 3 * i / 40) for i in range(41)]
    ideal = sorted(best_possible(proxy, gold, b) for b in betas)
    curves = {
        "proxy": [Line(8, "best", [(d, r) for d, r, _ in ideal])],
        "gold": [Line(8, "best", [(d, g) for d, _, g in ideal])],
    }
    for one in losses:
        loss = _try(one, lambda one=one: _with_beta(one.loss, beta))
        path = _try(one, lambda loss=loss: walk(loss, proxy, 0.0, state["group"], state["rate"], state["steps"]))
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
    return {"rows": rows, "charts": charts, "start": start, "rewards": proxy, "golds": gold, "more": more}


def _with_beta(loss: Loss, beta: float) -> Loss:
    """The loss with this coefficient of its KL term, where it has one."""
    if not beta or "beta" not in loss.to_dict():
        return loss
    try:
        return loss.replace(beta=beta)
    except LossError:
        return loss
