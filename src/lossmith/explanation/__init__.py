"""Why a token was pushed: the numbers behind its gradient, and what they say in everyday words."""

from lossmith.explanation.explaining import explain
from lossmith.explanation.parts import Explanation, Member, Number, Term, Token

__all__ = ["Explanation", "Member", "Number", "Term", "Token", "explain"]
