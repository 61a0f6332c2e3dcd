"""One sentence a completion and a token: which way it was pushed, and what decided it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lossmith.explanation.parts import Member, Number, Term

__all__ = ["completion_sentence", "direction", "short", "token_sentence"]

UNKNOWN = "which way it was pushed depends on what the file does not hold"
_BY_THE_MASKS = {
    "token mask": "this token is masked (kept are: {})",
    "sequence mask": "its completion is masked (kept are: {})",
    "mismatch": "sampler and learner disagree too much here ({} gives 0)",
    "weight": "its completion is left out of the loss (cut off by the token budget, or filtered out with its group)",
    "within reach": "its ratio is beyond ±20 nats, where the gradient ends",
    "coefficient": "its coefficient is 0",
}


def short(x: float) -> str:
    """Three digits, with a real minus sign."""
    return f"{x:.3g}".replace("-", "−")


def _signed(x: float) -> str:
    return ("+" if x > 0 else "") + short(x)


def direction(pull: float) -> str:
    """In words."""
    return "pushed up" if pull > 0 else "pushed down" if pull < 0 else "not pushed"


# -- a completion -----------------------------------------------------------------------------------------------------


def completion_sentence(
    pulls: Sequence[float | None], numbers: Sequence[Number], terms: Sequence[Term], group: Sequence[Member]
) -> str:
    """pulls: of its tokens. numbers, terms: those of a token that the loss sees."""
    known = [p for p in pulls if p is not None]
    if len(known) < len(pulls):
        return f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}."
    total = math.fsum(known)
    up, down = sum(p > 0 for p in known), sum(p < 0 for p in known)
    counted = f" ({up} of its {len(known)} tokens up, {down} down)" if up and down else ""
    way = direction(total if up or down else 0.0)
    return f"{way.capitalize()}{counted}, {reason(numbers, terms, group)}."


def reason(numbers: Sequence[Number], terms: Sequence[Term], group: Sequence[Member]) -> str:
    """What decided it for the whole completion: "because its completion scored 0.2 below its group's mean of 0.6"."""
    if any(t.measured for t in terms):
        return "as measured by autograd: the loss states no formula of its gradient"
    of = {n.name: n for n in numbers}
    advantage = of.get("advantage")
    if advantage is None:
        return _by_slope(of, terms, group)
    if advantage.value is None:
        return "because of its advantage, which depends on what the file does not hold"
    baseline, shaped = of.get("baseline"), _shaped(numbers)
    if baseline is None or baseline.value is None or shaped is None:
        return f"because its advantage is {_signed(advantage.value)} ({_form(of, advantage)})"
    return f"because {_compared(of, shaped, baseline, group)}{_scaled(of, advantage.value)}"


def _compared(of: dict[str, Number], shaped: float, baseline: Number, group: Sequence[Member]) -> str:
    scores = {m.score for m in group}
    if len(group) > 1 and len(scores) == 1 and baseline.value == shaped:
        return f"all {len(group)} completions of its prompt scored {short(shaped)}: there is nothing to tell apart"
    if len(group) == 1 and baseline.value == shaped:
        return "it is the only completion of its prompt, and there is nothing to compare it with"
    assert baseline.value is not None
    gap, score = shaped - baseline.value, of["score"].value
    steps = "" if score is None or score == shaped else f" ({short(score)} before shaping)"
    if gap == 0:
        return f"its completion scored {short(shaped)}{steps}, exactly {baseline.words}"
    side = "above" if gap > 0 else "below"
    return f"its completion scored {short(abs(gap))} {side} {baseline.words} of {short(baseline.value)}{steps}"


def _scaled(of: dict[str, Number], advantage: float) -> str:
    divisor = of.get("divisor")
    if divisor is None or divisor.value is None or advantage == 0:
        return ""
    return f": an advantage of {_signed(advantage)}, once divided by {divisor.words} ({short(divisor.value)})"


def _shaped(numbers: Sequence[Number]) -> float | None:
    stages = [n.value for n in numbers if n.name == "score" or n.name.startswith("after ")]
    return stages[-1] if stages else None


def _form(of: dict[str, Number], advantage: Number) -> str:
    return f"A = {of['before scaling'].words}" if "before scaling" in of else advantage.words


def _by_slope(of: dict[str, Number], terms: Sequence[Term], group: Sequence[Member]) -> str:
    """For a loss of whole completions: what it scored beside the others."""
    score = of["score"].value if "score" in of else None
    others = [short(m.score) for m in group if not m.this and m.score is not None]
    if score is None or not terms:
        return "by the terms of the loss that do not look at the score" if terms else "because no term of it acts"
    beside = f", the others of its prompt {_listed(others)}" if others else ""
    more = "more" if (terms[0].pull or 0.0) > 0 else "less"
    return f"because the loss falls as this completion becomes {more} likely: it scored {short(score)}{beside}"


def _listed(words: Sequence[str], most: int = 5) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


# -- a token ----------------------------------------------------------------------------------------------------------


def token_sentence(
    pull: float | None,
    trained: bool,
    numbers: Sequence[Number],
    terms: Sequence[Term],
    group: Sequence[Member],
) -> str:
    """numbers: from the score to the ratio, log-probabilities too."""
    if not trained:
        return "Not pushed: the mask leaves it out (a tool's or the prompt's token)."
    if pull is None:
        return f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}."
    way, why = direction(pull), reason(numbers, terms, group)
    by_name = {t.name: t for t in terms}
    policy = by_name.get("policy")
    stopped = _stopped(policy, numbers) if policy is not None else None
    if pull == 0:
        return f"Not pushed: {stopped or why.removeprefix('because ')}."
    parts = [f"{way.capitalize()} by {short(abs(pull))}"]
    main = policy if policy is not None else next(iter(terms), None)
    if main is not None and main.pull is not None and (main.pull > 0) == (pull > 0) and main.pull != 0:
        parts.append(f", {why}{_bent(policy, numbers)}")
    elif stopped:
        parts.append(f". The policy term does not push it: {stopped}")
    elif policy is not None and policy.pull:
        parts.append(f", although the policy term alone is {_signed(policy.pull)}, {why}")
    parts += [said for t in terms if t is not main and t.pull and (said := _other(t, numbers))]
    return "".join(parts) + "."


def _stopped(policy: Term, numbers: Sequence[Number]) -> str | None:
    """Why the policy term is 0, where not for its advantage."""
    of = {n.name: n.value for n in numbers}
    for factor in policy.factors:
        if factor.value != 0 or factor.name in ("advantage", "slope"):
            continue
        if factor.name == "trust weight":
            return _bound(of)
        return _BY_THE_MASKS.get(factor.name, "{}").format(factor.words)
    return "its own ratio is beyond a bound" if policy.share == 0 and policy.sum else None


def _bound(of: dict[str, float | None]) -> str:
    ratio, low, high = of.get("ratio"), of.get("lower bound"), of.get("upper bound")
    if ratio is None:
        return "the trust region cuts it off"
    if high is not None and ratio > high:
        return f"its ratio {short(ratio)} is above the trust region's bound of {short(high)}"
    if low is not None and ratio < low:
        return f"its ratio {short(ratio)} is below the trust region's bound of {short(low)}"
    return f"the trust region leaves it out at its ratio of {short(ratio)}"


def _bent(policy: Term | None, numbers: Sequence[Number]) -> str:
    """What else than the advantage changed its size."""
    of = {n.name: n.value for n in (policy.factors if policy is not None else ())}
    said = []
    weight, ratio = of.get("trust weight"), {n.name: n.value for n in numbers}.get("ratio")
    if weight is not None and abs(weight - 1) > 1e-6:
        same = ratio is not None and abs(weight - ratio) < 1e-9
        said.append(f"the ratio to the old policy ({short(weight)})" if same else f"a weight of {short(weight)}")
    mismatch = of.get("mismatch")
    if mismatch is not None and abs(mismatch - 1) > 1e-6:
        said.append(f"the correction for the sampler ({short(mismatch)})")
    return f"; times {' and '.join(said)}" if said else ""


def _other(term: Term, numbers: Sequence[Number]) -> str:
    assert term.pull is not None
    if term.name != "kl":
        return f"; the term {term.name} adds {_signed(term.pull)}"
    of = {n.name: n.value for n in numbers}
    now, ref = of.get("logp"), of.get("ref_logp")
    if now is None or ref is None:
        return f"; the KL term adds {_signed(term.pull)}"
    odds = math.exp(min(abs(now - ref), 700.0))
    than = "more" if now > ref else "less"
    return f"; the KL term adds {_signed(term.pull)}, as the policy finds it {short(odds)} times {than} likely " + (
        "than the reference does"
    )
