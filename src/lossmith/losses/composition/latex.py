"""Formulas as LaTeX, converted from the tree of their text: nobody writes LaTeX beside it."""

from __future__ import annotations

import re
from functools import singledispatch

from lossmith.losses.composition import notation as n

__all__ = ["latex"]

_GREEK = {
    "Λ": "Lambda", "Φ": "Phi", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "varphi",
    "ω": "omega", "α": "alpha", "Δ": "Delta", "Ω": "Omega", "ζ": "zeta", "χ": "chi", "ψ": "psi", "ν": "nu", "ξ": "xi",
}  # fmt: skip
_OPERATORS = ("max", "min", "log", "ln", "exp", "arg")
_SIGNS = {"≤": r"\le", "≥": r"\ge", "≠": r"\ne", "∈": r"\in", "±": r"\pm", "−": "-"}


def latex(text: str) -> str:
    """All lines of a formula, aligned. LossError: what cannot be read."""
    lines = [f"& {_line(statement)}" for statement in n.read(text)]
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


def _line(statement: n.Statement) -> str:
    if isinstance(statement, n.Remark):
        return rf"\text{{{statement.text}}}"
    if isinstance(statement, n.Only):
        return rf"\text{{only }} {statement.index} \text{{ with }} {tex(statement.condition)}"
    assert isinstance(statement, n.Set)
    if statement.names == (n.Name("L"),):
        return rf"\mathcal{{L}}(\theta) = {tex(statement.value)}"
    names = ", ".join(map(tex, statement.names))
    target = names if len(statement.names) == 1 else f"({names})"
    return f"{target} {chr(92) + 'leftarrow' if statement.arrow else '='} {tex(statement.value)}"


def _word(word: str) -> str:
    """A symbol: Greek, a letter with its hat, star or number, or a word."""
    head, star = (word[:-1], "^{*}") if word.endswith("*") else (word, "")
    digits = "".join(str("₀₁₂₃₄₅₆₇₈₉".index(c)) for c in head if c in "₀₁₂₃₄₅₆₇₈₉")
    head = head.rstrip("₀₁₂₃₄₅₆₇₈₉")
    small = f"_{{{digits}}}" if digits else ""
    if head == "Â":
        return rf"\hat{{A}}{small}{star}"
    if head in _GREEK:
        return rf"\{_GREEK[head]}{small}{star}"
    return (head if len(head) == 1 else rf"\mathrm{{{head}}}") + small + star


def _under(text: str) -> str:
    """What stands under a name: indices, relations between them, or a word."""
    text = text.replace("≥", r" \ge ").replace("≤", r" \le ").replace("≠", r" \ne ").replace("∈", r" \in ")
    text = "".join(rf"\{_GREEK[c]}" if c in _GREEK else c for c in text)
    return rf"\mathrm{{{text}}}" if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def _symbol(name: str) -> str:
    if name == "#g":
        return r"\#g"
    head, _, under = name.partition("_")
    return _word(head) + (f"_{{{_under(under)}}}" if under else "")


def _bare(node: n.Node) -> n.Node:
    """Without round brackets, where a fraction or an exponent holds it together already."""
    return node.of if isinstance(node, n.Group) and node.bracket == "(" else node


@singledispatch
def tex(node: n.Node) -> str:
    """One node."""
    raise AssertionError(f"no LaTeX for {type(node).__name__}")


@tex.register
def _(node: n.Number) -> str:
    if node.text in ("½", "∞"):
        return {"½": r"\tfrac{1}{2}", "∞": r"\infty"}[node.text]
    mantissa, _, exponent = node.text.partition("e")
    if not exponent:
        return mantissa
    power = f"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


@tex.register
def _(node: n.Name) -> str:
    head, _, word = node.name.partition("_")
    under = ", ".join(_under(x) for x in (word, node.index) if x)
    return _symbol(node.name) if not node.index else f"{_word(head)}_{{{under}}}"


@tex.register
def _(node: n.Prob) -> str:
    return f"{_symbol(node.policy)}({'v' if node.at == 'v' else 'y' + (f'_{{{node.at}}}' if node.at else '')})"


@tex.register
def _(node: n.Call) -> str:
    args = ", ".join(map(tex, node.args))
    if node.name == "√":
        return rf"\sqrt{{{tex(_bare(node.args[0]))}}}"
    if node.name == "exp" and isinstance(node.args[0], n.Group):
        args = tex(node.args[0].of)
    name = rf"\{node.name}" if node.name in _OPERATORS else _word(node.name)
    if node.name == "KL" or node.name == "KL₂":
        args = r" \,\|\, ".join(map(tex, node.args))
    if name.startswith(r"\mathrm"):
        name = rf"\operatorname{{{node.name.rstrip('₀₁₂₃₄₅₆₇₈₉')}}}" + ("_{2}" if node.name.endswith("₂") else "")
    name += f"_{{{_under(node.under)}}}" if node.under else ""
    alone = node.name in n.PREFIX and isinstance(node.args[0], (n.Name, n.Prob, n.Call))
    return f"{name} {args}" if alone else rf"{name}\left({args}\right)"


@tex.register
def _(node: n.Sum) -> str:
    return rf"{chr(92)}{'sum' if node.sign == 'Σ' else 'prod'}_{{{_under(node.under)}}} {tex(node.body)}"


@tex.register
def _(node: n.Unary) -> str:
    return f"{_SIGNS[node.sign]} {tex(node.of)}"


@tex.register
def _(node: n.Binary) -> str:
    if node.sign == "/":
        return rf"\frac{{{tex(_bare(node.left))}}}{{{tex(_bare(node.right))}}}"
    left, right = tex(node.left), tex(node.right)
    if node.sign not in ("·", ""):
        return f"{left} {_SIGNS.get(node.sign, node.sign)} {right}"
    return rf"{left} \cdot {right}" if right[0].isdigit() else rf"{left} \, {right}"


@tex.register
def _(node: n.Power) -> str:
    base = tex(node.base)
    return (
        f"{base}^{{{tex(_bare(node.exponent))}}}"
        if isinstance(node.base, (n.Group, n.Number, n.Name, n.Abs))
        else (rf"\left({base}\right)^{{{tex(_bare(node.exponent))}}}")
    )


@tex.register
def _(node: n.Group) -> str:
    close = ")" if node.bracket == "(" else "]"
    return rf"\left{node.bracket} {tex(node.of)} \right{close}"


@tex.register
def _(node: n.Abs) -> str:
    return rf"\left| {tex(node.of)} \right|"


@tex.register
def _(node: n.Compare) -> str:
    return tex(node.first) + "".join(f" {_SIGNS.get(sign, sign)} {tex(x)}" for sign, x in node.rest)


@tex.register
def _(node: n.Logic) -> str:
    return rf" \text{{ {node.word} }} ".join(map(tex, node.items))


@tex.register
def _(node: n.Not) -> str:
    return rf"\text{{not }} {tex(node.of)}"


@tex.register
def _(node: n.Iverson) -> str:
    return rf"\mathbb{{1}}\left[ {tex(node.of)} \right]"


@tex.register
def _(node: n.Choice) -> str:
    rows, rest = [], node
    while True:
        rows.append(rf"{tex(rest.value)} & \text{{if }} {tex(rest.condition)}")
        if not isinstance(rest.otherwise, n.Choice):
            break
        rest = rest.otherwise
    rows.append(rf"{tex(rest.otherwise)} & \text{{else}}")
    return r"\begin{cases} " + r" \\ ".join(rows) + r" \end{cases}"


@tex.register
def _(node: n.Tuple_) -> str:
    return rf"\left({', '.join(map(tex, node.items))}\right)"


@tex.register
def _(node: n.Range) -> str:
    return rf"{tex(node.start)} \ldots {tex(node.stop)} \text{{ by }} {tex(node.step)}"


@tex.register
def _(node: n.Pairs) -> str:
    return r"\left\{ (w, l) : " + ",\\ ".join(map(tex, node.conditions)) + r" \right\}"


@tex.register
def _(node: n.Given) -> str:
    return r"\text{as given}"
