"""The identities of step 0 and of movement, on a real run of the default model as it is shipped."""

import json

import pyarrow.parquet
import pytest
import torch

import lossmith as ls


@pytest.mark.slow
def test_step_0_identities_and_movement_on_the_default_model(tmp_path):
    run = ls.train(
        steps=2, prompts_per_step=2, samples_per_prompt=4, max_tokens=24, held_out=4, runs=str(tmp_path), quiet=True
    )
    first, second = (json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines())
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clip_fraction"] == 0
    assert first["kl"] == 0  # the reference computes in the same way, so not a bit differs
    assert second["kl"] > 0
    groups: dict[str, float] = {}
    for row in pyarrow.parquet.read_table(run.folder.path / "rollouts" / "step-00000.parquet").to_pylist():
        groups[row["prompt_id"]] = groups.get(row["prompt_id"], 0.0) + row["advantage"]
    assert len(groups) == 2 and all(abs(total) < 1e-4 for total in groups.values())
    assert run.learner.reference is not None
    untrained = ls.load_policy("default")
    assert run.learner.reference.checksum() == untrained.checksum()
    pairs = zip(run.policy.model.named_parameters(), untrained.model.named_parameters(), strict=True)
    moved = {name: float((a != b).float().mean()) for (name, a), (_, b) in pairs}
    assert min(v for name, v in moved.items() if "embed" not in name) > 0.5
    assert all(torch.isfinite(p).all() for p in run.policy.model.parameters())
