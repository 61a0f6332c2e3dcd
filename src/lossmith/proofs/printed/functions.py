"""The functions that formulas call. FUNCTIONS is open: a piece of one's own may put its function there.

A plain function is given the values of its arguments. A lazy one is given the call itself and the place where it
stands, and evaluates its arguments where it wants to: over a group, over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lossmith.losses.composition import notation as n
from lossmith.proofs.printed.dual import Value, apply, total, value_of

__all__ = ["FUNCTIONS", "lazy"]

FUNCTIONS: dict[str, Callable[..., Any]] = {}
Place = tuple[int, int]  # (i, t)


def plain(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the values of its arguments."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        def of_values(meaning: Any, args: list[Any]) -> Any:
            return function(*args)

        of_values.__doc__ = function.__doc__
        FUNCTIONS[name] = of_values
        return function

    return put


def lazy(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function (meaning, call, place) that evaluates its arguments itself: `meaning.of(call.args[0], place)`."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        function.lazy = True  # type: ignore[attr-defined]
        FUNCTIONS[name] = function
        return function

    return put


# -- of numbers ------------------------------------------------------------------------------------------------------


@plain("exp")
def _exp(x: Value) -> Value:
    return apply(math.exp, math.exp, x)


@plain("log")
@plain("ln")
def _log(x: Value) -> Value:
    return apply(math.log, lambda y: 1 / y, x)


@plain("√")
def _root(x: Value) -> Value:
    return apply(math.sqrt, lambda y: 0.5 / math.sqrt(y), x)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@plain("σ")
def _gate(x: Value) -> Value:
    return apply(_sigmoid, lambda y: _sigmoid(y) * _sigmoid(-y), x)


@plain("logit")
def _logit(x: Value) -> Value:
    return _log(x) - _log(1 - x)


@plain("sg")
def _stopped(x: Value) -> float:
    return value_of(x)


@plain("clip")
def _clip(x: Value, low: Any, high: Value | None = None) -> Value:
    """clip(x, low, high), or clip(x, a ± b)."""
    low, high = low if high is None else (low, high)
    return high if value_of(x) > value_of(high) else low if value_of(x) < value_of(low) else x


@plain("KL₂")
def _binary_kl(p: Value, q: Value) -> float:
    """KL₂(p‖q): of two coins; probabilities are taken no closer to 0 and 1 than a millionth."""
    a, b = (min(max(value_of(x), 1e-6), 1 - 1e-6) for x in (p, q))
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


@plain("sign")
def _sign(x: Value) -> float:
    return float((value_of(x) > 0) - (value_of(x) < 0))


# -- of a group, of the batch ----------------------------------------------------------------------------------------


def _over(meaning: Any, call: n.Call, at: dict[str, Any]) -> list[Value]:
    """The argument at every place that stands under the name."""
    return [meaning.of(call.args[0], place) for place in meaning.places(call.under, at)]


@lazy("mean")
def _mean(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    """Of no others: the completion's own, so that nothing differs from it."""
    items = _over(meaning, call, at)
    if not items and call.under == "j≠i":
        items = [meaning.of(call.args[0], {**at, "j": meaning.row(at)})]
    return total(items) / max(len(items), 1)


def _deviation(items: list[Value], less: int) -> float:
    numbers = [value_of(x) for x in items]
    mean = math.fsum(numbers) / max(len(numbers), 1)
    square = math.fsum((x - mean) ** 2 for x in numbers)
    return math.sqrt(square / max(len(numbers) - less, 1))


@lazy("std")
def _std(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    return _deviation(_over(meaning, call, at), 1)


@lazy("std0")
def _std0(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    return _deviation(_over(meaning, call, at), 0)


@lazy("max")
def _max(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    items = _over(meaning, call, at) if call.under else [meaning.of(x, at) for x in call.args]
    return max(items, key=value_of)


@lazy("min")
def _min(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    items = _over(meaning, call, at) if call.under else [meaning.of(x, at) for x in call.args]
    return min(items, key=value_of)


def _ranked(meaning: Any, call: n.Call, at: dict[str, Any], x: n.Node, *, largest: bool) -> list[int]:
    """The completions of the group, the largest (or smallest) x first; of equals the earlier one first."""
    places = meaning.places(call.under, at)
    keyed = [(value_of(meaning.of(x, place)) * (-1 if largest else 1), place["i"]) for place in places]
    return [i for _, i in sorted(keyed)]


@lazy("argmax")
def _argmax(meaning: Any, call: n.Call, at: dict[str, Any]) -> int:
    return _ranked(meaning, call, at, call.args[0], largest=True)[0]


@lazy("argmin")
def _argmin(meaning: Any, call: n.Call, at: dict[str, Any]) -> int:
    return _ranked(meaning, call, at, call.args[0], largest=False)[0]


@lazy("second")
def _second(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    """second_g(x): the second largest of the group; the largest where there is no other."""
    return sorted(_over(meaning, call, at), key=value_of)[-2:][0]


@lazy("lowest")
def _lowest(meaning: Any, call: n.Call, at: dict[str, Any]) -> Any:
    """lowest_g(k, x): the k completions of the group with the lowest x. lowest(x, m): 1 at the tokens with the lowest
    x, as many as keep their mean below m."""
    if call.under:
        count = int(value_of(meaning.of(call.args[0], at)))
        return _ranked(meaning, call, at, call.args[1], largest=False)[:count]

    def kept() -> set[Place]:
        ordered, found, sum_ = sorted((x, place) for place, x in _tokens(meaning, call.args[0]).items()), set(), 0.0
        bound = value_of(meaning.of(call.args[1], at))
        for count, (x, place) in enumerate(ordered, 1):
            sum_ += x
            if sum_ / count >= bound:
                break
            found.add(place)
        return found

    return float((meaning.row(at), meaning.token(at)) in meaning.once(("lowest", call), kept))


# -- of all tokens at once -------------------------------------------------------------------------------------------


def _tokens(meaning: Any, x: n.Node) -> dict[Place, float]:
    """An expression at every token of the batch, without its slope."""
    places = list(meaning.places("i,t", {}))
    found: dict[Place, float] = meaning.once(
        ("tokens", x), lambda: {(p["i"], p["t"]): value_of(meaning.of(x, p)) for p in places}
    )
    return found


@lazy("whiten")
def _whiten(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    """whiten(x): (x − mean)/√(var + 1e-8) over all tokens of the batch, the variance unbiased."""
    numbers = list(_tokens(meaning, call.args[0]).values())
    mean = math.fsum(numbers) / len(numbers)
    return (value_of(meaning.of(call.args[0], at)) - mean) / math.sqrt(_deviation([*numbers], 1) ** 2 + 1e-8)


@lazy("quantile")
def _quantile(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    """quantile(x, q): over all tokens of the batch, linear between order statistics."""
    numbers = sorted(_tokens(meaning, call.args[0]).values())
    place = value_of(meaning.of(call.args[1], at)) * (len(numbers) - 1)
    low = int(place)
    return numbers[low] + (place - low) * (numbers[min(low + 1, len(numbers) - 1)] - numbers[low])


@lazy("cov")
def _covariance(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    """cov(x, y): (x − mean x)(y − mean y) of the token, means over all tokens of the batch."""
    here = (meaning.row(at), meaning.token(at))
    fields = [_tokens(meaning, x) for x in call.args]
    x, y = (of[here] - math.fsum(of.values()) / len(of) for of in fields)
    return x * y


def _share(meaning: Any, share: n.Node, at: dict[str, Any]) -> int:
    """How many tokens a share of all is, at least one."""
    return max(1, int(value_of(meaning.of(share, at)) * len(list(meaning.places("i,t", {})))))


@lazy("top")
def _top(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    """top(share, x): 1 at this share of all tokens, those with the highest x."""
    of = _tokens(meaning, call.args[1])
    chosen = sorted(of, key=lambda place: -of[place])[: _share(meaning, call.args[0], at)]
    return float((meaning.row(at), meaning.token(at)) in chosen)


@lazy("drawn")
def _drawn(meaning: Any, call: n.Call, at: dict[str, Any]) -> float:
    """drawn(share, condition, seed, x, y): 1 at this share of all tokens, drawn among those where the condition holds.

    The draw is a function of the seed and of the two numbers of the token.
    """
    share, condition, seed, x, y = call.args

    def chosen() -> list[Place]:
        candidates = [place for place, holds in _tokens(meaning, condition).items() if holds]
        one, other, start = _tokens(meaning, x), _tokens(meaning, y), value_of(meaning.of(seed, at))

        def key(place: Place) -> float:
            number = math.sin(12.9898 * start + 78.233 * other[place] + 37.719 * one[place]) * 43758.5453
            return number - math.floor(number)

        return sorted(candidates, key=key, reverse=True)[: _share(meaning, share, at)]

    return float((meaning.row(at), meaning.token(at)) in meaning.once(("drawn", call), chosen))


@lazy("balance")
def _balance(meaning: Any, call: n.Call, at: dict[str, Any]) -> tuple[float, float]:
    """balance(r, A, lows, highs, share): the first bounds at which tokens with A > 0 carry their share of all.

    They carry Σ min(r, high)·A, the others Σ max(r, low)·|A|. The lower bound moves first, then the upper one.
    """
    ratio, advantage = (_tokens(meaning, x) for x in call.args[:2])
    lows, highs = (meaning.of(x, at) for x in call.args[2:4])
    share = value_of(meaning.of(call.args[4], at))

    def enough(low: float, high: float) -> bool:
        good = math.fsum(min(ratio[p], high) * a for p, a in advantage.items() if a > 0)
        bad = math.fsum(max(ratio[p], low) * -a for p, a in advantage.items() if a < 0)
        return good >= share * (good + bad)

    low, high, steps = lows[0], highs[0], 0
    while low < lows[1] and not enough(low, high):
        steps += 1
        low = min(lows[0] + steps * lows[2], lows[1])
    steps = 0
    while high < highs[1] and not enough(low, high):
        steps += 1
        high = min(highs[0] + steps * highs[2], highs[1])
    return low, high


@lazy("KL")
def _full_kl(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    """KL(π_θ‖π_ref) over the whole vocabulary: the batch holds it."""
    found: Value = meaning.facts.of(("full_kl",))[meaning.row(at)][meaning.token(at)]
    return found


@lazy("likeliest")
def _likeliest(meaning: Any, call: n.Call, at: dict[str, Any]) -> list[Any]:
    """likeliest(k, π(v), rest): the k likeliest tokens under π, and all others as one; without `rest`, as if there were
    no others: their probabilities are divided by their sum. Each member says its probability under a policy.
    """
    count, ranked = int(value_of(meaning.of(call.args[0], at))), call.args[1]
    size = len(list(meaning.places("v", at)))
    chosen = sorted(range(size), key=lambda v: -value_of(meaning.of(ranked, {**at, "v": v})))[:count]

    def share(meaning: Any, policy: str, at: dict[str, Any]) -> Value:
        return total(meaning.of_token(policy, v, at) for v in chosen)

    def alone(v: int) -> Callable[..., Value]:
        return lambda meaning, policy, at: meaning.of_token(policy, v, at) / share(meaning, policy, at)

    if len(call.args) == 2:
        return [alone(v) for v in chosen]
    return [*chosen, lambda meaning, policy, at: 1 - share(meaning, policy, at)]


@lazy("matched")
def _matched(meaning: Any, call: n.Call, at: dict[str, Any]) -> Value:
    """matched_P(a, b): the b that stands among all b where this pair's a stands among all a, both in their order."""
    places = list(meaning.places(call.under, at))
    numbers = [value_of(meaning.of(call.args[0], place)) for place in places]
    here = next(i for i, place in enumerate(places) if (place["w"], place["l"]) == (at["w"], at["l"]))
    rank = sum((x, i) < (numbers[here], here) for i, x in enumerate(numbers))
    found: Value = sorted((meaning.of(call.args[1], place) for place in places), key=value_of)[rank]
    return found
