"""A policy in parts (FSDP2), two and three processes of gloo: what one process computes, to the tenth digit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
WORKER = Path(__file__).with_name("sharded_ranks.py")


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """What each rank has found; all are started at once."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, folder, str(rank), str(request.param)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(request.param)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=540) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()  # one that is not waited for is a warning of its own, which would hide the failure
    assert not any(process.returncode for process in ranks), "\n".join(errors[-3000:] for _, errors in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize(
    "what",
    [
        "gradient", "gradient, layers run again", "gradient norm", "parameters after 3 steps",
    ],
)  # fmt: skip
def test_ranks_that_hold_parts_compute_what_one_process_does(found, what):
    """Gradients are summed; one rank has fewer rows, and passes that count nothing."""
    assert all(rank[what] < 1e-10 for rank in found)


def test_ranks_that_hold_parts_write_the_texts_of_one_process(found):
    """Each as many as it likes: the passes of a rank do not wait for those of another."""
    assert all(rank["texts that differ"] == 0 for rank in found)


def test_the_checksum_of_what_was_gathered_is_that_of_one_process(found):
    assert not any(rank["checksum"] for rank in found)


def test_each_rank_holds_its_part(found):
    assert abs(sum(rank["held"] for rank in found) - 1) < 1e-12
    assert all(rank["held"] < 0.6 for rank in found)
