"""The language that formulas are printed in, read back into trees: a formula is data, not a picture of one.

A formula is lines of text. The first says L(θ); each line below it defines a name, updates the reward, restricts which
completions take part, or is one of the REMARKS.

    L(θ) = 1/N Σ_i 1/T_i Σ_t [ −min(r·A, clip(r, 0.8, 1.2)·A) ]
    r = π_θ(y_t) / π_old(y_t)
    A = (R − mean_g(R)) / (std_g(R) + 1e-06)

Sums reach as far as products do. `[...]` around a condition is 1 where it holds and 0 elsewhere; `a if c else b`
chooses; `x_{t+1}` is x at the next token, and 0 after the last; 0/0 is 0. r is the ratio, r_t the reward of a token,
R₀ the score as it is given where shaping makes another R of it. Σ_j is over all completions, Σ_i over those that take
part, Σ_v over the vocabulary. Products are written with `·`; beside each other stand only a number and what it
multiplies, and what precedes a sum. `f(x)` is a call. A piece may define names of its own: `c·A where c = ...; d = ...`
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lossmith.errors import LossError

__all__ = ["INDICES", "KEPT", "PREFIX", "REMARKS", "read", "read_expression", "where"]

INDICES = ("i", "j", "t", "k", "g", "w", "l", "v")
KEPT = "completions that are masked altogether keep their reward in the statistics"
REMARKS = (KEPT, "V is not trained by this loss", "counts are those of the micro-batch at hand")
POLICIES = ("π_θ", "π_old", "π_ref", "π_T", "μ")
PREFIX = ("log", "ln", "√")  # functions that need no brackets around a single thing


class Node:
    """A part of an expression."""


@dataclass(frozen=True)
class Number(Node):
    """A number as it is printed: 0.2, 1e-06, ½, ∞."""

    text: str


@dataclass(frozen=True)
class Name(Node):
    """A symbol and, if it has one, the index at which it is taken: R, R_w, V_{t+1}."""

    name: str
    index: str = ""


@dataclass(frozen=True)
class Prob(Node):
    """The probability that a policy gives to a token (at "t" or "k"), or to the whole completion (at "")."""

    policy: str
    at: str


@dataclass(frozen=True)
class Call(Node):
    """name_under(args)."""

    name: str
    under: str
    args: tuple[Node, ...]


@dataclass(frozen=True)
class Sum(Node):
    """Σ or Π of a body over what stands under it."""

    sign: str
    under: str
    body: Node


@dataclass(frozen=True)
class Unary(Node):
    """−x, or ±x."""

    sign: str
    of: Node


@dataclass(frozen=True)
class Binary(Node):
    """+ − ± · / and "" (a product without a sign)."""

    sign: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Power(Node):
    """base^exponent; `square` where it is printed as ²."""

    base: Node
    exponent: Node
    square: bool = False


@dataclass(frozen=True)
class Group(Node):
    """Brackets, ( or [."""

    bracket: str
    of: Node


@dataclass(frozen=True)
class Abs(Node):
    """|x|; |g| is the number of completions of a group."""

    of: Node


@dataclass(frozen=True)
class Compare(Node):
    """a < b ≤ c."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class Logic(Node):
    """and, or."""

    word: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Not(Node):
    """not x."""

    of: Node


@dataclass(frozen=True)
class Iverson(Node):
    """[condition]: 1 or 0."""

    of: Node


@dataclass(frozen=True)
class Choice(Node):
    """a if c else b."""

    value: Node
    condition: Node
    otherwise: Node


@dataclass(frozen=True)
class Tuple_(Node):
    """(a, b)."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Range(Node):
    """start…stop by step."""

    start: Node
    stop: Node
    step: Node


@dataclass(frozen=True)
class Pairs(Node):
    """{(w, l): conditions}."""

    conditions: tuple[Node, ...]


@dataclass(frozen=True)
class Given(Node):
    """as given: no arithmetic, the batch holds it."""


class Statement:
    """A line of a formula."""


@dataclass(frozen=True)
class Set(Statement):
    """names = value, or (arrow) names ← value, where the value speaks of what the name was before."""

    names: tuple[Name, ...]
    value: Node
    arrow: bool = False


@dataclass(frozen=True)
class Only(Statement):
    """only i with condition."""

    index: str
    condition: Node


@dataclass(frozen=True)
class Remark(Statement):
    """One of REMARKS."""

    text: str


_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿͰ-Ͽ"
_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?|½|∞)
    |(?P<name>\#g|[{_LETTERS}][{_LETTERS}0-9₀-₉]*\*?(?:_(?:\{{[^}}]*\}}|[{_LETTERS}0-9]+))?)
    |(?P<mark>[-−+±·/^²√()\[\]{{}}|‖,:;…<>=≤≥≠∈←])
    )""",
    re.VERBOSE,
)


def where(text: str) -> tuple[str, list[str]]:
    """(expression, its definitions) of a piece's `... where a = ...; b = ...`."""
    expression, _, definitions = text.partition(" where ")
    return expression, [line for line in definitions.split("; ") if line]


def read(text: str) -> list[Statement]:
    """The lines of a formula. LossError: what cannot be read, and where."""
    return [_statement(line.strip()) for line in text.splitlines()]


def read_expression(text: str) -> Node:
    """An expression alone. LossError: likewise."""
    reader = _Reader(text)
    found = reader.anything()
    reader.end()
    return found


def _statement(line: str) -> Statement:
    if line in REMARKS:
        return Remark(line)
    if line.startswith("L(θ) = "):
        return Set((Name("L"),), read_expression(line.removeprefix("L(θ) = ")))
    reader = _Reader(line)
    if reader.take("only"):
        index = reader.next()
        reader.expect("with")
        made: Statement = Only(index, reader.anything())
    else:
        names = reader.targets()
        arrow = reader.take("←")
        if not arrow and not reader.take("="):
            reader.fail("a line defines a name by '=', or is a remark that is known; it cannot go on with")
        made = Set(names, reader.anything(), arrow)
    reader.end()
    return made


def _split(name: str) -> tuple[str, str]:
    """(name, what stands under it), without braces."""
    head, _, under = name.partition("_")
    return head, under.strip("{}")


class _Reader:
    """Recursive descent over the tokens of one line, from what binds least to what binds most."""

    def __init__(self, line: str) -> None:
        self.line, self.tokens, at = line, [], 0
        while at < len(line.rstrip()):
            found = _TOKEN.match(line, at)
            if found is None:
                raise LossError(f"the formula {line!r} cannot be read at {line[at:].strip()[:20]!r}.")
            at = found.end()
            kind = str(found.lastgroup)
            self.tokens.append((kind, "−" if found[kind] == "-" else found[kind]))
        self.tokens.append(("end", ""))
        self.place = 0

    # -- tokens -----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return self.tokens[self.place][0]

    @property
    def token(self) -> str:
        return self.tokens[self.place][1]

    def next(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1][1]

    def take(self, token: str) -> bool:
        if self.token != token or self.kind == "end":
            return False
        self.place += 1
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            self.fail(f"{token!r} is missing before")

    def fail(self, why: str) -> None:
        rest = " ".join(text for _, text in self.tokens[self.place :])[:30].strip()
        raise LossError(f"the formula {self.line!r} cannot be read: {why} {rest or 'the end'!r}.")

    def end(self) -> None:
        if self.kind != "end":
            self.fail("nothing may follow here, but there is")

    # -- lines ------------------------------------------------------------------------------------------------------

    def targets(self) -> tuple[Name, ...]:
        """The name, or the names, that a line defines."""
        found = self.primary()
        names = found.items if isinstance(found, Tuple_) else (found,)
        for name in names:
            if not isinstance(name, Name):
                self.fail("a line defines a name, or is a remark that is known; it cannot go on with")
        return tuple(name for name in names if isinstance(name, Name))

    # -- expressions ------------------------------------------------------------------------------------------------

    def anything(self) -> Node:
        value = self.disjunction()
        if not self.take("if"):
            return value
        condition = self.disjunction()
        self.expect("else")
        return Choice(value, condition, self.anything())

    def disjunction(self) -> Node:
        items = [self.conjunction()]
        while self.take("or"):
            items.append(self.conjunction())
        return items[0] if len(items) == 1 else Logic("or", tuple(items))

    def conjunction(self) -> Node:
        items = [self.negation()]
        while self.take("and"):
            items.append(self.negation())
        return items[0] if len(items) == 1 else Logic("and", tuple(items))

    def negation(self) -> Node:
        return Not(self.negation()) if self.take("not") else self.comparison()

    def comparison(self) -> Node:
        first, rest = self.sum(), []
        while self.token in ("<", ">", "≤", "≥", "=", "≠", "∈") and self.kind == "mark":
            sign = self.next()
            rest.append((sign, self.sum()))
        return Compare(first, tuple(rest)) if rest else first

    def sum(self) -> Node:
        found: Node = Unary(self.next(), self.product()) if self.token in ("−", "±") else self.product()
        while self.kind == "mark" and self.token in ("+", "−", "±"):
            sign = self.next()
            found = Binary(sign, found, self.product())
        return found

    def product(self) -> Node:
        found = self.factor()
        while True:
            if self.kind == "mark" and self.token in ("·", "/"):
                sign = self.next()
                found = Binary(sign, found, self.factor())
            elif self._beside(found):
                found = Binary("", found, self.factor())
            else:
                return found

    def _beside(self, found: Node) -> bool:
        """Whether what follows is multiplied without a sign: a sum, or anything after a number."""
        if self.kind == "name" and self.token not in ("if", "else", "and", "or", "by", "not", "with"):
            return self.token[0] in "ΣΠ" or self._number(found)
        return self._number(found) and self.token in ("(", "√")

    def _number(self, found: Node) -> bool:
        """Whether it is a number, or a product that ends in one."""
        return isinstance(found, Number) or (isinstance(found, Binary) and isinstance(found.right, Number))

    def factor(self) -> Node:
        if self.kind == "name" and self.token[0] in "ΣΠ":
            sign, under = _split(self.next())
            return Sum(sign, under, self.product())
        found = self.primary()
        while True:
            if self.take("²"):
                found = Power(found, Number("2"), square=True)
            elif self.take("^"):
                found = Power(found, self.primary())
            else:
                return found

    def primary(self) -> Node:
        if self.kind == "number":
            number = Number(self.next())
            return self._range(number) if self.token == "…" else number
        if self.kind == "name" or self.token == "√":
            return self.named()
        if self.take("("):
            items = [self.anything()]
            while self.take(","):
                items.append(self.anything())
            self.expect(")")
            return Group("(", items[0]) if len(items) == 1 else Tuple_(tuple(items))
        if self.take("["):
            inside = self.anything()
            self.expect("]")
            return Iverson(inside) if isinstance(inside, (Compare, Logic, Not)) else Group("[", inside)
        if self.take("|"):
            inside = self.sum()
            self.expect("|")
            return Abs(inside)
        if self.take("{"):
            return self._pairs()
        self.fail("a number, a name or a bracket is missing before")
        raise AssertionError

    def _range(self, start: Node) -> Range:
        self.expect("…")
        stop = self.primary()
        self.expect("by")
        return Range(start, stop, self.primary())

    def _pairs(self) -> Pairs:
        for token in ("(", "w", ",", "l", ")", ":"):
            self.expect(token)
        conditions = [self.anything()]
        while self.take(","):
            conditions.append(self.anything())
        self.expect("}")
        return Pairs(tuple(conditions))

    def named(self) -> Node:
        """A name, a call, a probability, or the words `as given`."""
        name = self.next()
        if name == "as" and self.take("given"):
            return Given()
        if name in POLICIES:
            return self._probability(name)
        head, under = _split(name)
        if self.token == "(" and name not in INDICES:
            return Call(head, under, tuple(self._arguments()))
        if head in PREFIX:
            return Call(head, under, (self.primary(),))
        taken_at = [index for index in under.split(",") if index in INDICES or index == "t+1" or index.isdigit()]
        return Name(head, under) if taken_at else Name(name)

    def _probability(self, policy: str) -> Prob:
        if self.token != "(":
            return Prob(policy, "t")
        self.next()
        of = self.next()
        self.expect(")")
        if of != "v" and _split(of)[0] != "y":
            self.fail(f"{policy} gives probabilities to y_t, y_k, y or v, not to {of!r}, before")
        return Prob(policy, "v" if of == "v" else _split(of)[1])

    def _arguments(self) -> Iterator[Node]:
        self.expect("(")
        yield self.anything()
        while self.take(",") or self.take("‖"):
            yield self.anything()
        self.expect(")")
