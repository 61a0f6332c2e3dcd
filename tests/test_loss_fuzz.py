"""Whatever `Batch` or `get_loss` is given: it is used, or refused by a LossError. Odd arguments are made from seeds."""

import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch

import lossmith.losses as L
from batches import OPEN, no_trap_warnings, random_fields
from lossmith.losses.composition.flat import AXES, PLAIN
from lossmith.losses.composition.foreign import FOREIGN

FIELDS = [f.name for f in dataclasses.fields(L.Batch)]
ODD = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.1, 10**30, -(10**400), 1e308, -1e308, 1e-45, math.nan, math.inf, -math.inf,
    "", "x", "none", "group", "\ud800", b"x", [], [[]], [None], ["clip"], ["clip", "nothing"], {}, {"a": 1}, (), (1, 2),
    {1}, 1j, object(), object, len, range(3), np.float64(0.5), np.int64(3), np.zeros(2), torch.zeros(2),
    torch.tensor(0.5), L.Clip(), L.Group(), L.TokenMean(), L.GroupStd(), L.Overlong(), L.KL(0.1), L.ValueLoss(0.5),
)  # fmt: skip
NAMES = [
    *L.CATALOGUE,
    "custom",
    "nothing",
    "os:system",
    "os:getcwd",
    "grpo(",
    "grpo(beta=1)",
    "dapo@trl(cap=3)",
    ")(",
    "",
]
WORDS = [*L.all_parameters(), *FOREIGN, "name", "completion", "function", "house", "kl", "x", "_"]


def storages(x: torch.Tensor, rng: random.Random) -> object:
    """The same numbers in another storage, type, shape or form; or other numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested and sparse tensors are young
        made = (
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: torch.nested.nested_tensor([x, x]),
            lambda: x.to(rng.choice((torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool))),
            lambda: x.to(torch.complex64),
            lambda: x[None],
            lambda: x.T,
            lambda: x[:-1],
            lambda: x[..., :1],
            lambda: x.sum(),
            lambda: x.tolist(),
            lambda: x.numpy(),
            lambda: list(x),
            lambda: [*x.tolist(), 1.0],
            lambda: [*x.tolist()[:-1], [1.0]],
            lambda: [*x.tolist()[:-1], rng.choice(ODD)],
            lambda: x.to(torch.float64) * rng.choice((1e20, 1e200, 1e308, -1e308, math.inf, math.nan, 1e-45, 0.0)),
            lambda: torch.randn(x.shape, generator=torch.Generator().manual_seed(rng.randrange(99))).to(x.dtype),
            lambda: rng.choice(ODD),
        )
        return rng.choice(made)()


def odd_batch(seed: int) -> None:
    rng = random.Random(seed)
    fields = random_fields(seed % 7, dtype=rng.choice((torch.float32, torch.float64)))
    plain = {**fields, "advantage": fields["reward"], "returns": fields["value"], "divergence": fields["value"]}
    for name in rng.sample(FIELDS, rng.randint(1, 3)):
        fields[name] = storages(plain[name], rng)
    if rng.random() < 0.1:
        fields[rng.choice(("rewards", "log_probs", "x", ""))] = 1
    for name in rng.sample(FIELDS, rng.randint(0, 4)):
        if name != "mask":
            fields.pop(name, None)
    try:
        batch = L.Batch(**fields)
    except L.LossError as error:
        check_words(error)
        return
    for name, x in fields.items():  # accepted: what is in the batch is what was given
        kept = getattr(batch, name)
        assert (x is None) == (kept is None) or name == "reward"
        if isinstance(x, torch.Tensor):
            told = x.detach().to(kept.dtype)
            valid = batch.live if kept.ndim == 1 else batch.live[:, None]
            if kept.shape[:2] == batch.mask.shape:
                valid = batch.mask.view(*batch.mask.shape, *[1] * (kept.ndim - 2))
            assert torch.equal(torch.where(valid, kept.detach(), 0), torch.where(valid, told, 0)), name
    name = rng.choice(list(L.CATALOGUE))
    with no_trap_warnings():
        loss = L.example_loss(name)
        try:
            out = loss(batch)
            assert math.isfinite(out.loss.detach())
        except L.LossError as error:
            check_words(error)


def odd_loss(seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(NAMES) if rng.random() < 0.95 else rng.choice(ODD)
    changes = {}
    for _ in range(rng.randint(1, 3)):
        word = rng.choice(WORDS if rng.random() < 0.7 else [*AXES, *PLAIN, "shaping", "clip", "beta", "eps"])
        options = [*AXES[word]] if word in AXES else []
        changes[word] = rng.choice(options) if options and rng.random() < 0.4 else rng.choice(ODD)
    with no_trap_warnings():
        try:
            loss = L.get_loss(name, **changes)
        except L.LossError as error:
            check_words(error)
            return
        assert str(loss) and loss.formula("latex")
        if isinstance(loss, L.PolicyLoss):
            assert L.PolicyLoss.from_dict(loss.to_dict()) == loss
            for key, value in changes.items():  # accepted: it is in force
                kept = loss.to_dict().get(key, value)
                plain = value.option if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
                plain = list(plain) if isinstance(plain, tuple) else plain
                told = (
                    ("none", None, [], "")
                    if plain in (None, "none") and not isinstance(plain, bool)
                    else (plain, [plain])
                )
                assert kept in told or dataclasses.is_dataclass(value) or isinstance(value, (list, tuple)), (
                    key,
                    value,
                    kept,
                )
        loss = loss.replace(**{k: v for k, v in OPEN.items() if k in loss.needs})
        fields = random_fields(seed % 5)
        fields |= dict.fromkeys(loss.needs & {"advantage", "returns"}, fields["logp"])
        try:
            out = loss(L.Batch(**fields))
        except L.LossError as error:
            check_words(error)
            return
        sane = all(not isinstance(v, (int, float)) or abs(v) < 1e20 for v in changes.values())
        assert math.isfinite(out.loss) or not sane, changes


def check_words(error: L.LossError) -> None:
    text = str(error)
    assert text[-1] in ".?" or "`" in text, text
    assert len(text) < 1500 and "object at 0x" not in text.replace("<object object at 0x", ""), text


@pytest.mark.parametrize("first", range(0, 400, 100))
@pytest.mark.parametrize("trial", [odd_batch, odd_loss])
def test_odd_arguments_are_used_or_refused(trial, first):
    for seed in range(first, first + 100):
        trial(seed)


@pytest.mark.slow
@pytest.mark.parametrize("trial", [odd_batch, odd_loss])
def test_odd_arguments_are_used_or_refused_ten_thousand_times(trial):
    for seed in range(1_000, 11_000):
        trial(seed)


def test_complex_numbers_in_a_list_are_refused():
    with pytest.raises(L.LossError, match=r"Batch\.reward must be a tensor, or nested lists of numbers"):
        L.Batch(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), reward=[1 + 2j])
