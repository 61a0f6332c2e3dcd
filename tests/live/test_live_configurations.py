"""A configuration is the loss that its library computes: random ones, through the library's own methods."""

import dataclasses
import random

import pytest
import torch

from lossmith import Batch, LossError
from lossmith.adapters.configurations import trl, verl
from lossmith.losses import Normalizer

pytest.importorskip("trl", reason="needs tests/live/setup")
pytest.importorskip("verl", reason="needs tests/live/setup")

import live_configurations as live
import live_verl_run

pytestmark = pytest.mark.parity
TOLERANCE = 1e-10
VERL = 1e-8  # its whitening adds its small number in another place
SINGLE = 1e-6  # its vectorized groups have their statistics in single precision
FEW = 25  # configurations a test, eight tests: 200 in all


def of_lossmith(loss, data, *, sampler, masked):
    """Value and gradient of our loss on the same batch, given as a guest in TRL gives it: the advantages are of all
    completions, the masks of truncated ones are empty, and every completion is counted.
    """
    logp = data["logp"].clone().requires_grad_()
    given = {k: data[k] for k in ("truncated", "group", "old_logp", "ref_logp", "entropy")}
    if sampler:
        given["behavior_logp"] = data["behavior_logp"]
    batch = Batch(logp=logp, mask=data["mask"], reward=data["parts"].sum(1), reward_parts=data["parts"], **given)
    if masked:
        kept = data["mask"] & ~data["truncated"][:, None]
        batch = Batch(logp=logp, mask=kept, advantage=loss.credit(batch).advantage, **given)
    value = loss(batch, Normalizer(tokens=batch.tokens, sequences=len(batch.valid), groups=live.GROUPS)).loss
    return value.detach(), torch.autograd.grad(value, logp)[0]


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_are_the_loss_that_trl_computes(seed):
    rng, compared, refused = random.Random(seed), 0, {}
    while compared + len(refused) < FEW:
        settings = live.draw_trl(rng)
        try:
            loss = trl.loss_of(live.trl_config(**settings), rewards=2)
        except LossError as error:
            refused[str(settings)] = str(error)
            assert any(x in str(error) for x in ("use_bias_correction_kl", "vllm_importance", "entropy")), error
            continue
        data = live.fields(rng.randrange(10**6))
        config = live.trl_config(**settings)
        theirs = live.run_trl(config, data)
        value, gradient = of_lossmith(loss, data, sampler=config.use_vllm, masked=config.mask_truncated_completions)
        assert abs(value - theirs["loss"]) <= TOLERANCE * max(1, abs(value)), (settings, value, theirs["loss"])
        assert float((gradient - theirs["grad_logp"]).abs().max()) <= TOLERANCE, settings
        compared += 1
    assert compared >= FEW / 2


def of_lossmith_in_verl(loss, data):
    logp = data["logp"].clone().requires_grad_()
    given = {k: data[k] for k in ("mask", "group", "old_logp", "ref_logp", "behavior_logp", "entropy", "value")}
    batch = Batch(
        logp=logp, reward=data["parts"].sum(1), reward_greedy=data["greedy"], old_value=data["value"], **given
    )  # fmt: skip
    output = loss(batch)
    value = sum(term for name, term in output.terms.items() if name != "value")  # verl's critic has a loss of its own
    return value.detach(), torch.autograd.grad(value, logp)[0]


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_are_the_loss_that_verl_computes(seed):
    rng, compared, refused = random.Random(seed), 0, 0
    while compared + refused < FEW:
        settings = live_verl_run.draw(rng)
        config = live_verl_run.composed(settings)
        try:
            loss = verl.loss_of(config)
        except LossError as error:
            assert any(x in str(error) for x in ("use_kl_loss", "use_kl_in_reward", "agg_mode", "rollout_is")), error
            refused += 1
            continue
        data = live.fields(rng.randrange(10**6))
        theirs = live_verl_run.run(config, data)
        value, gradient = of_lossmith_in_verl(loss, data)
        bound = SINGLE if "vectorized" in settings["algorithm.adv_estimator"] else VERL
        assert abs(value - theirs["loss"]) <= bound * max(1, abs(value)), (settings, value, theirs["loss"])
        assert float((gradient - theirs["grad_logp"]).abs().max()) <= bound, settings
        compared += 1
    assert compared >= FEW / 2


def test_the_defaults_and_the_names_are_those_of_the_installed_trl():
    names = {field.name: field for field in dataclasses.fields(live.trl_config())}
    known = trl.DEFAULTS.keys() | trl.ELSEWHERE
    assert not names.keys() - known, "TRL has settings that are not known here: is one of them of the loss?"
    for name, value in trl.DEFAULTS.items():
        assert names[name].default == value, f"{name} is {names[name].default} in the installed TRL, and {value} here"


def test_the_defaults_are_those_of_the_installed_verl():
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(live_verl_run.composed({}), resolve=True)
    absent = {"algorithm.gdpo_reward_keys", "algorithm.gdpo_reward_weights"}  # of its dataclass alone
    for name, value in verl.DEFAULTS.items():
        if name in absent or name.startswith("critic.loss"):  # the actor's
            continue
        found = config
        for part in name.split("."):
            found = found[part]
        assert found == value, f"{name} is {found} in the installed verl, and {value} here"
