"""A case: one function of another library, the random inputs it is called on, and the same loss of Lossmith."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lossmith as ls
from lossmith.losses import CATALOGUE, all_parameters

PARITY = Path(__file__).parent.parent / "parity"
MODULES = {"trl": "trl", "verl": "verl", "liger": "liger_kernel", "rlax": "rlax"}
PACKAGES = {"trl": "trl", "verl": "verl", "liger": "liger-kernel", "rlax": "rlax"}

# Parts of a loss that are compared on their own: the loss that carries them when the rest of it is zero.
PARTS = {
    "advantage": ("reinforce", {}),
    "kl_only": ("reinforce", {"aggregate": "token_mean"}),
    "value_clipped": ("ppo", {"value_coef": 1.0}),
}

Fields = dict[str, Tensor]
Params = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One function of a library under one set of parameter ranges.

    data: the file of tests/parity whose tolerance, version and function this case shares
    params: random generator -> Lossmith parameters, every one that matters
    call: (fields, params) -> {"loss", "grad_logp"}, {"loss", "grad_value"} or {"advantage"}, as the library has it
    fields: what the inputs hold besides logp, old_logp, mask and advantage
    """

    library: str
    name: str
    loss: str
    params: Callable[[Any], Params]
    call: Callable[[Fields, Params], dict[str, Tensor]]
    data: str = ""
    fields: tuple[str, ...] = ()
    token_advantage: bool = False
    empty_rows: bool = False  # may hold rows without a valid token: the library leaves them out, as Lossmith does
    singletons: bool = True

    @property
    def file(self) -> Path:
        return PARITY / f"{self.library}__{self.data or self.name}.json"

    @property
    def stored(self) -> list[dict]:
        return json.loads(self.file.read_text())

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"


def installed(library: str) -> bool:
    return importlib.util.find_spec(MODULES[library]) is not None


def version(library: str) -> str:
    return importlib.metadata.version(PACKAGES[library])


def unsupported(loss: str, params: Params, fields: Fields) -> str | None:
    """What Lossmith does not have yet, read off its public lists and never off a failure."""
    name, extra = PARTS.get(loss, (loss, {}))
    if name not in CATALOGUE:
        return f"loss {name} is not in the catalogue"
    known = all_parameters()
    for key, value in {**extra, **params}.items():
        if key not in known:
            return f"parameter {key} is not in the catalogue"
        if known[key].startswith("one of ") and value not in known[key].removeprefix("one of ").split(", "):
            return f"{key}={value} is not in the catalogue"
    missing = set(fields) - {field.name for field in dataclasses.fields(ls.Batch)}
    return f"Batch field {missing.pop()} is not in the catalogue" if missing else None


def get_loss(loss: str, **params: Any) -> Any:
    """ls.get_loss; what is warned about is built on purpose here."""
    name, extra = PARTS.get(loss, (loss, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ls.TrapWarning)
        return ls.get_loss(name, **{**extra, **params})


def lossmith(loss: str, fields: Fields, params: Params) -> dict[str, Tensor]:
    """Lossmith's value and gradients, or its advantage for an estimator."""
    fields = dict(fields)
    if loss in PARTS:  # the policy term is there, and is zero
        fields.setdefault("logp", torch.zeros(fields["mask"].shape, dtype=torch.float64))
        if loss != "advantage":
            fields["advantage"] = torch.zeros(len(fields["mask"]), dtype=torch.float64)
    leaves = {name: fields[name].clone().requires_grad_() for name in ("logp", "value") if name in fields}
    out = get_loss(loss, **params)(ls.Batch(**{**fields, **leaves}))
    if loss == "advantage":
        return {"advantage": out.advantage}
    return value_and_gradients(out.loss, leaves)


def value_and_gradients(loss: Tensor, leaves: Fields) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves, grads, leaves.values(), strict=True)
    found = {f"grad_{name}": torch.zeros_like(leaf) if grad is None else grad for name, grad, leaf in pairs}
    return {"loss": loss.detach().double(), **found}


def require(library: str) -> None:
    if not installed(library):
        pytest.skip(f"{library} is not installed: run tests/live/setup")


@contextmanager
def their_ways() -> Iterator[None]:
    """For the time of a call: the library's warnings are its own affair, and the numbers that it makes tensors of are
    float64 (in float32, TRL's tau of 1.05 is 1.0499999523)."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], mask: Tensor, stored: dict) -> None:
    """Every number of `want`, at valid positions, within the tolerance of the stored data."""
    for key, value in want.items():
        mine, value = got[key].detach().double(), torch.as_tensor(value).detach().double()
        if value.ndim == 2:
            mine, value = (torch.where(mask, x, 0.0) for x in (mine, value))
        torch.testing.assert_close(
            mine, value, rtol=stored["rtol"], atol=stored["atol"], msg=lambda text, key=key: f"{key}: {text}"
        )


if __name__ == "__main__":
    for one in MODULES:
        print(one, version(one) if installed(one) else "is not installed")
