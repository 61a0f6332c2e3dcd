"""What the adapter for TRL says where TRL is not installed, and of settings, which it reads without TRL."""

import dataclasses
import importlib.util

import pytest

import lossmith as ls
import lossmith.losses as L
from lossmith.adapters import trl
from lossmith.adapters.trl.settings import beta_of, check_settings, loss_for
from lossmith.errors import LossError


@dataclasses.dataclass
class Config:
    """What is read of a GRPOConfig, with TRL's defaults."""

    loss_type: str = "dapo"
    epsilon: float = 0.2
    scale_rewards: str = "group"
    beta: float = 0.0
    reward_weights: list | None = None
    max_completion_length: int = 64
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    steps_per_generation: int = 8
    generation_batch_size: int = 32

    def __post_init__(self):
        self.world_size = 1  # no setting, but what the machine says


def refused(spec, **settings):
    world_size = settings.pop("world_size", 1)
    args = Config(**settings)
    args.world_size = world_size
    with pytest.raises(LossError) as error:
        check_settings(loss_for(spec, args), args)
    return str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_it_is_said_what_to_install(tmp_path):
    with pytest.raises(LossError, match=r"pip install lossmith\[trl\]"):
        _ = trl.LossmithGRPOTrainer
    with pytest.raises(LossError, match=r"pip install lossmith\[trl\]"):
        ls.train(engine="trl", quiet=True, runs=str(tmp_path))
    assert callable(trl.loss_of)


def test_a_loss_comes_in_any_form_and_takes_its_length_from_the_configuration():
    def mine(batch, *, c=0.5):
        return c * (batch.logp * batch.reward[:, None]).sum()

    args = Config()
    assert loss_for("grpo@verl", args) == loss_for(L.get_loss("grpo@verl"), args)
    assert loss_for("dr_grpo", args).to_dict()["max_length"] == 64
    assert loss_for(mine, args).needs == {"reward"}
    weighted = Config(reward_weights=[1, 0.5])
    assert loss_for("grpo(advantage='gdpo', advantage_scale='none')", weighted).advantage.weights == (1.0, 0.5)


def test_settings_of_trls_own_loss_are_refused_with_what_to_write_instead():
    said = refused("rloo", epsilon=0.1, scale_rewards="none")
    assert "epsilon=0.1, scale_rewards='none'" in said and "write advantage_scale='none'" in said
    assert "loss='rloo(beta=0.04)'" in refused("rloo", beta=0.04)


def test_settings_that_say_what_the_loss_says_are_accepted():
    args = Config(epsilon=0.1, beta=0.04)
    check_settings(loss_for("dapo@trl(clip_low=0.1, clip_high=0.1, beta=0.04)", args), args)


def test_a_loss_of_the_whole_update_says_what_to_set():
    said = refused("online_dpo")
    assert "per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1." in said
    said = refused("clip_cov", world_size=2, generation_batch_size=64)
    assert "per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=2" in said
    assert "2 processes" in said and "train in one process" in said
    whole = Config(per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1)
    check_settings(loss_for("online_dpo", whole), whole)


def test_what_trl_does_not_have_is_named():
    assert "Batch.value" in refused("ppo")
    assert "kl_control='fixed'" in refused("grpo(beta=0.1, kl_control='adaptive')")


def test_a_reference_is_asked_for_where_the_loss_needs_one():
    assert [beta_of(L.get_loss(name)) > 0 for name in ("grpo(beta=0.1)", "grpo(beta=0)", "dpo", "simpo")] == [
        True, False, True, False,
    ]  # fmt: skip
