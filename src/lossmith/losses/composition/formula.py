"""A loss as people read it, generated from the composition: text, and LaTeX converted from that text."""

from __future__ import annotations

import re

from lossmith.errors import LossError
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.composition.composition import Composition
from lossmith.losses.composition.latex import latex
from lossmith.losses.composition.notation import KEPT, Binary, Choice, Unary, read_expression, where
from lossmith.losses.piece import number

__all__ = ["in_style", "render"]


def render(loss: Composition, style: str = "text") -> str:
    """The loss with its numbers; every symbol on a line of its own below it. LossError: no such style."""
    return in_style(list(dict.fromkeys([*_equation(loss), *_definitions(loss)])), style)


def in_style(lines: list[str], style: str) -> str:
    """These lines as "text", or as "latex". LossError: no such style, or a line that cannot be read."""
    if style not in ("text", "latex"):
        raise LossError(f"formula style is {style!r}; known: text, latex.")
    return "\n  ".join(lines) if style == "text" else latex("\n".join(lines))


def _equation(loss: Composition) -> list[str]:
    """The first line, and what the trust region and the extra term define."""
    policy, defined = _policy(loss) if loss.advantage.acts else ("", [])
    more, of_more = _extra(loss)
    terms, apart = [*([policy] if policy else []), *more], []
    for term, how in _counted_apart(loss):
        if how == "same":
            terms.append(term)
        else:
            apart.append(f"{term[0]} {AGGREGATE[how]().formula()} {_taking_part(loss)}{term[2:]}")
    total = (
        [f"{loss.aggregate.formula()} {_taking_part(loss)}[ {' '.join(terms).removeprefix('+ ')} ]"] if terms else []
    )
    return [f"L(θ) = {' '.join([*total, *apart]).removeprefix('+ ')}", *defined, *of_more]


def _taking_part(loss: Composition) -> str:
    return "[not truncated]·" if loss.truncated == "mask" else ""


def _policy(loss: Composition) -> tuple[str, list[str]]:
    """The policy term with its sign, masks and weights; and its definitions."""
    text = loss.trust.formula()
    if not loss.trust.reads_old:
        for at in ("y_t", "y_k", "y"):
            text = text.replace(f"π_old({at})", loss.ratio_level.under(at))
    if _changes_reward(loss):  # a trust region that divides completions looks at the score as it is given
        text = _renamed(text, "R", "R₀")
    expression, defined = where(text)
    return f"−{_factors(loss)}{_one(expression)}", defined


def _factors(loss: Composition) -> str:
    masked = any(mask.formula() for mask in (loss.token_mask, loss.sequence_mask))
    return "m·" * masked + "u·" * loss.mismatch.acts


def _one(expression: str) -> str:
    """In brackets where it is not one product; as it is where it cannot be read, which the proofs will say."""
    try:
        tree = read_expression(expression)
    except LossError:
        return expression
    product = isinstance(tree, Binary) and tree.sign in ("·", "/", "")
    return f"({expression})" if isinstance(tree, (Binary, Choice, Unary)) and not product else expression


def _renamed(text: str, name: str, new: str) -> str:
    return re.sub(rf"(?<!\w){name}(?![^\W_])", new, text)


def _counted_apart(loss: Composition) -> list[tuple[str, str]]:
    """(term with its sign, how it is aggregated) of the KL penalty and the entropy bonus."""
    found = []
    if loss.kl.in_loss:
        factors = _factors(loss) if loss.kl.masked else ""
        found.append((f"+ {factors}{loss.kl.formula()}", loss.kl_aggregate))
    if loss.entropy_coef:
        found.append((f"− {number(loss.entropy_coef)}·H_t", loss.entropy_aggregate))
    return found


def _extra(loss: Composition) -> tuple[list[str], list[str]]:
    """The extra term and the critic's, with their signs; and what the extra term defines."""
    extra, defined = where(loss.extra.formula() or "")
    more = [extra, loss.value.formula() if loss.value.active else ""]
    return [f"− {term[1:]}" if term[0] == "−" else f"+ {term}" for term in more if term], defined


def _definitions(loss: Composition) -> list[str]:
    """The lines below the equation, but for those of the trust region."""
    lines = []
    if (loss.trust.uses_ratio and loss.advantage.acts) or loss.kl.uses_ratio:
        lines.append(f"r = {loss.ratio_level.formula()}")
    lines += [*_advantage(loss), *_rewards(loss)]
    if loss.kl.active and loss.kl.estimator != "full":
        lines.append(_kappa(loss))
    if loss.mismatch.acts:
        u, defined = where(loss.mismatch.formula())
        lines += [f"u = {u}", *defined, "ρ = π_old(y_t) / μ(y_t)"]
    return [*lines, *_rules(loss)]


def _advantage(loss: Composition) -> list[str]:
    """A, what it is made of, and the critic's target; Â where A before scaling has a name of its own."""
    text, defined = where(loss.advantage.formula())
    target = [f"G = {loss.advantage.target_formula()}"] if loss.value.active else []
    if not loss.advantage.acts:
        return target
    changed = loss.advantage_scale.acts or loss.advantage_mul != 1 or loss.advantage_clip is not None
    named = changed and (loss.value.active or _renamed(text, "A", "Â") != text)
    if named:
        text, *target = (_renamed(line, "A", "Â") for line in (text, *target))
    whole, more = where(loss.advantage_scale.formula("Â" if named else text, loss.advantage.zero_alone))
    if loss.advantage_mul != 1:
        whole = f"{number(loss.advantage_mul)}·({whole})"
    if loss.advantage_clip is not None:
        whole = f"clip({whole}, ±{number(loss.advantage_clip)})"
    return [f"A = {whole}", *more, *([f"Â = {text}"] if named else []), *defined, *target]


def _changes_reward(loss: Composition) -> bool:
    return bool(loss.shaping) or loss.truncated == "zero" or loss.kl.in_reward


def _rewards(loss: Composition) -> list[str]:
    """What becomes of the score before it is an advantage. R and r_t are one reward: of a completion, of its tokens."""
    lines = [f"{'r_t' if shaping.by_token else 'R'} ← {shaping.formula()}" for shaping in loss.shaping]
    if loss.truncated == "zero":
        lines.append("r_t ← 0 if truncated else r_t" if _by_token(loss) else "R ← 0 if truncated else R")
    if loss.kl.in_reward:
        lines.append(f"r_t ← r_t − sg({loss.kl.formula()})")
    if (loss.kl.in_reward or _by_token(loss)) and not loss.advantage.per_token:
        lines.append("R = Σ_t r_t")
    return lines


def _by_token(loss: Composition) -> bool:
    return any(shaping.by_token for shaping in loss.shaping)


def _kappa(loss: Composition) -> str:
    anchor = "π_ref" if loss.kl.against == "ref" else "μ"
    return f"κ = log {'π_old' if loss.kl.place == 'reward' else 'π_θ'}(y_t) − log {anchor}(y_t)"


def _rules(loss: Composition) -> list[str]:
    rules = []
    masks = [text for mask in (loss.token_mask, loss.sequence_mask) if (text := mask.formula())]
    if masks:
        rules.append("m = " + "·".join(f"[{text}]" for text in masks))
    taking_part = loss.group_filter.formula()
    if taking_part:
        rules.append(f"only i with {_renamed(taking_part, 'R', 'R₀') if _changes_reward(loss) else taking_part}")
    if loss.masked == "keep" and not loss.kl.in_reward and not _by_token(loss) and "reward_parts" not in loss.needs:
        rules.append(KEPT)
    if loss.advantage.critic and not loss.value.active:
        rules.append("V is not trained by this loss")
    if loss.local_normalizer:
        rules.append("counts are those of the micro-batch at hand")
    return rules
