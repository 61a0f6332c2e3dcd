"""A formula run on a batch: plain numbers, one token at a time, by what its notation says and nothing else.

Nothing here is shared with the losses: a sum is a loop, a group mean is a mean over the group's completions. A
definition is evaluated where it is used; past the last token of a completion everything is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any

from lossmith.errors import LossError
from lossmith.losses.composition import notation as n
from lossmith.proofs.printed.dual import Value, total, value_of
from lossmith.proofs.printed.facts import BY_COMPLETION, BY_PART, BY_TOKEN, POLICIES, VOCABULARY, Facts
from lossmith.proofs.printed.functions import FUNCTIONS

__all__ = ["Meaning"]

Where = dict[str, Any]  # what each index is bound to; `level`: how many updates of the reward have been made
_LASTING = ("i", "t", "w", "l", "g", "part", "v")  # what a definition sees of the place where its name stands


@dataclass(eq=False)
class Meaning:
    """The statements of a formula and the facts of a batch."""

    statements: list[n.Statement]
    facts: Facts
    _known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.updates = [s for s in self.statements if isinstance(s, n.Set) and s.arrow]
        self.definitions: dict[str, tuple[n.Node, int | None]] = {}
        for statement in self.statements:
            if isinstance(statement, n.Set) and not statement.arrow:
                for place, target in enumerate(statement.names):
                    if target.name in self.definitions:
                        raise LossError(f"{target.name} is defined twice.")
                    self.definitions[target.name] = statement.value, place if len(statement.names) > 1 else None
        self.only = {s.index: s.condition for s in self.statements if isinstance(s, n.Only)}
        kept = n.Remark(n.KEPT) in self.statements
        rows = range(len(self.facts.lengths)) if kept else self.facts.live
        self.counted = [i for i in rows if self.facts.lengths[i] or self.facts.score(i) == self.facts.score(i)]

    def loss(self) -> Value:
        """L(θ). LossError: a symbol or a function that nothing defines."""
        found: Value = self.of(self.definitions["L"][0], {})
        return found

    # -- what indices run over --------------------------------------------------------------------------------------

    @property
    def taking_part(self) -> list[int]:
        return self.once("taking part", lambda: self._where("i", self.facts.live))

    @property
    def groups(self) -> list[int]:
        return self.once("groups", lambda: self._where("g", sorted({self.facts.groups[i] for i in self.taking_part})))

    def _where(self, index: str, among: list[int]) -> list[int]:
        condition = self.only.get(index)
        return among if condition is None else [x for x in among if self.of(condition, {index: x})]

    def group(self, at: Where) -> int:
        """The group at hand: of a sum over groups, or of the completion."""
        return at["g"] if "g" in at else self.facts.groups[self.row(at)]

    def row(self, at: Where) -> int:
        if "i" not in at:
            raise LossError("a formula speaks of a completion where no sum over completions stands before it.")
        found: int = at["i"]
        return found

    def token(self, at: Where) -> int:
        if "t" not in at:
            raise LossError("a formula speaks of a token where no sum over tokens stands before it.")
        found: int = at["t"]
        return found

    def members(self, at: Where) -> list[int]:
        """The completions of the group at hand that count in its statistics."""
        return [i for i in self.counted if self.facts.groups[i] == self.group(at)]

    def places(self, under: str, at: Where) -> Iterator[Where]:
        """The places that what stands under a sum or a mean runs over."""
        rows = {"i": lambda: self.taking_part, "j": lambda: self.counted, "batch": lambda: self.counted}
        rows |= {"g": lambda: self.members(at), "j∈g": lambda: self.members(at)}
        rows["i∈g"] = lambda: [i for i in self.taking_part if self.facts.groups[i] == self.group(at)]
        if under in rows and under[0] == "j":
            yield from ({**at, "j": i} for i in rows[under]())
        elif under in rows:  # of another completion no token is at hand
            yield from ({**{k: x for k, x in at.items() if k != "t"}, "i": i} for i in rows[under]())
        elif under == "j≠i":
            yield from ({**at, "j": j} for j in self.members(at) if j != self.row(at))
        elif under in ("t", "k≥t", "k≤t", "k<t"):
            yield from self._tokens(under, at)
        elif under in ("i,t", "it"):
            yield from ({**at, "i": i, "t": t} for i in self.facts.live for t in range(self.facts.lengths[i]))
        elif under in ("k", "ref"):
            name = ("reward_parts",) if under == "k" else ("reference_reward",)
            yield from ({**at, "part": k} for k in range(len(self.facts.of(name)[0])))
        elif under == "v":
            tokens = self.facts.of(VOCABULARY["π_θ"])[self.row(at)][self.token(at)]
            yield from ({**at, "v": v} for v in range(len(tokens)))
        elif under == "v∈S":
            yield from ({**at, "v": v} for v in self.named("S", "", at))
        elif under in self.definitions:
            yield from self._members_of(under, at)
        else:
            raise LossError(f"a formula runs over {under!r}, which nothing defines.")

    def _tokens(self, under: str, at: Where) -> Iterator[Where]:
        length = self.facts.lengths[self.row(at)]
        if under == "t":
            yield from ({**at, "t": t} for t in range(length))
            return
        now = self.token(at)
        ranges = {"k≥t": range(now, length), "k≤t": range(now + 1), "k<t": range(now)}
        yield from ({**at, "k": k} for k in ranges[under])

    def _members_of(self, name: str, at: Where) -> Iterator[Where]:
        """Pairs or completions of a set that the formula defines."""
        without = {k: x for k, x in at.items() if k != "t"}
        for member in self.named(name, "", at):
            yield {**without, **(dict(zip("wl", member, strict=True)) if isinstance(member, tuple) else {"i": member})}

    # -- names ------------------------------------------------------------------------------------------------------

    def named(self, name: str, index: str, at: Where) -> Any:
        """The value of a symbol taken at an index."""
        for one in index.split(",") if index else ():
            at = self._at(one, at)
        if index in ("j", "w", "l"):  # of that completion, not of its tokens
            at = {k: x for k, x in at.items() if k != "t"}
        if not index and name in at:
            return at[name]
        if "t" in at and "i" in at and at["t"] >= self.facts.lengths[at["i"]]:
            return 0.0  # past the end
        if name == "r" and index:  # r is the ratio, r_t the reward of a token
            return self._reward(name, at)
        if name in self.definitions and not (name == "R" and "level" in at):
            return self._defined(name, at)
        return self._symbol(name, at)

    def _at(self, index: str, at: Where) -> Where:
        """The place with this index moved to where i and t stand."""
        if index == "t+1":
            return {**at, "t": self.token(at) + 1}
        if index.isdigit():
            return {**at, "part": int(index) - 1}
        if index == "k":
            return {**at, "t": at["k"]} if "k" in at else at
        return {**at, "i": at[index]} if index in ("j", "w", "l") and index in at else at

    def _defined(self, name: str, at: Where) -> Any:
        value, place = self.definitions[name]
        seen = {key: at[key] for key in _LASTING if key in at}
        key = (name, *seen.items())
        if key not in self._known:
            self._known[key] = None  # a definition that needs itself at the same place has no value
            given = isinstance(value, n.Given)
            found: Any = self.facts.given(name, self.row(at), self.token(at)) if given else self.of(value, seen)
            if isinstance(value, n.Tuple_) and place is None:  # one number of several, by its own index
                place = at["part"]
            self._known[key] = found if place is None else found[place]
        if self._known[key] is None:
            raise LossError(f"{name} is defined by itself.")
        return self._known[key]

    def _symbol(self, name: str, at: Where) -> Any:
        facts = self.facts
        constants = {"N": lambda: float(len(self.taking_part)), "#g": lambda: float(len(self.groups))}
        constants |= {"e": lambda: 2.718281828459045, "T": lambda: float(facts.lengths[self.row(at)])}
        if name in constants:
            return constants[name]()
        if name in ("R", "R₀") and not (name == "R" and "part" in at):
            return self._reward(name, at)
        if name in BY_PART:
            return facts.of((BY_PART[name],))[self.row(at)][at["part"]]
        if name in BY_TOKEN:
            return facts.of(BY_TOKEN[name])[self.row(at)][self.token(at)]
        if name in BY_COMPLETION:
            return facts.of(BY_COMPLETION[name])[self.row(at)]
        raise LossError(f"a formula speaks of {name!r}, which nothing defines.")

    def _reward(self, name: str, at: Where) -> Value:
        """R of a completion or r_t of a token, after the updates that have been made at this place."""
        level = 0 if name == "R₀" else at.get("level", len(self.updates))
        if level == 0:
            i = self.row(at)
            return self.facts.token_reward(i, self.token(at)) if name == "r" else self.facts.score(i)
        update, inside = self.updates[level - 1], {**at, "level": level - 1}
        if update.names[0].name == name[0]:
            found: Value = self.of(update.value, inside)
            return found
        if name == "r":  # the completion's reward, on its last token
            last = self.token(at) == self.facts.lengths[self.row(at)] - 1
            return self._reward("R", {**at, "level": level}) if last else 0.0
        return total(self._reward("r", {**x, "level": level}) for x in self._tokens("t", at))

    def of_token(self, policy: str, v: int, at: Where) -> Value:
        """The probability of the v-th token of the vocabulary at the place at hand."""
        logs = self.facts.of(VOCABULARY[policy])[self.row(at)][self.token(at)]
        found: Value = FUNCTIONS["exp"](self, [logs[v]])
        return found

    # -- expressions ------------------------------------------------------------------------------------------------

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is the same wherever it is asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @singledispatchmethod
    def of(self, node: n.Node, at: Where) -> Any:
        """The value of an expression at a place."""
        raise LossError(f"{type(node).__name__} has no value here.")

    @of.register
    def _(self, node: n.Number, at: Where) -> float:
        return {"½": 0.5, "∞": float("inf")}.get(node.text) or float(node.text)

    @of.register
    def _(self, node: n.Name, at: Where) -> Any:
        return self.named(node.name, node.index, at)

    @of.register
    def _(self, node: n.Prob, at: Where) -> Value:
        if node.at == "v" and "v" in at:
            return at["v"](self, node.policy, at) if callable(at["v"]) else self.of_token(node.policy, at["v"], at)
        logs, i = self.facts.of(POLICIES[node.policy]), self.row(at)
        if node.at == "":
            return FUNCTIONS["exp"](self, [total(logs[i][: self.facts.lengths[i]])])
        t = at["k"] if node.at == "k" else self.token(at)
        return FUNCTIONS["exp"](self, [logs[i][t]]) if t < self.facts.lengths[i] else 0.0

    @of.register
    def _(self, node: n.Call, at: Where) -> Any:
        function = FUNCTIONS.get(node.name)
        if function is None:
            raise LossError(f"a formula calls {node.name!r}, which is no function that is known.")
        if getattr(function, "lazy", False):
            return function(self, node, at)
        return function(self, [self.of(x, at) for x in node.args])

    @of.register
    def _(self, node: n.Sum, at: Where) -> Value:
        if node.under == "v" and self.facts.batch.vocab_logp is None:  # the batch holds the sum
            return self.facts.of(("sum_prob_sq",))[self.row(at)][at.get("k", at.get("t"))]
        if node.under == "g":
            return total(self.of(node.body, {**at, "g": g}) for g in self.groups)
        items = [self.of(node.body, x) for x in self.places(node.under, at)]
        if node.sign == "Σ":
            return total(items)
        product: Value = 1.0
        for x in items:
            product = product * x
        return product

    @of.register
    def _(self, node: n.Unary, at: Where) -> Any:
        x = self.of(node.of, at)
        return -x if node.sign == "−" else (-x, x)

    @of.register
    def _(self, node: n.Binary, at: Where) -> Any:
        a, b = self.of(node.left, at), self.of(node.right, at)
        if node.sign == "±":
            return a - b, a + b
        if node.sign == "/":
            return a / b if value_of(b) else a * float("inf") if value_of(a) else 0.0  # nothing of nothing is nothing
        return a + b if node.sign == "+" else a - b if node.sign == "−" else a * b

    @of.register
    def _(self, node: n.Power, at: Where) -> Value:
        base, exponent = self.of(node.base, at), self.of(node.exponent, at)
        if node.base == n.Name("e"):
            return FUNCTIONS["exp"](self, [exponent])
        return base**exponent

    @of.register
    def _(self, node: n.Group, at: Where) -> Any:
        return self.of(node.of, at)

    @of.register
    def _(self, node: n.Abs, at: Where) -> Value:
        if node.of == n.Name("g"):
            return float(len(self.members(at)))
        return abs(self.of(node.of, at))

    @of.register
    def _(self, node: n.Compare, at: Where) -> float:
        left, holds = self.of(node.first, at), True
        for sign, right in node.rest:
            a, b = left, self.of(right, at)
            holds = holds and self._holds(sign, a, b)
            left = b
        return float(holds)

    def _holds(self, sign: str, a: Any, b: Any) -> bool:
        if sign == "∈":
            return a in b
        a, b = value_of(a), value_of(b)
        return {"<": a < b, ">": a > b, "≤": a <= b, "≥": a >= b, "=": a == b, "≠": a != b}[sign]

    @of.register
    def _(self, node: n.Logic, at: Where) -> float:
        each = (bool(self.of(x, at)) for x in node.items)
        return float(all(each) if node.word == "and" else any(each))

    @of.register
    def _(self, node: n.Not, at: Where) -> float:
        return float(not self.of(node.of, at))

    @of.register
    def _(self, node: n.Iverson, at: Where) -> float:
        return float(self.of(node.of, at))

    @of.register
    def _(self, node: n.Choice, at: Where) -> Any:
        return self.of(node.value if self.of(node.condition, at) else node.otherwise, at)

    @of.register
    def _(self, node: n.Tuple_, at: Where) -> tuple[Any, ...]:
        return tuple(self.of(x, at) for x in node.items)

    @of.register
    def _(self, node: n.Range, at: Where) -> tuple[float, ...]:
        return tuple(value_of(self.of(x, at)) for x in (node.start, node.stop, node.step))

    @of.register
    def _(self, node: n.Pairs, at: Where) -> list[tuple[int, int]]:
        def pairs() -> list[tuple[int, int]]:
            live = self.facts.live
            found = ({"w": w, "l": l, "g": self.facts.groups[w]} for w in live for l in live)  # noqa: E741
            return [(x["w"], x["l"]) for x in found if all(self.of(c, x) for c in node.conditions)]

        found: list[tuple[int, int]] = self.once(("pairs", node), pairs)
        return found
