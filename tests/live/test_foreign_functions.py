"""verl's own loss functions, held against the named losses in their own signature by `assert_conforms`."""

from __future__ import annotations

import warnings

import pytest

import lossmith as ls
from live_case import installed
from lossmith.proofs import assert_conforms

pytestmark = [pytest.mark.parity, pytest.mark.skipif(not installed("verl"), reason="verl is not installed")]

# clip_cov draws the tokens that it drops from the global generator
SAME = {
    "vanilla": "grpo@verl",
    "gspo": "gspo@verl",
    "sapo": "sapo@verl",
    "cispo": "cispo@verl",
    "gpg": "reinforce@verl",
    "dppo_tv": "dppo_tv@verl",
    "dppo_kl": "dppo_kl@verl",
    "kl_cov": "kl_cov@verl",
}


def conform(mode: str, loss: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config.actor import ActorConfig

        config = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1)
        assert_conforms(get_policy_loss_fn(mode), loss, "verl", config=config)


@pytest.mark.parametrize("mode", SAME)
def test_verls_function_is_the_preset_of_its_name(mode):
    conform(mode, SAME[mode])


def test_verls_function_is_told_from_trls():
    with pytest.raises(ls.ProofError, match=r"Its numbers are those of dual_clip=3\.0\. grpo@trl has dual_clip=None"):
        conform("vanilla", "grpo@trl")


def test_verls_geometric_mean_counts_the_rows_at_hand():
    with pytest.raises(ls.ProofError, match="it divides by all rows, the empty ones too"):
        conform("geo_mean", "gmpo@verl")
