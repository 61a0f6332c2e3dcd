"""Random GRPOConfigs: the loss that `loss_of` reads from one trains as TRL's own under it, or is refused with a reason.

LOSSMITH_LIVE_CONFIGS: how many (12). One generation batch, used twice, in a random cut: four updates of plain SGD.
"""

import os
import random

import pytest

pytest.importorskip("trl")

import trl_runs as runs
from lossmith.adapters.trl import loss_of
from lossmith.errors import LossError

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

COUNT = int(os.environ.get("LOSSMITH_LIVE_CONFIGS", "12"))
CLOSE = 1e-5
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
MICRO_BATCHES = [  # (per device, accumulated, of a generation)
    (4, 4, 8), (8, 2, 4), (16, 1, 2), (8, 4, 4), (32, 1, 1),
]  # fmt: skip


def drawn(seed):
    """(settings of TRL's own loss, settings of the run)."""
    rng = random.Random(seed)
    kind = rng.choice(LOSS_TYPES)
    c = {
        "loss_type": kind,
        "importance_sampling_level": rng.choice(["token", "token", "sequence"]),
        "epsilon": rng.choice([0.02, 0.1, 0.2]),
        "epsilon_high": rng.choice([None, 0.05, 0.28]),
        "delta": rng.choice([None, None, 1.02, 1.4]),
        "scale_rewards": rng.choice(["group", "batch", "none", True, False]),
        "multi_objective_aggregation": rng.choice(["sum_then_normalize"] * 2 + ["normalize_then_sum"]),
        "use_bias_correction_kl": rng.choice([False, True]),
        "off_policy_mask_threshold": rng.choice([None, None, 0.01]),
        "sapo_temperature_neg": rng.choice([1.05, 2.0]),
        "vespo_k_pos": rng.choice([2.0, 1.0]),
        "top_entropy_quantile": rng.choice([1.0] * 5 + [0.5]),
        "entropy_coef": rng.choice([0.0] * 5 + [0.01]),
        "use_adaptive_entropy": rng.choice([False] * 15 + [True]),
    }
    if kind == "cispo":
        c["epsilon_high"] = rng.choice([1.1, 5.0])
    cut = rng.choice(MICRO_BATCHES)
    if c["top_entropy_quantile"] < 1 or c["entropy_coef"] or c["use_adaptive_entropy"]:
        cut = MICRO_BATCHES[-1]  # in TRL these depend on how an update is cut
    shared = {
        "beta": rng.choice([0.0, 0.0, 0.1]),
        "mask_truncated_completions": rng.choice([False, False, True]),
        "reward_weights": rng.choice([None, [1.0, 0.25], [0.5, 2.0]]),
        "per_device_train_batch_size": cut[0],
        "gradient_accumulation_steps": cut[1],
        "steps_per_generation": cut[2],
        "max_steps": 4,
        "learning_rate": 0.003 if kind == "luspo" else 0.03,
        "seed": seed,
    }
    return c, shared


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_configuration_trains_as_it_reads(seed, record_property):
    settings, shared = drawn(seed)
    args = runs.config(**settings | shared)
    try:
        loss = loss_of(args, rewards=2)
    except LossError as refusal:
        record_property("refused", str(refusal))
        assert any(name in str(refusal) for name in settings), refusal
        return
    rewards = [runs.letters, runs.length]
    theirs = runs.run(args=runs.config(**settings | shared), rewards=rewards)
    mine = runs.run(loss, args=args, rewards=rewards)  # the settings agree with the loss, and are accepted
    record_property("apart", mine.apart(theirs))
    assert mine.apart(theirs) < CLOSE, (settings, shared)


def test_a_loss_and_settings_that_disagree_are_refused():
    args = runs.config(epsilon=0.1)
    assert runs.trainer(loss_of(args), args=args).loss == loss_of(args)
    with pytest.raises(LossError, match=r"epsilon=0\.1"):
        runs.trainer("dapo@trl", args=args)
