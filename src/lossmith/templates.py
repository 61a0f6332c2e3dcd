"""The pages' templates: what is written into one is text, never markup, and a name that is missing is an error."""

from __future__ import annotations

import jinja2

__all__ = ["templates_of"]


def templates_of(package: str) -> jinja2.Environment:
    """Those in the package's folder templates/."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
