"""A value of a column as JSON holds it: the one way in which dates, decimals, bytes and arrays are written down."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import fractions
import hashlib
import json
import math
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from lossmith.errors import PromptError

__all__ = ["plain"]

_AS_TEXT = (decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath)  # exact, and read back by their own type


def plain(value: Any) -> Any:
    """The value in JSON's types.

    Dates and times become ISO 8601 text, durations seconds, decimals and UUIDs text, bytes base64, arrays lists; NaN,
    NaT and NA are None, because they mean a cell without a value. PromptError: a thing that has no text of its own.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=json.dumps)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    return _other(value)


def _other(value: Any) -> Any:
    kind = type(value)
    if kind.__name__ in ("NaTType", "NAType"):  # pandas' cells without a value
        return None
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, _AS_TEXT):
        return str(value)
    if hasattr(value, "tolist"):  # arrays, tensors, and the single numbers of numpy
        converted = value.tolist()
        return str(value) if type(converted) is kind else plain(converted)
    if hasattr(value, "tobytes"):  # a picture
        return f"<{kind.__module__}.{kind.__qualname__} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}>"
    text = str(value)
    if " at 0x" in text:  # an address: another one at every start
        raise PromptError(f"a {kind.__qualname__}, which cannot be written down. Give text, numbers, lists or dates")
    return text
