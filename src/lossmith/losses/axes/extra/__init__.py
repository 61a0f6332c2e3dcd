"""Extra terms: what some losses add to every token besides policy, KL and entropy."""

from lossmith.losses.axes.extra import divergence, teacher, terms
from lossmith.losses.axes.extra.base import Extra
from lossmith.losses.piece import options, pieces_in

EXTRA: dict[str, type[Extra]] = options(*pieces_in(Extra, vars(terms), vars(divergence), vars(teacher)))
