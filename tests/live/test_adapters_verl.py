"""Lossmith inside verl: verl's own registries, configuration classes and loss functions call it."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch

import lossmith.losses as L
from live_case import installed
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Batch, get_loss
from lossmith.proofs.random_batches import evaluate, random_fields

pytestmark = [pytest.mark.parity, pytest.mark.skipif(not installed("verl"), reason="verl is not installed")]

LIVE = [0, 1, 2, 3, 5, 6, 7, 8]  # row 4 of a random batch has no token
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "prompt_mean")
OURS = ("dapo", "gspo", "cispo", "dppo_tv", "dppo_kl", "gmpo", "lite_ppo", "opo", "maxrl", "pass_at_k", "fipo", "gppo",
        "ce_gppo", "dcpo", "sapo", "vespo", "reinforce_pp_baseline", "reinforce", "rloo_token", "tis_pg")  # fmt: skip


@pytest.fixture(scope="module")
def verl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import verl.trainer.ppo.ray_trainer as trainer
        from verl.trainer.ppo import core_algos
        from verl.workers.config import ActorConfig
        from verl.workers.config.actor import PolicyLossConfig

        import lossmith.adapters.verl as adapter

        yield type(
            "verl", (), dict(core=core_algos, trainer=trainer, Actor=ActorConfig, Policy=PolicyLossConfig, ours=adapter)
        )


def actor(verl, counts, **more):
    policy = more.pop("policy_loss", verl.Policy())
    made = verl.Actor(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **more)
    made.global_batch_info.update(counts)
    return made


def drawn(loss, seed):
    return {k: v[LIVE] for k, v in random_fields(loss, seed).items()}


def advantages(verl, name, fields, config):
    """verl's compute_advantage on a DataProto, as its trainer calls it."""
    import numpy as np
    from verl import DataProto

    rewards = fields["reward"][:, None] * torch.eye(fields["mask"].shape[1], dtype=torch.float64)[0]
    uid = np.array([f"prompt {g}" for g in fields["group"].tolist()], dtype=object)
    tensors = {"token_level_rewards": rewards, "response_mask": fields["mask"].double()}
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid})
    return verl.trainer.compute_advantage(data, name, config=config).batch


def pieces(seed, ranks):
    """Rows of each micro-batch, by rank."""
    rows = list(range(8))
    random.Random(seed).shuffle(rows)
    size = random.Random(seed + 1).choice((1, 2, 3, 8))
    shares = [rows[r::ranks] for r in range(ranks)]
    return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]


@pytest.mark.parametrize("seed", range(60))
def test_the_registries_give_the_whole_batchs_gradient(verl, seed):
    """Random losses, aggregations, ranks and micro-batches, float64."""
    from omegaconf import OmegaConf

    draw = random.Random(seed)
    name, aggregate = draw.choice(OURS), draw.choice(AGGREGATES)
    with quiet_traps():
        loss = get_loss(name).replace(aggregate=aggregate)
        loss = loss.replace(max_length=8) if "max_length" in loss.needs else loss
    fields, ranks = drawn(loss, seed), draw.choice((1, 2, 4))
    want = evaluate(loss, fields).gradients["logp"]
    called = f"lossmith/test {seed}"
    verl.core.register_adv_est(called)(functools.partial(verl.ours.adv_est, spec=loss))
    verl.core.register_policy_loss(called)(functools.partial(verl.ours.policy_loss, spec=loss))
    made = advantages(verl, called, fields, OmegaConf.create({"adv_estimator": called}))
    counts = {"dp_size": ranks, "batch_num_tokens": int(fields["mask"].sum()), "global_batch_size": 8}
    config = actor(verl, counts)
    logp = fields["logp"].clone().requires_grad_()
    total = 0.0
    for share in pieces(seed, ranks):
        for rows in share:
            args = (fields["old_logp"][rows], logp[rows], made["advantages"][rows], fields["mask"][rows].double())
            found, metrics = verl.core.get_policy_loss_fn(called)(*args, loss_agg_mode="token-mean", config=config)
            total = total + found / ranks  # gradients of ranks are averaged
            assert all(isinstance(x, float) for x in metrics.values())
    total.backward()
    assert float((torch.where(fields["mask"], logp.grad, 0.0) - want).abs().max()) < 1e-12


PRESETS = {
    "vanilla": "grpo@verl", "gspo": "gspo@verl", "sapo": "sapo@verl", "cispo": "cispo@verl", "gpg": "reinforce@verl",
    "dppo_tv": "dppo_tv@verl", "dppo_kl": "dppo_kl@verl",
}  # fmt: skip


@pytest.mark.parametrize("mode", PRESETS)
def test_a_preset_inside_verl_is_verls_own_loss(verl, mode):
    """Called with verl's own name and with ours, on the same micro-batches."""
    name = PRESETS[mode]
    fields = drawn(get_loss("grpo@verl"), 3)
    counts = {"dp_size": 2, "batch_num_tokens": int(fields["mask"].sum()), "global_batch_size": 8}
    pulled = []
    for called in (mode, f"lossmith/{name}"):
        logp = fields["logp"].clone().requires_grad_()
        advantage = fields["reward"][:, None].expand(8, 8).contiguous()
        agg = get_loss(name).aggregate.option.replace("_", "-")
        for rows in ([3, 0, 7], [1, 6], [2, 5, 4]):
            args = (fields["old_logp"][rows], logp[rows], advantage[rows], fields["mask"][rows].double())
            verl.core.get_policy_loss_fn(called)(*args, loss_agg_mode=agg, config=actor(verl, counts))[0].backward()
        pulled.append(torch.where(fields["mask"], logp.grad, 0.0))
    # where it averages over completions, verl adds 1e-8 to their number of tokens
    assert float((pulled[0] - pulled[1]).abs().max()) < (1e-8 if agg.startswith("seq") else 1e-12)


def composed(*overrides):
    """verl's own configuration with overrides, as main_ppo gets it."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def test_verls_configuration_names_the_loss_with_its_parameters(verl):
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(
        "algorithm.adv_estimator=lossmith",
        "actor_rollout_ref.actor.policy_loss.loss_mode=lossmith",
        "actor_rollout_ref.actor.policy_loss._target_=lossmith.adapters.verl.PolicyLossConfig",
        "+actor_rollout_ref.actor.policy_loss.loss='dapo(clip_high=0.3)'",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.loss_scale_factor=8",
    )
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(made.policy_loss, verl.Policy) and made.policy_loss.loss == "dapo(clip_high=0.3)"
    loss = get_loss("dapo", clip_high=0.3, max_length=8)
    fields = drawn(loss, 0)
    batch = advantages(verl, "lossmith", fields, config.algorithm)
    made.global_batch_info.update(dp_size=1, batch_num_tokens=int(fields["mask"].sum()), global_batch_size=8)
    logp = fields["logp"].clone().requires_grad_()
    function = verl.core.get_policy_loss_fn(made.policy_loss.get("loss_mode"))
    args = (fields["old_logp"], logp, batch["advantages"], fields["mask"].double())
    function(*args, loss_agg_mode="token-mean", config=made)[0].backward()
    want = evaluate(loss, fields).gradients["logp"]
    assert float((torch.where(fields["mask"], logp.grad, 0.0) - want).abs().max()) < 1e-12
    with pytest.raises(LossError, match="no loss is named"):
        advantages(verl, "lossmith", fields, composed("algorithm.adv_estimator=lossmith").algorithm)


def test_verls_external_modules_load_it():
    code = (
        "import json, verl; from verl.trainer.ppo import core_algos as c; "
        "print(json.dumps(['lossmith' in c.ADV_ESTIMATOR_REGISTRY, 'lossmith/dapo' in c.POLICY_LOSS_REGISTRY]))"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "lossmith.adapters.verl"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert json.loads(ran.stdout.splitlines()[-1]) == [True, True], ran.stderr[-2000:]


def rows_of(fields, made, rows):
    """A micro-batch as verl's workers get it: no padding, nested token ids; prompts of two tokens."""
    from tensordict import NonTensorData, NonTensorStack, TensorDict
    from verl.workers.utils.padding import left_right_2_no_padding

    n, mask = len(rows), fields["mask"][rows]
    whole = torch.ones(n, 10, dtype=torch.int64)
    data = {
        "input_ids": whole, "attention_mask": whole, "position_ids": torch.arange(10).expand(n, 10),
        "prompts": torch.ones(n, 2, dtype=torch.int64), "responses": torch.ones(n, 8, dtype=torch.int64),
        "response_mask": mask.double(), "old_log_probs": fields["old_logp"][rows],
        "advantages": made["advantages"][rows],
        "returns": made["returns"][rows], "token_level_rewards": made["token_level_rewards"][rows],
    }  # fmt: skip
    for ours, theirs in (("ref_logp", "ref_log_prob"), ("behavior_logp", "rollout_log_probs")):
        if ours in fields:
            data[theirs] = fields[ours][rows]
    made_data = TensorDict(data, batch_size=[n])
    made_data["uid"] = NonTensorStack(*[NonTensorData(f"prompt {int(fields['group'][i])}") for i in rows])
    return left_right_2_no_padding(made_data)


def model_output(logp):
    """Log-probabilities as verl's engine gives them: of every token, shifted by one, without padding."""
    flat = torch.cat([torch.nn.functional.pad(row, (1, 1)) for row in logp])
    lengths = torch.arange(len(logp) + 1) * 10
    return {"log_probs": torch.nested.nested_tensor_from_jagged(flat, offsets=lengths)}


@pytest.mark.parametrize("name", ["grpo", "dapo", "dppo_square", "topr", "gspo@trl_vllm", "dpo", "simpo", "kl_cov"])
def test_set_loss_fn_gives_the_whole_batchs_gradient(verl, name):
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils

    loss = L.example_loss(name)
    fields = drawn(loss, 1)
    fields = {**drawn(get_loss("grpo"), 1), **fields}
    want = evaluate(loss, fields).gradients["logp"]
    made = advantages(
        verl,
        "lossmith_rows" if loss.separable else f"lossmith_rows/{name}",
        fields,
        OmegaConf.create({"loss": name, "loss_scale_factor": 8}),
    )
    function = verl.ours.LossFn(loss, actor(verl, {}))
    logp = fields["logp"].clone().requires_grad_()
    ranks = 2 if loss.separable else 1
    for rows in ([3, 0, 7], [1, 6], [2, 5, 4]) if loss.separable else (list(range(8)),):
        data = rows_of(fields, made, rows)
        tensordict_utils.assign_non_tensor(
            data, dp_size=ranks, batch_num_tokens=int(fields["mask"].sum()), global_batch_size=8
        )
        (function(model_output(logp[rows]), data)[0] / ranks).backward()
    assert float((torch.where(fields["mask"], logp.grad, 0.0) - want).abs().max()) < 1e-12


def test_verls_ppo_loss_adds_its_kl_to_ours(verl):
    """verl's own ppo_loss around ours: the KL term that verl adds is the one that grpo has with these settings."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    whole = get_loss("cispo", beta=0.1, kl_estimator="k2")
    fields = drawn(whole, 2)
    want = evaluate(whole, fields).gradients["logp"]
    credit = whole.credit(Batch(**fields))
    made = {"advantages": credit.advantage, "returns": credit.advantage, "token_level_rewards": credit.advantage}
    policy = verl.Policy(loss_mode="lossmith/cispo")
    config = actor(verl, {}, policy_loss=policy, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="mse")
    logp = fields["logp"].clone().requires_grad_()
    for rows in ([3, 0, 7], [1, 6], [2, 5, 4]):
        data = rows_of(fields, made, rows)
        tensordict_utils.assign_non_tensor(
            data, dp_size=1, batch_num_tokens=int(fields["mask"].sum()), global_batch_size=8
        )
        loss, metrics = ppo_loss(config, model_output(logp[rows]), data)
        loss.backward()
        assert "actor/lossmith/ratio" in metrics
    assert float((torch.where(fields["mask"], logp.grad, 0.0) - want).abs().max()) < 1e-12


def test_the_exported_folder_is_one_that_verl_understands(verl, tmp_path):
    """Its configuration makes verl's own classes; verl's code loads the reward function, the data and the loss."""
    import asyncio

    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.config import omega_conf_to_dataclass

    from lossmith.adapters.verl_export import export
    from lossmith.training import Recipe

    settings = {"loss": "grpo(beta=0.02, clip_high=0.3)", "prompts_per_step": 4, "samples_per_prompt": 2, "held_out": 4}
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    prompts = [f"Question {i}?" for i in range(12)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    recipe = Recipe.make("test", prompts=str(file), scorer=f"{scorer}:length", **settings)
    folder = export(recipe, tmp_path / "out")
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("verl")
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(made, verl.Actor) and made.use_kl_loss and made.kl_loss_coef == 0.02
    made.validate(1, config.data.train_batch_size)
    omega_conf_to_dataclass(config.algorithm)
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    function = get_custom_reward_fn(config)
    import pyarrow.parquet

    row = pyarrow.parquet.read_table(config.data.train_files).to_pylist()[0]
    given = {"data_source": row["data_source"], "ground_truth": "", "extra_info": row["extra_info"]}
    assert asyncio.run(asyncio.to_thread(function, solution_str="seven!!", **given)) == 7
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c; print('lossmith/recipe' in c.POLICY_LOSS_REGISTRY)"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "lossmith_recipe"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines()[-1] == "True", ran.stderr[-2000:]


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 0.0], [0.2, 0.9, 0.4, 0.4]])
def test_a_completion_masked_altogether_keeps_its_reward_in_its_group(verl, rewards):
    """verl's own estimator, and grpo@verl by itself and inside verl; row 0 has no token that counts."""
    import numpy as np

    mask = torch.ones(4, 3)
    mask[0] = 0
    scores = torch.tensor(rewards, dtype=torch.float64)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    uid = np.array(["a"] * 4, dtype=object)
    theirs, _ = verl.core.compute_grpo_outcome_advantage(scores, mask.double(), uid)
    inside, _ = verl.core.get_adv_estimator_fn("lossmith/grpo@verl")(scores, mask.double(), index=uid)
    batch = Batch(mask=mask.bool(), reward=torch.tensor(rewards).double(), group=torch.zeros(4, dtype=torch.int64))
    for mine in (inside, get_loss("grpo@verl").credit(batch).advantage):
        assert float((mine - theirs).abs().max()) < 1e-6
