"""Other libraries, called live on fresh random inputs, against the same loss of Lossmith: value and gradient.

Not part of the default run: `tests/live/setup` makes the environment, `pytest -m parity tests/live` runs it.
"""

import pytest
import torch

import live_liger
import live_rlax
import live_trl
import live_verl
import live_verl_advantages
from live_case import MODULES, Case, check_close, lossmith, require, their_ways, unsupported, version
from live_draws import draw

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SEEDS = range(12)
CASES = [*live_trl.CASES, *live_verl.CASES, *live_verl_advantages.CASES, *live_liger.CASES, *live_rlax.CASES]

FIRST_OF_FILE = list({case.file: case for case in reversed(CASES)}.values())


def theirs(case: Case, fields: dict, params: dict) -> dict:
    """The library's numbers."""
    require(case.library)
    with their_ways():
        return case.call(fields, params)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_live(case, seed):
    fields, params = draw(case, seed)
    reason = unsupported(case.loss, params, fields)
    want = theirs(case, fields, params)
    if reason:
        pytest.skip(reason)
    check_close(lossmith(case.loss, fields, params), want, fields["mask"], case.stored[0])


@pytest.mark.parametrize("case", FIRST_OF_FILE, ids=str)
def test_the_call_gives_the_stored_numbers(case):
    """So that the function called here is the one that tests/parity was made with, parameters mapped alike."""
    for stored in case.stored:
        fields = {
            name: torch.tensor(value, dtype={"mask": torch.bool, "group": torch.long}.get(name, torch.float64))
            for name, value in stored["inputs"].items()
        }
        want = {key: torch.tensor(value, dtype=torch.float64) for key, value in stored["expected"].items()}
        check_close(theirs(case, fields, stored["params"]), want, fields["mask"], stored)


@pytest.mark.parametrize("library", MODULES)
def test_the_version_is_the_one_of_the_stored_numbers(library):
    require(library)
    assert {case.stored[0]["version"] for case in CASES if case.library == library} == {version(library)}
