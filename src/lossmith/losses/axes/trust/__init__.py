"""Trust regions: the per-token policy term ℓ(r, A), and its weight w(r, A) = -(dℓ/dlogp)/A in closed form."""

from lossmith.losses.axes.trust import asymmetric, clipped, completion, rec, selective, soft
from lossmith.losses.axes.trust.asymmetric import *
from lossmith.losses.axes.trust.base import *
from lossmith.losses.axes.trust.clipped import *
from lossmith.losses.axes.trust.completion import *
from lossmith.losses.axes.trust.rec import *
from lossmith.losses.axes.trust.selective import *
from lossmith.losses.axes.trust.soft import *
from lossmith.losses.piece import options, pieces_in

_FILES = (clipped, soft, completion, selective, rec, asymmetric)
TRUST: dict[str, type[Trust]] = options(*pieces_in(Trust, *map(vars, _FILES)))
