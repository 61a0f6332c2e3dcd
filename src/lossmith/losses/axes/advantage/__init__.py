"""Advantage: how a score becomes the number that multiplies a token. No gradient passes through here.

An estimator maps rewards to advantages [N, T]; a scale then divides them. Group statistics follow the group
numbers on the rows, never their positions, and see only completions with a valid token.
Singleton groups and constant groups give exactly 0 (losses.md conventions), whatever rounding says.
"""

from lossmith.losses.axes.advantage import baseline, optimistic, per_token, teacher
from lossmith.losses.axes.advantage.baseline import *
from lossmith.losses.axes.advantage.optimistic import *
from lossmith.losses.axes.advantage.per_token import *
from lossmith.losses.axes.advantage.scale import *
from lossmith.losses.axes.advantage.signal import *
from lossmith.losses.axes.advantage.teacher import *
from lossmith.losses.piece import options, pieces_in

ADVANTAGE: dict[str, type[Estimator]] = options(
    *pieces_in(Estimator, vars(baseline), vars(optimistic), vars(per_token), vars(teacher))
)
