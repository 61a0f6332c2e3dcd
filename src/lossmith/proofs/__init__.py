"""What a loss provably does: conformance checks, exact enumeration, and the page that says it with numbers.

check_loss(loss)       raises with the list of what fails, like scikit-learn's check_estimator
prove(loss)            every finding with its number
assert_conforms(f, x)  raises where somebody's function is not loss x, called as its trainer calls it
audit(loss)            the page as data; lossmith.report.audit and `lossmith audit` show it
group_gradients, bias  the expected gradient over all groups of a policy small enough to enumerate
kl_table()             what each KL term regularizes
"""

from lossmith.proofs.auditing import Audit, audit
from lossmith.proofs.checks import CHECKS, check_loss, prove
from lossmith.proofs.conforming import assert_conforms
from lossmith.proofs.conventions import CONVENTIONS, Convention
from lossmith.proofs.enumeration import Bias, GroupGradients, Tree, World, bias, default_world, group_gradients
from lossmith.proofs.finding import Finding
from lossmith.proofs.kl_terms import KLRow, Push, kl_push, kl_table
from lossmith.proofs.length import LengthWeights, length_weights
from lossmith.proofs.scenarios import Difficulty, Distance, difficulty, off_policy

__all__ = [
    "CHECKS",
    "CONVENTIONS",
    "Audit",
    "Bias",
    "Convention",
    "Difficulty",
    "Distance",
    "Finding",
    "GroupGradients",
    "KLRow",
    "LengthWeights",
    "Push",
    "Tree",
    "World",
    "assert_conforms",
    "audit",
    "bias",
    "check_loss",
    "default_world",
    "difficulty",
    "group_gradients",
    "kl_push",
    "kl_table",
    "length_weights",
    "off_policy",
    "prove",
]
