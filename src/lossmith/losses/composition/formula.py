"""A loss as people read it, generated from the composition: text or LaTeX, never a string beside it."""

from __future__ import annotations

import re

from lossmith.errors import LossError
from lossmith.losses.composition.composition import Composition
from lossmith.losses.piece import number

__all__ = ["powers", "render"]


def render(loss: Composition, style: str = "text") -> str:
    """The loss with its numbers; every symbol on a line of its own below it."""
    if style not in ("text", "latex"):
        raise LossError(f"formula style is {style!r}; known: text, latex.")
    index = 0 if style == "text" else 1
    lines = [_equation(loss, index), *_where(loss, index)]
    if style == "text":
        return "\n".join([lines[0], *("  " + line for line in lines[1:])])
    return "\\begin{aligned}\n" + " \\\\\n".join("& " + powers(line) for line in lines) + "\n\\end{aligned}"


def powers(latex: str) -> str:
    """1e-06 as LaTeX reads it: 10^{-6}."""
    latex = re.sub(r"(?<![\d.])1e([+-])0*(\d+)", r"10^{\1\2}", latex)
    return re.sub(r"(\d)e([+-])0*(\d+)", r"\1 \\cdot 10^{\2\3}", latex).replace("^{+", "^{")


def _equation(loss: Composition, i: int) -> str:
    minus, theta = ("−", "L(θ)") if i == 0 else ("-", r"\mathcal L(\theta)")
    policy = loss.trust.formula()[i]
    if not loss.trust.reads_old:
        policy = policy.replace(("π_old", r"\pi_{\mathrm{old}}")[i], loss.ratio_level.denominator_names()[i])
    if loss.mismatch.acts:
        policy = ("u·" if i == 0 else r"u\,") + policy
    if any(mask.formula() for mask in (loss.token_mask, loss.sequence_mask)):
        policy = ("m·" if i == 0 else r"m\,") + policy
    terms = [*([minus + policy] if loss.advantage.acts else []), *_extra(loss, i)]
    body = (" ".join(terms) or "0").removeprefix("+ ")
    inner = f"[ {body} ]" if i == 0 else rf"\left[ {body} \right]"
    return f"{theta} = {loss.aggregate.formula()[i]} {inner}"


def _extra(loss: Composition, i: int) -> list[str]:
    minus = "−" if i == 0 else "-"
    extra = []
    if loss.kl.in_loss:
        how = "" if loss.kl_aggregate == "same" else f" ({loss.kl_aggregate})"
        extra.append("+ " + loss.kl.formula()[i] + (how if i == 0 else _text(how)))
    if loss.entropy_coef:
        how = "" if loss.entropy_aggregate == "same" else f" ({loss.entropy_aggregate})"
        bonus = "·H_t" + how if i == 0 else r"\,H_t" + _text(how)
        extra.append(f"{minus} {number(loss.entropy_coef)}" + bonus)
    more = loss.extra.formula()
    if more is not None:
        term = more[i]
        extra.append(f"{minus} {term[1:]}" if term[0] in "−-" else f"+ {term}")
    if loss.value.active:
        extra.append("+ " + loss.value.formula()[i])
    return extra


def _text(words: str) -> str:
    """Words inside LaTeX."""
    return rf"\ \text{{{words.strip().replace('_', chr(92) + '_')}}}" if words else ""


def _where(loss: Composition, i: int) -> list[str]:
    """The definitions below the equation."""
    lines = []
    if (loss.trust.uses_ratio and loss.advantage.acts) or loss.kl.uses_ratio:
        lines.append("r = " + loss.ratio_level.formula()[i])
    if loss.advantage.acts:
        lines.append(_advantage(loss, i))
    reward = _reward(loss, i)
    if reward:
        lines.append(reward)
    if loss.kl.active and loss.kl.estimator != "full":
        lines.append(_kappa(loss, i))
    symbols = loss.extra.where()
    lines += [] if symbols is None else [symbols[i]]
    if loss.value.active:
        lines.append("G = " + loss.advantage.target_formula()[i])
    if loss.mismatch.acts:
        rho = ",  ρ = π_old / μ" if i == 0 else r",\quad \rho = \pi_{\mathrm{old}}/\mu"
        lines.append("u = " + loss.mismatch.formula()[i] + rho)
    lines += _rules(loss, i)
    return lines


def _advantage(loss: Composition, i: int) -> str:
    formula = loss.advantage_scale.formula(*loss.advantage.formula())[i]
    if loss.advantage_mul != 1:
        formula = f"{number(loss.advantage_mul)}·({formula})" if i == 0 else f"{number(loss.advantage_mul)}({formula})"
    if loss.advantage_clip is not None:
        bound = number(loss.advantage_clip)
        formula = f"clip({formula}, ±{bound})" if i == 0 else rf"\operatorname{{clip}}({formula}, \pm {bound})"
    return f"A = {formula}"


def _reward(loss: Composition, i: int) -> str:
    arrow = "←" if i == 0 else r"\leftarrow"
    parts = [f"R {arrow} {s.formula()[i]}" for s in loss.shaping]
    if loss.kl.in_reward:
        penalty = loss.kl.formula()[i]
        parts.append(
            f"r_t {arrow} r_t − sg({penalty})" if i == 0 else rf"r_t {arrow} r_t - \operatorname{{sg}}({penalty})"
        )
    return (";  " if i == 0 else r";\quad ").join(parts)


def _kappa(loss: Composition, i: int) -> str:
    old = loss.kl.place == "reward"
    if i == 0:
        anchor = "π_ref" if loss.kl.against == "ref" else "μ"
        return f"κ = log {'π_old' if old else 'π_θ'}(y_t) − log {anchor}(y_t)"
    top = r"\pi_{\mathrm{old}}" if old else r"\pi_\theta"
    anchor = r"\pi_{\mathrm{ref}}" if loss.kl.against == "ref" else r"\mu"
    return rf"\kappa = \log {top}(y_t) - \log {anchor}(y_t)"


def _rules(loss: Composition, i: int) -> list[str]:
    rules = []
    if loss.truncated != "keep":
        rules.append(
            {"mask": "truncated completions: no loss", "zero": "truncated completions: reward 0"}[loss.truncated]
        )
    if loss.masked == "keep":
        rules.append("completions that are masked altogether keep their reward in the statistics")
    if loss.advantage.critic and not loss.value.active:
        rules.append("V is not trained by this loss")
    if loss.local_normalizer:
        rules.append("counts are those of the micro-batch at hand")
    rules = rules if i == 0 else [rf"\text{{{rule}}}" for rule in rules]
    masks = [f[i] for f in (loss.token_mask.formula(), loss.sequence_mask.formula()) if f is not None]
    kept = "m = 1 for " + "; ".join(masks) if i == 0 else r"m = \mathbb 1\bigl[" + r";\ ".join(masks) + r"\bigr]"
    taking_part = loss.group_filter.formula()
    return [*([kept] if masks else []), *([taking_part[i]] if taking_part else []), *rules]
