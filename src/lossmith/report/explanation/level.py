"""How strongly a token is colored."""

from __future__ import annotations

import math

__all__ = ["LEVELS", "level"]

LEVELS = 5


def level(pull: float | None, largest: float) -> int:
    """-5 to 5, by the root of the pull, so that weak ones are seen beside strong ones; 0: not pushed, or not known."""
    if not pull or not largest:
        return 0
    return int(math.copysign(max(1, math.ceil(LEVELS * math.sqrt(abs(pull) / largest) - 1e-9)), pull))
