"""Lossmith's hooks beside the libraries' own loss functions, on the same rows and counts: OpenRLHF, SkyRL, prime-rl,
NeMo-RL; and Tinker's own call of a custom loss. Each is skipped where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import typing
import warnings
from types import SimpleNamespace

import pytest
import torch
import typing_extensions

from lossmith.adapters import nemo_rl, openrlhf, skyrl, tinker
from lossmith.errors import quiet_traps
from lossmith.losses import get_loss
from lossmith.proofs.random_batches import evaluate, random_fields

pytestmark = pytest.mark.parity
LIVE = [0, 1, 2, 3, 5, 6, 7, 8]
PIECES = ([3, 0, 7], [1, 6], [2, 5, 4])


def needs(library):
    absent = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(absent, reason=f"{library} is not installed")


def module(name):
    """A module of a library, without what the packages above it import (DeepSpeed, vLLM, ...)."""
    for end in [i for i, letter in enumerate(name) if letter == "."]:
        package = name[:end]
        if package not in sys.modules:
            made = types.ModuleType(package)
            made.__path__ = list(importlib.util.find_spec(package).submodule_search_locations)
            sys.modules[package] = made
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)  # before Python 3.12 pydantic reads no other
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            pytest.skip(f"{name} imports {missing.name}, which is not installed")


def drawn(name, seed=0):
    with quiet_traps():
        fields = {k: v[LIVE] for k, v in random_fields(get_loss(name), seed).items()}
    fields["behavior_logp"] = fields.get("behavior_logp", fields["old_logp"] + 0.1 * fields["logp"].cos())
    fields["behavior_logp"] = fields["behavior_logp"].clamp(max=-1e-3)
    return fields, fields["reward"][:, None].expand(8, 8).contiguous()


def pull(fields, call, pieces=PIECES):
    logp = fields["logp"].clone().requires_grad_()
    sum(call(rows, logp[rows]) for rows in pieces).backward()
    return torch.where(fields["mask"], logp.grad, 0.0)


def same(a, b, tolerance=1e-8):
    gap = float((a - b).abs().max())
    assert gap < tolerance, f"dL/dlogp differs by {gap:.3g}"


BAND = (0.5, 1.05)
OPENRLHF = {
    "ppo": ("grpo@openrlhf", {}, {}),
    "dual clip, by completion": (
        "grpo@openrlhf",
        {"dual_clip": 3.0, "token_level_loss": False},
        {"dual_clip": 3.0, "aggregate": "seq_mean_token_mean"},
    ),
    "gspo": ("gspo@openrlhf", {"policy_loss_type": "gspo"}, {}),
    "truncated ratios": (
        "grpo@openrlhf",
        {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": BAND},
        {"mismatch": "tis", "mismatch_low": BAND[0], "mismatch_high": BAND[1]},
    ),
}


@needs("openrlhf")
@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf(case):
    name, theirs, ours = OPENRLHF[case]
    fields, advantage = drawn(name)
    with quiet_traps():
        loss = get_loss(name, beta=0.0, advantage="given", advantage_scale="none", **ours)
    counts = {"dp_size": 2, "batch_num_tokens": float(fields["mask"].sum()), "global_batch_size": 8.0}
    own = module("openrlhf.models.loss").PolicyLoss(**theirs)

    def by(function):
        def call(rows, logp):
            args = (fields["old_logp"][rows], advantage[rows], fields["mask"][rows].double())
            return function(logp, *args, rollout_log_probs=fields["behavior_logp"][rows], **counts)[0]

        return call

    same(pull(fields, by(openrlhf.ActorLoss(loss, "group_norm"))), pull(fields, by(own)))


SKYRL = {
    "regular": ("grpo@skyrl", {}, {}), "dual_clip": ("grpo@skyrl", {}, {"dual_clip": 3.0}),
    "cispo": ("cispo@skyrl", {}, {}), "sapo": ("sapo", {}, {}),
}  # fmt: skip


@needs("skyrl")
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("kind", SKYRL)
def test_skyrl(kind, reduction):
    name, _, ours = SKYRL[kind]
    utils, config = module("skyrl.backends.skyrl_train.utils.ppo_utils"), skyrl_config(kind, reduction)
    fields, _ = drawn(name)
    aggregate = {"token_mean": "token_mean", "sequence_mean": "seq_mean_token_mean"}[reduction]
    with quiet_traps():
        loss = get_loss(name, beta=0.0, advantage="group", advantage_scale="group_std", aggregate=aggregate, **ours)
    adapter = skyrl.SkyRLLoss(loss)
    rewards = (fields["reward"][:, None] * torch.eye(8)[0]).double()
    mask = fields["mask"].double()
    theirs, _ = utils.compute_grpo_outcome_advantage(rewards, mask, fields["group"].numpy())
    made, _ = adapter.advantages(rewards, mask, fields["group"].tolist(), config=config)
    several = torch.tensor(
        [int((fields["group"] == g).sum()) > 1 for g in fields["group"]]
    )  # it gives one its raw reward
    same(made[several], theirs[several], 1e-5)
    scaled = utils.apply_loss_reduction_to_advantages_minibatch(made, mask, reduction, 4, 8)
    own = utils.PolicyLossRegistry.get(kind)

    def by(function):
        def call(rows, logp):
            args = (fields["old_logp"][rows], scaled[rows], config, mask[rows])
            return function(logp, *args, None)[0]

        return call

    mine = pull(fields, by(adapter.policy_loss))
    same(mine, pull(fields, by(own)))
    same(mine, evaluate(loss, {k: v for k, v in fields.items() if k != "behavior_logp"}).gradients["logp"])


def skyrl_config(kind, reduction):
    Config = module("skyrl.train.config").AlgorithmConfig
    config = Config(policy_loss_type=kind, loss_reduction=reduction)
    return config


@needs("prime_rl")
@pytest.mark.parametrize("kind", ["dppo", "ipo"])
def test_prime_rl(kind):
    own = module("prime_rl.trainer.rl.loss")
    configs = module("prime_rl.configs.trainer")
    theirs = own.setup_rl_loss_fn(configs.DefaultLossConfig() if kind == "dppo" else configs.IPOLossConfig())
    loss = get_loss(f"{kind}@prime_rl", advantage="given")
    custom = configs.CustomLossConfig(import_path="lossmith.adapters.prime_rl.loss_fn", kwargs={"loss": loss.to_dict()})
    fields, advantage = drawn(f"{kind}@prime_rl")
    tokens = int(fields["mask"].sum())

    def by(function):
        def call(rows, logp):
            columns = (logp, fields["behavior_logp"][rows], advantage[rows], fields["mask"][rows])
            t, i, a, m = ([x.float() if x.is_floating_point() else x for x in c] for c in columns)
            rest = dict(rl_weights=None, ce_weights=None, ref_kl_weights=None, ce_scale=1, ref_kl_scale=1)
            return own.compute_loss(t, i, None, a, m, rl_loss_fn=function, rl_scale=tokens, **rest)[0]

        return call

    same(pull(fields, by(own.setup_rl_loss_fn(custom))), pull(fields, by(theirs)))


@needs("nemo_rl")
@pytest.mark.parametrize("by_token", [True, False])
def test_nemo_rl(by_token):
    own = module("nemo_rl.algorithms.loss.loss_functions")
    settings = own.ClippedPGLossConfig(token_level_loss=by_token)
    aggregate = "token_mean" if by_token else "seq_mean_token_mean"
    changes = {"clip_low": settings.ratio_clip_min, "clip_high": settings.ratio_clip_max, "beta": 0.0}
    loss = get_loss("grpo@nemo_rl", advantage="given", advantage_scale="none", aggregate=aggregate, **changes)
    settings.reference_policy_kl_penalty = 0.0
    fields, advantage = drawn("grpo@nemo_rl")

    def by(function):
        def call(rows, logp):
            columns = {
                "prev_logprobs": fields["old_logp"],
                "generation_logprobs": fields["behavior_logp"],
                "advantages": advantage,
                "token_mask": fields["mask"].double(),
            }
            data = {k: torch.nn.functional.pad(x[rows], (1, 0)) for k, x in columns.items()}
            data["sample_mask"] = torch.ones(len(rows), dtype=torch.float64)
            counts = {"global_valid_seqs": torch.tensor(8.0), "global_valid_toks": fields["mask"].sum()}
            return function(data=data, next_token_logprobs=logp, **counts)[0]

        return call

    same(pull(fields, by(nemo_rl.LossmithLossFn(loss, "grpo_mean"))), pull(fields, by(own.ClippedPGLossFn(settings))))


@needs("tinker")
@pytest.mark.parametrize("name", ["dppo_tv", "dpo", "dapo", "grpo"])
def test_tinkers_own_call_of_a_custom_loss(name):
    """TrainingClient._compute_custom_loss: what it sends to the server as weights is -dL/dlogp."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tinker as library
        from tinker.lib.public_interfaces.training_client import TrainingClient
    with quiet_traps():
        loss = get_loss(name, **({"max_length": 8} if name == "dapo" and "max_length" in get_loss(name).needs else {}))
        fields = {k: v[LIVE].float() if v.is_floating_point() else v[LIVE] for k, v in random_fields(loss, 0).items()}
    want = evaluate(loss, fields).gradients["logp"]

    def datum(i):
        tensors = {"target_tokens": torch.ones(8, dtype=torch.int64), "mask": fields["mask"][i].float()}
        inputs = {key: library.TensorData.from_torch(x) for key, x in tensors.items()}
        return library.Datum(model_input=library.ModelInput.from_ints([1] * 8), loss_fn_inputs=inputs)

    made = [datum(i) for i in range(8)]
    outputs = [{"logprobs": library.TensorData.from_torch(x)} for x in fields["logp"]]
    rest = {k: v.tolist() if v.ndim == 1 else list(v) for k, v in fields.items() if k not in ("logp", "mask")}
    custom = tinker.loss_fn(loss, **rest)
    found = TrainingClient._compute_custom_loss(made, custom, SimpleNamespace(loss_fn_outputs=outputs))
    sent = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in found.data])
    same(torch.where(fields["mask"], -sent, 0.0), want, 1e-7)
