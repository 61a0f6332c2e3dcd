"""A loss's formula as MathML, a line for each of its definitions."""

from __future__ import annotations

from xml.etree import ElementTree

from lossmith.errors import LossError
from lossmith.losses import Loss

__all__ = ["mathml"]

_MATHML = "{http://www.w3.org/1998/Math/MathML}"


def mathml(loss: Loss) -> list[str]:
    """The lines of `loss.formula("latex")`; none where it has none, or one that cannot be MathML."""
    from latex2mathml.converter import convert

    try:
        latex = loss.formula("latex")
    except LossError:  # the text of a piece of one's own that cannot be read; the page then shows the text
        return []
    body = latex.removeprefix("\\begin{aligned}\n").removesuffix("\n\\end{aligned}").removeprefix("& ")
    made = [convert(_known(line), display="block").replace("\\_", "_") for line in body.split(" \\\\\n& ")]
    return made if all(map(_is_mathml, made)) else []


def _known(latex: str) -> str:
    """In the commands that the converter knows; a browser needs no telling of style, and of the sizes of brackets."""
    for told in (r"\textstyle", r"\displaystyle", r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\big", r"\Big"):
        latex = latex.replace(told, "")
    return latex.replace(r"\arg", r"\operatorname{arg}")


def _is_mathml(text: str) -> bool:
    """Whether the page takes it as it stands: well-formed, and nothing in it but mathematics."""
    try:
        return all(element.tag.startswith(_MATHML) for element in ElementTree.fromstring(text).iter())
    except ElementTree.ParseError:
        return False
