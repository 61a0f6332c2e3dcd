"""A first run of a stranger's chat template where it can be killed: one may loop for hours, or make gigabytes of text.

Neither can be stopped from inside the process. Only templates that hold the means for it are tried, once each, on one
short message; a fraction of a second for an honest one.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys

from lossmith.errors import PolicyError

__all__ = ["check_template"]

_SECONDS = 10  # of computing
_GIGABYTES = 2
_MEANS = re.compile(r"\*|\brange\b|\bmacro\b|\b(center|ljust|rjust|zfill|expandtabs|indent|format|lipsum)\b")

# Errors are ignored here: the template is run again by transformers, which gives it more names.
_CHILD = f"""
import contextlib, sys
with contextlib.suppress(ImportError, ValueError, OSError):
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS + 1}))
    resource.setrlimit(resource.RLIMIT_AS, ({_GIGABYTES << 30}, {_GIGABYTES << 30}))
from jinja2.sandbox import ImmutableSandboxedEnvironment
environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
try:
    template = environment.from_string(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    made = template.render(messages=[dict(role="user", content="a")], add_generation_prompt=True)
    sys.exit(3 if len(made) > 10_000_000 else 0)
except MemoryError:
    sys.exit(3)
except Exception:
    pass
"""


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """PolicyError: on one short message the template does not end, or makes an enormous text."""
    if not _MEANS.search(template):
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template).encode("utf-8", "surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=6 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PolicyError(_ENDLESS) from None
    if done.returncode == 3:
        raise PolicyError("the model's chat template turns a short message into more than 10 million characters.")
    if done.returncode < 0:  # a signal: its time was over
        raise PolicyError(_ENDLESS)


_ENDLESS = f"the model's chat template works for more than {_SECONDS} seconds on one short message."
