"""Numbers that other libraries give (tests/parity), reproduced in float64."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batches import no_trap_warnings
from lossmith.losses import CATALOGUE, Batch, get_loss

FILES = sorted((Path(__file__).parent / "parity").glob("*.json"))
CASES = [(f"{path.stem}-{i}", case) for path in FILES for i, case in enumerate(json.loads(path.read_text()))]


def check_close(got: Tensor, expected: list | float, case: dict) -> None:
    torch.testing.assert_close(
        got.detach(), torch.tensor(expected, dtype=torch.float64), rtol=case["rtol"], atol=case["atol"]
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES])
def test_parity(case):
    """As the README of the data says: the name, the parameters, the inputs, nothing else."""
    name = "reinforce" if case["loss"] == "advantage" else case["loss"]
    fields, expected = dict(case["inputs"]), case["expected"]
    leaves = {
        key: torch.tensor(fields[key], dtype=torch.float64).requires_grad_()
        for key in ("logp", "value")
        if fields.get(key) is not None
    }
    with no_trap_warnings():
        out = get_loss(name, **case["params"])(Batch(**fields | leaves))
    if case["loss"] == "advantage":
        check_close(out.advantage, expected["advantage"], case)
        return
    out.loss.backward()
    check_close(out.loss, expected["loss"], case)
    asked = [key for key in expected if key.startswith("grad_")]
    assert asked
    for key in asked:
        check_close(leaves[key.removeprefix("grad_")].grad, expected[key], case)


def test_the_data_is_whole():
    assert len(FILES) == 107 and len(CASES) == 502
    assert {case["loss"] for _, case in CASES} - {"advantage"} <= set(CATALOGUE)
