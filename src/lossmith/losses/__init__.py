"""The heart: losses as values. Imports torch and nothing else, so any trainer can use it.

import lossmith.losses as L
loss = L.get_loss("grpo", beta=0.04)
out = loss(L.Batch(logp, mask, old_logp=..., ref_logp=..., reward=..., group=...))
out.loss.backward()
"""

from functools import partial
from typing import Any

from lossmith.errors import LossError as LossError
from lossmith.errors import TrapWarning as TrapWarning
from lossmith.losses.axes.advantage.baseline import *
from lossmith.losses.axes.advantage.per_token import *
from lossmith.losses.axes.advantage.scale import *
from lossmith.losses.axes.advantage.signal import *
from lossmith.losses.axes.advantage.teacher import *
from lossmith.losses.axes.aggregate import *
from lossmith.losses.axes.extra.base import *
from lossmith.losses.axes.extra.divergence import *
from lossmith.losses.axes.extra.teacher import *
from lossmith.losses.axes.extra.terms import *
from lossmith.losses.axes.kl import *
from lossmith.losses.axes.masks import *
from lossmith.losses.axes.mismatch import *
from lossmith.losses.axes.ratio import *
from lossmith.losses.axes.shaping import *
from lossmith.losses.axes.trust.asymmetric import *
from lossmith.losses.axes.trust.base import *
from lossmith.losses.axes.trust.clipped import *
from lossmith.losses.axes.trust.completion import *
from lossmith.losses.axes.trust.rec import *
from lossmith.losses.axes.trust.selective import *
from lossmith.losses.axes.trust.soft import *
from lossmith.losses.axes.value import *
from lossmith.losses.batch import *
from lossmith.losses.catalogue import *
from lossmith.losses.catalogue import CATALOGUE, get_loss
from lossmith.losses.catalogue.parse import *
from lossmith.losses.catalogue.user import register_loss as register_loss
from lossmith.losses.completion.completion_loss import *
from lossmith.losses.completion.kin import *
from lossmith.losses.completion.preferences import *
from lossmith.losses.completion.regressions import *
from lossmith.losses.composition.flat import all_parameters as all_parameters
from lossmith.losses.composition.flat import describe as describe
from lossmith.losses.composition.policy_loss import *
from lossmith.losses.function_loss import FunctionLoss as FunctionLoss
from lossmith.losses.loss import *


def __getattr__(name: str) -> Any:
    """`losses.grpo(beta=0.04)` is `get_loss("grpo", beta=0.04)`, for every name of the catalogue."""
    if name in CATALOGUE:
        return partial(get_loss, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
