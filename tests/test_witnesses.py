"""Value and weight of a trust region are two witnesses: a mistake in either alone is seen by the closed form."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lossmith.losses as L
from batches import no_trap_warnings
from lossmith.losses.axes.trust import TRUST, Tokens
from lossmith.proofs.random_batches import random_fields
from lossmith.proofs.slopes import DRIFTS, closed_form

# Pairs of parameters that mistakes swap; each region gets numbers under which the two differ.
PAIRS = (
    ("low", "high"), ("delta_low", "delta_high"), ("far_low", "far_high"), ("beta_low", "beta_high"),
    ("tau_pos", "tau_neg"), ("k_pos", "k_neg"), ("lam_pos", "lam_neg"),
)  # fmt: skip
UNLIKE = {
    "clip": {"low": 0.1, "high": 0.3, "dual": 1.6},
    "preserve": {"low": 0.1, "high": 0.3, "beta_low": 0.7, "beta_high": 0.9, "dual": 1.6},
    "dynamic_clip": {"low": 0.02, "high": 0.06, "hi_max": 1.5, "dual": 1.8},
    "balanced_clip": {"low_step": 0.05, "high_step": 0.1, "target": 0.6},
    "influence": {"low": 0.1, "high": 0.3, "ceiling": 0.7, "floor": 0.8},
    "m2_mask": {"low": 0.1, "high": 0.3, "threshold": 0.04},
    "tv_mask": {"delta_low": 0.02, "delta_high": 0.06, "cap": 1.2},
    "kl_mask": {"delta_low": 1e-3, "delta_high": 5e-3, "cap": 1.2},
    "tv_mask_symmetric": {"delta": 0.03},
    "cov_drop": {"low": 0.1, "high": 0.3, "cov_low": -0.3, "cov_high": 0.3, "fraction": 0.2},
    "cov_kl": {"fraction": 0.3, "coef": 0.2},
    "log_clip": {"low": 0.1, "high": 0.3},
    "sg_clip": {"low": 0.1, "cap": 1.2},
    "taper": {"cap": 0.9},
    "band": {"low": 0.1, "high": 0.3},
    "rec_one_side": {"low": 0.1, "high": 0.3},
    "rec_two_side": {"low": 0.1, "high": 0.3},
    "rec_ring": {"low": 0.1, "high": 0.2, "far_low": 0.25, "far_high": 0.4},
    "unbounded": {"low": 0.1, "dual": 1.6},
    "reciprocal": {"low": 0.1, "high": 0.3, "dual": 1.2},
    "quadratic_penalty": {"width": 0.3},
    "prefix_budget": {"delta": 0.03, "budget": 0.01, "floor": 0.5},
    "gamma": {"lam_neg": 1.5},
    "sigmoid": {"tau_neg": 1.6},
    "quadratic": {"tau": 0.4},
    "scaled_logp": {"tau": 0.5},
}


def changed(at, **fields):
    return dataclasses.replace(at, **fields)


def side(method):
    """A value has the sign of the advantage, a weight has none."""
    return -1 if method.__name__ == "value" else 1


def swapped(piece, a, b):
    if not hasattr(piece, a) or not hasattr(piece, b):
        return piece
    return dataclasses.replace(piece, **{a: getattr(piece, b), b: getattr(piece, a)})


def exchanged(pair, piece, method, at):
    return method(swapped(piece, *pair), at)


def undetached(piece, method, at):
    kept = torch.Tensor.detach
    torch.Tensor.detach = lambda self: self
    try:
        return method(piece, at)
    finally:
        torch.Tensor.detach = kept


# Mistakes in one method: (how it is made of the method's own result).
MISTAKES = {
    "scaled": lambda piece, method, at: 1.01 * method(piece, at),
    "sign": lambda piece, method, at: -method(piece, at),
    "side": lambda piece, method, at: method(piece, changed(at, advantage=-at.advantage)) * side(method),
    "old policy": lambda piece, method, at: method(piece, changed(at, denominator_logp=0.7 * at.denominator_logp)),
    **{f"{a} for {b}": functools.partial(exchanged, (a, b)) for a, b in PAIRS},
    "not detached": lambda piece, method, at: undetached(piece, method, at),
}


def mutant(piece, which, mistake):
    """The piece with this mistake in that method, and in no other."""
    method = getattr(type(piece), which)

    def wrong(self, at):
        return mistake(self, method, at)

    made = type(type(piece).__name__, (type(piece),), {which: wrong})
    return made(**{field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)})


def in_a_loss(trust):
    with no_trap_warnings():
        return L.get_loss("reinforce", trust=trust, advantage="group")


def acts(loss, mutated, which):
    """Whether the mistake changes a number, or a gradient, on the batches of the check."""
    for drift in DRIFTS:
        batch = L.Batch(**random_fields(loss, 0, drift))
        found = []
        for one in (loss, mutated):
            leaf = batch.logp.detach().requires_grad_()
            here = batch.replace(logp=leaf)
            at = one._tokens(here, one.credit(here))
            number = getattr(one.trust, which)(at if which == "value" else at.detach())
            found.append(torch.where(batch.mask, number.detach(), 0.0))
            if which == "value":
                found.append(torch.autograd.grad(torch.where(batch.mask, number, 0.0).sum(), leaf)[0])
        half = len(found) // 2
        if not all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True)):
            return True
    return False


@pytest.mark.parametrize("which", ["value", "weight"])
@pytest.mark.parametrize("option", TRUST)
def test_a_mistake_in_one_witness_alone_is_seen(option, which):
    with no_trap_warnings():
        piece = TRUST[option](**UNLIKE.get(option, {}))
    loss = in_a_loss(piece)
    assert closed_form(loss, 0).status == "passed"
    tried = []
    for name, mistake in MISTAKES.items():
        if name == "not detached" and (which == "weight" or not piece.stops_gradient):
            continue  # there is no gradient to stop
        mutated = in_a_loss(mutant(piece, which, mistake))
        if acts(loss, mutated, which):
            tried.append(name)
            assert closed_form(mutated, 0).status == "failed", name
    assert {"scaled", "sign"} <= set(tried)
    sided = option in (
        "clip",
        "preserve",
        "dynamic_clip",
        "influence",
        "log_clip",
        "tv_mask",
        "kl_mask",
        "gamma",
        "sigmoid",
    )
    assert not sided or "side" in tried
    bounded = [f"{a} for {b}" for a, b in PAIRS if hasattr(piece, a) and hasattr(piece, b)]
    assert set(bounded) <= set(tried)
    detaching = which == "value" and piece.stops_gradient
    assert not detaching or "not detached" in tried


@pytest.mark.parametrize("option", TRUST)
def test_neither_witness_asks_the_other(option, monkeypatch):
    with no_trap_warnings():
        piece = TRUST[option](**UNLIKE.get(option, {}))
    loss = in_a_loss(piece)
    batch = L.Batch(**random_fields(loss, 0))
    at = loss._tokens(batch, loss.credit(batch))

    def asked(self, at):
        raise AssertionError("the other was asked")

    for which, other in (("value", "weight"), ("weight", "value")):
        with monkeypatch.context() as patched:
            for kind in {type(piece), *(x for x in type(piece).__mro__ if other in vars(x))}:
                patched.setattr(kind, other, asked)
            assert isinstance(getattr(piece, which)(at), torch.Tensor) and isinstance(at, Tokens)


def test_no_mutant_is_stale():
    """Each planted mistake of tests/mutation replaces a text that stands in its file exactly once."""
    folder = Path(__file__).parent / "mutation"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("mutants", folder / "mutants.py")
        mutants = importlib.util.module_from_spec(spec)
        sys.modules["mutants"] = mutants  # its dataclasses ask for it
        spec.loader.exec_module(mutants)
    finally:
        sys.path.remove(str(folder))
    for one in mutants.MUTANTS:
        source = (mutants.ROOT / mutants.LOSSES / one.file).read_text(encoding="utf-8")
        assert source.count(one.old) == 1, one.name
