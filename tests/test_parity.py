"""Numbers that other libraries give (tests/parity), reproduced in float64."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batches import quiet_loss
from lossmith.losses import CATALOGUE, Batch, all_parameters
from lossmith.losses.flat import AXES

FILES = sorted((Path(__file__).parent / "parity").glob("*.json"))
CASES = [(f"{path.stem}-{i}", case) for path in FILES for i, case in enumerate(json.loads(path.read_text()))]

# Names of the data that stand for a part of a loss, or for a composition that can be spelled out as long as the
# catalogue has no entry of that name. A catalogue entry always goes first.
SPELLED = {
    "advantage": ("reinforce", {}),
    "kl_only": ("reinforce", {}),
    "value_clipped": ("ppo", {"value_coef": 1.0}),
    "importance_sampling": ("reinforce", {"trust": "none"}),
    "tis_pg": ("reinforce", {"trust": "truncate"}),
    "gspo_token": ("gspo", {"ratio_level": "sequence_token"}),
    "luspo": ("gspo", {}),
    "decoupled_ppo": ("ppo", {"mismatch": "tis"}),
}


def spelled(case: dict) -> tuple[str, dict]:
    """(catalogue name, parameters) of a case."""
    base, extra = (case["loss"], {}) if case["loss"] in CATALOGUE else SPELLED.get(case["loss"], (case["loss"], {}))
    params = {**extra, **{k: v for k, v in case["params"].items() if v is not None}}
    if params.get("advantage_scale") == "none" and "eps" in params:
        params.pop("eps")  # it would be added to a standard deviation, and there is none: Lossmith refuses it
    return base, params


def unsupported(case: dict) -> str | None:
    """What of the case Lossmith does not have yet, read off the catalogue and the axes, never off a failure."""
    base, params = spelled(case)
    if base not in CATALOGUE:
        return f"loss {base}"
    known = all_parameters()
    for key, value in params.items():
        if key not in known:
            return f"parameter {key}"
        if key in AXES and value not in AXES[key][1]:
            return f"{key}={value}"
    return None


RUNNABLE = [pytest.param(case, id=name) for name, case in CASES if unsupported(case) is None]
NOT_YET = Counter(reason for _, case in CASES if (reason := unsupported(case)) is not None)


def check_close(got: Tensor, expected: list | float, case: dict) -> None:
    torch.testing.assert_close(
        got.detach(), torch.tensor(expected, dtype=torch.float64), rtol=case["rtol"], atol=case["atol"]
    )


def inputs_of(case: dict) -> tuple[dict, dict[str, Tensor]]:
    """(fields of the batch, the leaves that want a gradient)."""
    fields = dict(case["inputs"])
    shape = torch.tensor(fields["mask"]).shape
    if case["loss"] == "value_clipped":  # the critic alone: the policy term is there and is zero
        fields |= {"logp": torch.zeros(shape, dtype=torch.float64), "advantage": torch.zeros(shape[0]).double()}
    if case["loss"] == "kl_only":
        fields["advantage"] = torch.zeros(shape[0]).double()
    leaves = {
        name: torch.as_tensor(fields[name], dtype=torch.float64).clone().requires_grad_()
        for name in ("logp", "value")
        if name in fields
    }
    return fields | leaves, leaves


@pytest.mark.parametrize("case", RUNNABLE)
def test_parity(case):
    base, params = spelled(case)
    loss = quiet_loss(base, **params)
    fields, leaves = inputs_of(case)
    batch, expected = Batch(**fields), case["expected"]
    if case["loss"] == "advantage":
        check_close(loss.credit(batch).advantage, expected["advantage"], case)
        return
    out = loss(batch)
    out.loss.backward()
    check_close(out.loss, expected["loss"], case)
    asked = [key for key in expected if key.startswith("grad_")]
    assert asked
    for key in asked:
        check_close(leaves[key.removeprefix("grad_")].grad, expected[key], case)


def test_the_data_is_whole_and_the_cases_that_run_do_not_shrink():
    assert len(FILES) == 107 and len(CASES) == 502
    assert len(RUNNABLE) + sum(NOT_YET.values()) == len(CASES)
    assert len(RUNNABLE) >= 352


def test_every_catalogue_entry_that_the_data_names_is_run():
    named = {case["loss"] for _, case in CASES} & set(CATALOGUE)
    assert named <= {param.values[0]["loss"] for param in RUNNABLE}


@pytest.mark.skipif(not NOT_YET, reason="everything is supported")
def test_what_is_not_supported_yet():
    """One skip, with the count of each reason."""
    pytest.skip(f"{sum(NOT_YET.values())} cases wait for: {dict(NOT_YET)}")
