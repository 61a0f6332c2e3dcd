"""Numbers that carry their derivative along one direction, so that a formula gives its slope with its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Union

__all__ = ["Dual", "Value", "apply", "slope_of", "total", "value_of"]


@dataclass(frozen=True)
class Dual:
    """x + slope·ε, ε² = 0. Compared by its value."""

    value: float
    slope: float

    def __add__(self, other: Value) -> Dual:
        return Dual(self.value + value_of(other), self.slope + slope_of(other))

    __radd__ = __add__

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __sub__(self, other: Value) -> Dual:
        return self + -other

    def __rsub__(self, other: Value) -> Dual:
        return -self + other

    def __mul__(self, other: Value) -> Dual:
        a, b = self.value, value_of(other)
        return Dual(a * b, self.slope * b + a * slope_of(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Value) -> Dual:
        a, b = self.value, value_of(other)
        return Dual(a / b, (self.slope - a / b * slope_of(other)) / b)

    def __rtruediv__(self, other: Value) -> Dual:
        return Dual(value_of(other), slope_of(other)) / self

    def __pow__(self, other: Value) -> Dual:
        a, b = self.value, value_of(other)
        made = a**b
        by_base = b * a ** (b - 1) * self.slope if self.slope else 0.0
        return Dual(made, by_base + (made * math.log(a) * slope_of(other) if slope_of(other) else 0.0))

    def __rpow__(self, other: Value) -> Dual:
        return Dual(value_of(other), slope_of(other)) ** self

    def __lt__(self, other: Value) -> bool:
        return self.value < value_of(other)

    def __gt__(self, other: Value) -> bool:
        return self.value > value_of(other)

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self


Value = Union[float, Dual]  # noqa: UP007  # read at run time by no one


def value_of(x: Value) -> float:
    """The number without its slope."""
    return x.value if isinstance(x, Dual) else x


def slope_of(x: Value) -> float:
    """The slope; 0 of a constant."""
    return x.slope if isinstance(x, Dual) else 0.0


def apply(function: Callable[[float], float], derivative: Callable[[float], float], x: Value) -> Value:
    """f(x), by its derivative."""
    return Dual(function(x.value), derivative(x.value) * x.slope) if isinstance(x, Dual) else function(x)


def total(items: Iterable[Value]) -> Value:
    """The sum, rounded once."""
    found = list(items)
    value = math.fsum(map(value_of, found))
    if not any(isinstance(x, Dual) for x in found):
        return value
    return Dual(value, math.fsum(map(slope_of, found)))
