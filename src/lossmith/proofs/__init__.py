"""What a loss provably does: conformance checks, exact enumeration, and the page that says it with numbers."""

from lossmith.proofs.checks import CHECKS, check_loss, prove
from lossmith.proofs.finding import Finding

__all__ = ["CHECKS", "Finding", "check_loss", "prove"]
