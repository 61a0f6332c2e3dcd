"""Which loss a trainer's configuration is: five and more written after the libraries' public examples, and odd ones."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import lossmith as ls
from lossmith.adapters.configurations import TRAINERS, read, trl, verl
from lossmith.adapters.configurations.words import commands
from lossmith.errors import quiet_traps
from shell import lossmith

HERE = Path(__file__).parent / "configurations"
ACTOR = "actor_rollout_ref.actor."


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def again(reading):
    """The loss that its own call gives."""
    with quiet_traps():
        return ls.get_loss(reading.call)


# -- right by hand: the library's documented meaning, written out ------------------------------------------------------


def by_hand(base, **changes):
    return ls.get_loss(base, **changes)


# TRL: Dr. GRPO without scaling, ε 0.2 and 0.28, k3 of 0.001 weighted by the ratio, truncated completions left out,
# vLLM's weights a token, cut at 2. Written without the preset, on the paper's loss.
DR_GRPO = {
    "clip_high": 0.28, "beta": 0.001, "kl_estimator": "k3", "kl_place": "loss", "kl_ratio_weight": True,
    "truncated": "mask", "mismatch": "tis", "mismatch_level": "token", "mismatch_low": 0.0, "mismatch_high": 2.0,
    "max_length": 2048, "masked": "keep",
}  # fmt: skip
VERL = {"advantage": "group", "singleton": "raw", "eps": 1e-6, "aggregate": "token_mean"}
KEPT = VERL | {"masked": "keep"}  # the reward of a completion that is masked altogether
WHITENED = {"advantage_scale": "whiten", "clip_high": 0.3, "aggregate": "token_mean"}
BY_HAND = {
    "openrlhf_reinforce_baseline.sh": (
        "openrlhf", "reinforce_pp_baseline",
        WHITENED | {"beta": 1e-5, "kl_estimator": "k2", "kl_place": "loss", "mismatch": "icepop",
                    "mismatch_low": 0.5, "mismatch_high": 5.0},
    ),
    "nemo_rl.yaml": (
        "nemo_rl", "grpo",
        {"advantage": "nemo_loo", "advantage_scale": "none", "beta": 0.02, "kl_straight_through": True,
         "clip_high": 0.28, "aggregate": "token_mean", "mismatch": "icepop"},
    ),
    "prime_rl.toml": (
        "prime_rl", "dppo_square", {"delta_high": 0.3, "coef": 2e-3, "group_filter": "zero_variance"},
    ),
    "skyrl_gsm8k.sh": (
        "skyrl", "grpo",
        VERL | {"clip_high": 0.28, "dual_clip": 3.0, "beta": 0.002, "kl_estimator": "k3", "mismatch": "tis",
                "mismatch_high": 2.0, "kl_aggregate": "seq_mean_token_mean"},
    ),
    "trl_grpo.yaml": ("trl", "dr_grpo", DR_GRPO),
    "trl_gspo.py": ("trl", "gspo", {"eps": 1e-4, "masked": "keep"}),  # the paper's own bounds
    "verl_grpo.sh": ("verl", "grpo", KEPT | {"beta": 0.001, "kl_estimator": "k3", "dual_clip": 3.0}),
    "verl_dapo.sh": ("verl", "dapo", KEPT | {"shaping": [], "dual_clip": 10.0}),
    "verl_ppo.yaml": (
        "verl", "ppo_dual_clip",
        {"lam": 0.95, "advantage_scale": "whiten", "beta": 0.001, "kl_estimator": "k1", "kl_place": "reward",
         "entropy_coef": 0.001, "value_coef": 1.0, "value_clip": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_public_configuration_is_the_loss_that_its_library_documents(name):
    trainer, base, changes = BY_HAND[name]
    reading = read(HERE / name)
    assert reading.trainer == trainer and not reading.not_understood
    expected, found = by_hand(base, **changes).to_dict(), reading.sure.to_dict()
    inert = {"kl_ratio_weight", "kl_place", "kl_estimator"} if not found["beta"] else set()  # of a KL that is off
    assert {k: v for k, v in found.items() if k not in {"name", *inert}} == {
        k: v for k, v in expected.items() if k not in {"name", *inert}
    }


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.iterdir()))
def test_every_kept_configuration_is_read_and_its_call_gives_the_same_loss(name):
    reading = read(HERE / name)
    assert not reading.not_understood and reading.why
    assert again(reading) == reading.loss
    parts = (reading.used, reading.elsewhere, reading.without_effect)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert not set(reading.defaults) & set(reading.used)


def test_every_file_beside_these_is_checked_by_hand():
    assert {path.name for path in HERE.iterdir()} == BY_HAND.keys()


# -- TRL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"loss_type": "dapo"}, "dapo@trl"),
        ({"loss_type": "grpo"}, "grpo_classic@trl"),
        ({"loss_type": "grpo", "beta": 0.04}, "grpo_classic@trl(beta=0.04)"),
        ({"loss_type": "dapo", "beta": "4e-2", "use_bias_correction_kl": "false"},
         "dapo@trl(beta=0.04, kl_ratio_weight=False)"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo@trl(cap=5.0)"),
        ({"loss_type": "dapo", "scale_rewards": False}, "dapo@trl(advantage_scale='none')"),
        ({"loss_type": "dapo", "scale_rewards": "batch"}, "dapo@trl(advantage_scale='batch_std')"),
        ({"loss_type": "dapo", "epsilon": 0.1}, "dapo@trl(clip_low=0.1, clip_high=0.1)"),
        ({"loss_type": "dapo", "delta": 4}, "dapo@trl(dual_clip=4)"),
        ({"loss_type": "dapo", "delta": 1.25, "epsilon_high": 0.28}, "dapo@trl(clip_high=0.25, dual_clip=1.28)"),
        ({"loss_type": "luspo"}, "luspo@trl(ratio_level='token')"),
        ({"loss_type": "dr_grpo"}, "dr_grpo@trl(max_length=512)"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2}, "sapo@trl(tau_neg=2)"),
        ({"loss_type": "vespo", "vespo_k_pos": 1.5}, "vespo@trl(k_pos=1.5)"),
        ({"loss_type": "dapo", "use_vllm": True}, None),
        ({"loss_type": "grpo", "entropy_coef": 0.01},
         "grpo_classic@trl(entropy_coef=0.01, entropy_aggregate='token_mean')"),
        ({"loss_type": "dapo", "reward_weights": [1.0, 0.5]},
         "dapo@trl(shaping=['weighted_sum'], score_weights=[1.0, 0.5])"),
        ({"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
         "dapo@trl(advantage='gdpo', advantage_scale='none')"),
    ],
)  # fmt: skip
def test_a_setting_of_trl_and_what_it_is_called_here(settings, call):
    reading = read(settings)
    assert not reading.not_understood
    assert again(reading) == reading.loss
    if call is None:  # where vLLM samples
        assert reading.loss.replace(name="x") == ls.get_loss("dapo@trl_vllm", name="x")
    else:
        assert reading.call == call


def test_a_guest_in_trl_is_told_how_many_reward_functions_there_are():
    settings = {"loss_type": "dapo", "reward_weights": [1.0, 0.5]}
    assert trl.loss_of(settings, rewards=2).to_dict()["score_weights"] == [1.0, 0.5]
    with pytest.raises(ls.LossError, match="has 2 numbers, and there are 3 reward functions"):
        trl.loss_of(settings, rewards=3)


@pytest.mark.parametrize(
    ("settings", "name", "why"),
    [
        ({"loss_type": "vespo", "beta": 0.1}, "use_bias_correction_kl", "product"),
        ({"loss_type": "vespo", "use_vllm": True}, "vllm_importance_sampling_mode", "gamma function"),
        ({"loss_type": "dapo", "use_adaptive_entropy": True}, "use_adaptive_entropy", "update to update"),
        ({"loss_type": "dapo", "delta": 0.5}, "delta", "below 1"),
        ({"loss_type": "dapo", "top_entropy_quantile": 0.0}, "top_entropy_quantile", "one token"),
        ({"loss_type": "dapo", "top_entropy_quantile": 0.2, "entropy_coef": 0.1}, "entropy_coef", "are kept"),
        ({"loss_type": "dapo", "epsilom": 0.1}, "epsilom", "did you mean epsilon"),
        ({"loss_type": "dapo", "a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow", "no such setting"),
    ],
)  # fmt: skip
def test_what_is_not_understood_in_trl_is_named_and_nothing_is_claimed(settings, name, why):
    reading = read(settings)
    assert why in reading.not_understood[name]
    with pytest.raises(ls.LossError, match=f"not understood.*{name}"):
        _ = reading.sure
    with pytest.raises(ls.LossError, match=name):
        trl.loss_of(settings)


@pytest.mark.parametrize("settings", [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.2}, {"entropy_coef": 0.1}])
def test_a_loss_of_trl_that_depends_on_micro_batches_says_so_with_the_number(settings):
    (note,) = read(settings).notes
    assert re.search(r"\d\.\de-2 apart", note) and "2.4e-7" in note and "1.16.0" in note


def test_a_whole_object_says_what_was_changed_in_it():
    import dataclasses

    fields = [(k, type(v), dataclasses.field(default=v)) for k, v in trl.DEFAULTS.items() if not isinstance(v, list)]
    config = dataclasses.make_dataclass("GRPOConfig", [*fields, ("learning_rate", float, 1e-6)])(beta=0.1)
    reading = read(config)
    assert reading.used == {"beta": 0.1} and reading.call == "dapo@trl(beta=0.1)"
    assert list(reading.elsewhere) == ["learning_rate"]


# -- verl --------------------------------------------------------------------------------------------------------------


def verl_call(**settings):
    names = {
        k: f"{ACTOR}{k}" if not k.startswith(("alg_", "critic")) else k.replace("alg_", "algorithm.") for k in settings
    }
    given = {"algorithm.adv_estimator": "grpo"} | {names[k].replace("__", "."): v for k, v in settings.items()}
    return read(given)


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({}, "grpo@verl"),
        ({"alg_adv_estimator": "gae"}, "ppo@verl(value_coef=1.0)"),
        ({"clip_ratio_low": 0.1, "clip_ratio_high": "0.3"}, "grpo@verl(clip_low=0.1, clip_high=0.3)"),
        ({"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": "null"},
         "grpo@verl(clip_low=0.1, clip_high=0.1)"),
        ({"clip_ratio_c": 10}, "grpo@verl(dual_clip=10)"),
        ({"policy_loss__loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean"},
         "gspo@verl(aggregate='seq_mean_token_mean')"),
        ({"policy_loss__loss_mode": "cispo", "clip_ratio_high": 4}, "cispo@verl(cap=5)"),
        ({"alg_adv_estimator": "rloo"}, "grpo@verl(advantage='loo', advantage_scale='none')"),
        ({"alg_norm_adv_by_std_in_grpo": "False"}, "grpo@verl(advantage_scale='none')"),
        ({"alg_adv_estimator": "reinforce_plus_plus"}, "grpo@verl(advantage='return', advantage_scale='whiten')"),
        ({"use_kl_loss": True, "kl_loss_type": "k3+"}, "grpo@verl(beta=0.001, kl_straight_through=True)"),
        ({"alg_use_kl_in_reward": True}, "grpo@verl(beta=0.001, kl_estimator='k1', kl_place='reward')"),
        ({"alg_rollout_correction.rollout_is": "token"}, "grpo@verl(mismatch='tis')"),
        ({"policy_loss__loss_mode": "sapo", "use_kl_loss": True},
         "sapo@verl(kl_aggregate='token_mean', entropy_aggregate='token_mean', beta=0.001)"),
        ({"policy_loss__loss_mode": "dro", "policy_loss__dro_beta": 0.3}, None),
    ],
)  # fmt: skip
def test_a_setting_of_verl_and_what_it_is_called_here(settings, call):
    reading = verl_call(**settings)
    assert not reading.not_understood
    assert again(reading) == reading.loss
    assert call is None or reading.call.startswith(call.removesuffix(")"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_kl_loss": True, "alg_use_kl_in_reward": True}, f"{ACTOR}use_kl_loss"),
        ({"alg_use_kl_in_reward": True, "alg_kl_ctrl.type": "adaptive"}, "algorithm.kl_ctrl.type"),
        ({"alg_rollout_correction.rollout_rs": "seq_mean_k1"}, "algorithm.rollout_correction.rollout_rs"),
        ({"alg_adv_estimator": "gae", "alg_use_pf_ppo": True}, "algorithm.use_pf_ppo"),
        ({"alg_adv_estimator": "gae", "critic.loss_agg_mode": "token-sum"}, "critic.loss_agg_mode"),
        ({"clip_ratio_hihg": 0.3}, f"{ACTOR}clip_ratio_hihg"),
        ({"alg_foo": 1}, "algorithm.foo"),
    ],
)
def test_what_is_not_understood_in_verl_is_named_and_nothing_is_claimed(settings, name):
    reading = verl_call(**settings)
    assert name in reading.not_understood
    with pytest.raises(ls.LossError, match=re.escape(name)):
        verl.loss_of(_given(settings))


def _given(settings):
    return {
        (k.replace("alg_", "algorithm.") if k.startswith("alg_") else k if "critic" in k else ACTOR + k): v
        for k, v in settings.items()
    } | {"algorithm.adv_estimator": settings.get("alg_adv_estimator", "grpo")}


def test_traps_of_verl_are_said():
    assert "4.00 times as large" in verl_call(policy_loss__loss_mode="geo_mean").notes[0]
    assert "clip_ratio alone changes nothing" in verl_call(clip_ratio=0.1).notes[0]
    notes = verl_call(loss_agg_mode="seq-mean-token-sum-norm").notes
    assert "padded length of the micro-batch" in notes[0]
    assert not verl_call(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=1024).notes


def test_an_interpolation_gets_the_value_that_it_names_and_another_is_not_taken_for_granted(tmp_path):
    text = (
        "algorithm: {adv_estimator: gae}\n"
        "actor_rollout_ref: {actor: {loss_agg_mode: token-sum, kl_loss_coef: '${algorithm.none}', use_kl_loss: true}}\n"
        "critic: {loss_agg_mode: '${oc.select:actor_rollout_ref.actor.loss_agg_mode,token-mean}'}\n"
    )
    reading = read(written(tmp_path, "a.yaml", text))
    assert list(reading.not_understood) == [f"{ACTOR}kl_loss_coef"]
    assert reading.loss.aggregate.option == "token_sum"


# -- the others --------------------------------------------------------------------------------------------------------


def of(trainer, prefix, settings):
    return read({f"{prefix}{name.replace('__', '.')}": value for name, value in settings.items()}, trainer)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"algo__advantage__estimator": "group_norm", "algo__kl__init_coef": 0}, {"advantage_scale": "group_std"}),
        ({"algo__advantage__estimator": "dr_grpo", "algo__kl__init_coef": "0"}, {"advantage_scale": "none"}),
        ({"algo__advantage__estimator": "rloo", "algo__kl__use_loss": True, "algo__kl__estimator": "k3"},
         {"advantage": "loo", "advantage_scale": "none", "beta": 0.01, "kl_place": "loss"}),
        ({"algo__advantage__estimator": "reinforce"}, {"advantage": "return", "beta": 0.01, "kl_place": "reward"}),
        ({"algo__advantage__lambd": "0.95"}, {"advantage": "gae", "lam": 0.95, "value_clip": 0.5}),
        ({"actor__policy_loss_type": "gspo", "algo__advantage__estimator": "group_norm", "algo__kl__init_coef": 0},
         {"ratio_level": "sequence", "aggregate": "seq_mean_token_mean", "entropy_aggregate": "token_mean"}),
        ({"algo__kl__use_loss": True, "algo__kl__unbiased_gradient": True},
         {"kl_straight_through": True, "kl_is_cap": 10.0}),
        ({"algo__advantage__is_correction_level": "seq", "algo__advantage__is_correction_gating": "binary_kl",
          "algo__advantage__is_correction_threshold": "0.01"},
         {"mismatch": "gate", "mismatch_stat": "binary_kl", "mismatch_level": "geometric", "mismatch_high": 0.01}),
        ({"actor__eps_clip_low_high": ["0.2", "0.3"]}, {"clip_low": 0.2, "clip_high": 0.3}),
        ({"advantage_estimator": "reinforce", "init_kl_coef": 0.1, "eps_clip": 0.1}, {"beta": 0.1, "clip_low": 0.1}),
    ],
)  # fmt: skip
def test_flags_of_openrlhf_and_what_they_are_called_here(settings, changes):
    reading = of("openrlhf", "", settings)
    assert not reading.not_understood
    assert changes.items() <= reading.sure.to_dict().items() and again(reading) == reading.loss


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"advantage_scale": "group_std", "beta": 0.001, "kl_aggregate": "seq_mean_token_mean", "dual_clip": None}),
        ({"use_kl_loss": "false", "policy_loss_type": "gspo"}, {"ratio_level": "sequence_token", "beta": 0.0}),
        ({"policy_loss_type": "sapo", "sapo__tau_neg": 2, "loss_reduction": "sequence_mean"},
         {"trust": "sigmoid", "tau_neg": 2, "aggregate": "seq_mean_token_mean", "kl_aggregate": "same"}),
        ({"policy_loss_type": "cispo"}, {"clip_low": 0.0, "cap": 6.0}),
        ({"policy_loss_type": "rollout_is"}, {"trust": "band", "denominator": "behavior"}),
        ({"policy_loss_type": "dppo", "dppo__dppo_type": "binary_kl"}, {"trust": "kl_mask", "surrogate": "ratio"}),
        ({"loss_reduction": "token_mean_legacy"}, {"local_normalizer": True}),
        ({"loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 100}, {"max_length": 100}),
        ({"advantage_estimator": "gae", "lambd": 0.9}, {"advantage": "gae", "lam": 0.9, "value_clip": 0.2}),
        ({"use_tis": True, "tis_imp_ratio_cap": 3}, {"mismatch": "tis", "mismatch_high": 3}),
        ({"use_entropy_loss": True}, {"entropy_coef": 0.01}),
    ],
)  # fmt: skip
def test_settings_of_skyrl_and_what_they_are_called_here(settings, changes):
    reading = of("skyrl", "trainer.algorithm.", settings)
    assert not reading.not_understood
    assert changes.items() <= reading.sure.to_dict().items() and again(reading) == reading.loss


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"trust": "tv_mask", "advantage_scale": "none", "denominator": "behavior", "coef": 1e-3}),
        ({"trainer__loss__type": "ipo", "trainer__loss__ipo-threshold": 0.2}, {"delta": 0.2}),
        ({"trainer__loss__adv_tau": 0.5}, {"advantage_mul": 0.5}),
        ({"orchestrator__algo__type": "max_rl"}, {"advantage": "maxrl"}),
        ({"orchestrator__algo__type": "rae"}, {"advantage": "baseline", "group_filter": "none"}),
        ({"orchestrator__train__filter_zero_advantages": False}, {"group_filter": "none"}),
    ],
)
def test_settings_of_prime_rl_and_what_they_are_called_here(settings, changes):
    reading = of("prime_rl", "", settings)
    assert not reading.not_understood
    assert changes.items() <= reading.sure.to_dict().items() and again(reading) == reading.loss


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"advantage": "nemo_loo", "beta": 0.01, "kl_straight_through": True, "dual_clip": None}),
        ({"grpo__use_leave_one_out_baseline": False, "loss_fn__reference_policy_kl_penalty": 0},
         {"advantage": "group", "advantage_scale": "group_std", "beta": 0.0}),
        ({"grpo__adv_estimator__normalize_rewards": False}, {"advantage": "loo", "advantage_scale": "none"}),
        ({"grpo__adv_estimator__name": "reinforce_plus_plus"}, {"advantage": "group", "advantage_scale": "whiten"}),
        ({"loss_fn__sequence_level_importance_ratios": True, "loss_fn__token_level_loss": False},
         {"ratio_level": "sequence", "aggregate": "seq_mean_token_mean"}),
        ({"loss_fn__use_cispo": True, "loss_fn__ratio_clip_max": 4}, {"trust": "sg_clip", "cap": 5}),
        ({"loss_fn__disable_ppo_ratio": True}, {"trust": "logp"}),
        ({"loss_fn__force_on_policy_ratio": True}, {"denominator": "self", "trust": "none"}),
        ({"loss_fn__use_importance_sampling_correction": True}, {"mismatch": "tis", "mismatch_high": float("inf")}),
        ({"loss_fn__use_importance_sampling_correction": True,
          "loss_fn__truncated_importance_sampling_type": "seq-mask-tis",
          "loss_fn__truncated_importance_sampling_ratio_min": 0.999,
          "loss_fn__truncated_importance_sampling_ratio": 1.002},
         {"mismatch": "gate", "mismatch_level": "geometric", "mismatch_high": 1.002}),
    ],
)  # fmt: skip
def test_settings_of_nemo_rl_and_what_they_are_called_here(settings, changes):
    reading = of("nemo_rl", "", settings)
    assert not reading.not_understood
    assert changes.items() <= reading.sure.to_dict().items() and again(reading) == reading.loss


def test_the_kl_term_of_nemo_rl_is_k3_times_a_ratio_of_one_with_gradient():
    """Its term written out, off-policy too: exp(logp - sg(logp))·k3, against ours."""
    import torch

    g = torch.Generator().manual_seed(0)
    logp, old, ref = (-torch.rand(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    mine, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss = read({"grpo.normalize_rewards": True}).sure
    batch = ls.Batch(
        mask=torch.ones(4, 5, dtype=torch.bool), advantage=torch.zeros(4), logp=mine, old_logp=old, ref_logp=ref
    )
    loss(batch).loss.backward()
    kappa = theirs - ref
    (0.01 * ((-kappa).exp() - 1 + kappa) * (theirs - theirs.detach()).exp()).mean().backward()
    assert torch.allclose(mine.grad, theirs.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("trainer", "settings", "name"),
    [
        ("nemo_rl", {"loss_fn.use_kl_in_reward": True}, "loss_fn.use_kl_in_reward"),
        ("nemo_rl", {"loss_fn.use_on_policy_kl_approximation": True}, "loss_fn.use_on_policy_kl_approximation"),
        ("nemo_rl", {"defaults": "mine.yaml"}, "defaults"),
        ("nemo_rl", {"grpo.adv_estimator.name": "gdpo"}, "grpo.adv_estimator.name"),
        ("nemo_rl", {"loss_fn.ratio_clip_mid": 1}, "loss_fn.ratio_clip_mid"),
        ("openrlhf", {"algo.advantage.estimator": "group_norm"}, "algo.kl.use_loss"),
        ("openrlhf", {"algo.advantage.no_std_norm": True}, "algo.advantage.no_std_norm"),
        ("openrlhf", {"algo.advantage.is_correction_enable": True}, "algo.advantage.is_correction_enable"),
        ("skyrl", {"trainer.algorithm.policy_loss_type": "clip_cov"}, "trainer.algorithm.policy_loss_type"),
        ("skyrl", {"trainer.algorithm.overlong_buffer_len": 512}, "trainer.algorithm.overlong_buffer_len"),
        ("skyrl", {"trainer.algorithm.off_policy_correction.sequence_mask_metric": "product"},
         "trainer.algorithm.off_policy_correction.sequence_mask_metric"),
        ("prime_rl", {"orchestrator.algo.length_penalty.type": "linear"}, "orchestrator.algo.length_penalty.type"),
        ("prime_rl", {"orchestrator.train.source": [{"algo": {"type": "opd"}}]}, "orchestrator.train.source[0].algo"),
        ("prime_rl", {"@": "rl.toml"}, "@"),
        ("prime_rl", {"trainer.loss.dpo_mask_high": 0.1}, "trainer.loss.dpo_mask_high"),
    ],
)  # fmt: skip
def test_what_is_not_understood_in_the_others_is_named(trainer, settings, name):
    assert name in read(settings, trainer).not_understood


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        ("prime_rl", {"orchestrator.algo.type": "opd"}),
        ("prime_rl", {"trainer.loss.type": "custom"}),
        ("skyrl", {"trainer.algorithm.policy_loss_type": "mine"}),
        ("openrlhf", {"algo.advantage.estimator": "mine"}),
        ("verl", {"actor_rollout_ref.actor.policy_loss.loss_mode": "mine"}),
        ("trl", {"loss_type": "mine"}),
    ],
)
def test_a_loss_that_its_library_does_not_have_is_an_error_that_lists_those_it_has(trainer, settings):
    with pytest.raises(ls.LossError, match=r"which \S+ \S+ does not have\. Known: "):
        read(settings, trainer)


# -- files -------------------------------------------------------------------------------------------------------------


def test_one_configuration_in_every_kind_of_file_is_one_loss(tmp_path):
    texts = {
        "a.yaml": "loss_type: cispo\nepsilon_high: 5.0\nbeta: 1e-3\n",
        "b.yml": "\ufeff# a comment\nloss_type: 'cispo'   # another\nepsilon_high: 5.0\nbeta: 0.001\n",
        "c.json": '{"loss_type": "cispo", "epsilon_high": 5.0, "beta": 1e-3}',
        "d.toml": 'loss_type = "cispo"\nepsilon_high = 5.0\nbeta = 1e-3\n',
        "e.py": "import trl\nB = 1e-3\nargs = trl.GRPOConfig(loss_type='cispo', epsilon_high=5.0, beta=B)\n",
        "f.sh": "trl grpo --loss_type cispo --epsilon-high=5.0 \\\n  --beta '1e-3'\n",
        "g.sh": "BETA=1e-3 # here\nexport X=1\naccelerate launch --num_processes 4 train_grpo.py \\\n --loss_type "
        '"cispo" \\\n --epsilon_high 5.0 --beta ${BETA}\n',
    }
    losses = [read(written(tmp_path, name, text)).sure for name, text in texts.items()]
    assert losses == [ls.get_loss("cispo@trl", cap=5.0, beta=0.001)] * len(texts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "", "a.yaml is empty"),
        ("a.yaml", "# nothing\n", "is a table of settings"),
        ("a.yaml", "- 1\n- 2\n", "is a table of settings"),
        ("a.yaml", "loss_type: [\n", "is not YAML"),
        ("a.yaml", "loss_type: dapo\nbeta: 0\nloss_type: grpo\n", r"a.yaml:3: loss_type is given twice"),
        ("a.yaml", "loss_type: dapo\nbeta: much\n", r"a.yaml:2: beta is 'much', which is not a number"),
        ("a.yaml", "loss_type: dapo\nbeta: [1]\n", r"a.yaml:2: beta is \[1\], which is not a number"),
        ("a.yaml", "loss_type: dappo\n", r"a.yaml:1: loss_type is 'dappo'.*Did you mean 'dapo'"),
        ("a.yaml", "loss_type: dapo\nuse_vllm: maybe\n", "neither true nor false"),
        ("a.yaml", "loss_type: dapo\nbeta: -1\n", "a.yaml: .*at least 0"),
        ("a.yaml", "loss_type: dapo\nreward_weights: all\n", "not a list of numbers"),
        ("a.json", '{"loss_type": "dapo", "loss_type": "grpo"}', "loss_type is given twice"),
        ("a.json", "{", "is not JSON"),
        ("a.toml", "loss_type = dapo", "is not TOML"),
        ("a.py", "print('hello')", r"no GRPOConfig\(...\) call"),
        ("a.py", "def f(:", "a.py:1 is not Python"),
        ("a.py", "GRPOConfig(beta=1)\nGRPOConfig(beta=2)", "lines 1 and 2"),
        ("a.py", "GRPOConfig('out')", "by name"),
        ("a.sh", "echo hello", "no command in it runs a Python program"),
        ("a.sh", "trl grpo --beta '0.1\n", "a.sh:1: the quote ' that starts here is not closed"),
        ("a.sh", "A=(x\ntrl grpo --beta 0.1", "a.sh:1: the list that starts here is not closed"),
        ("a.sh", 'trl grpo \\\n --beta "0.1', 'a.sh:2: the quote " that starts here is not closed'),
        ("a.sh", "trl grpo --beta 0.1 --beta 0.2 --loss_type dapo", "beta is given twice"),
        ("a.sh", "python train.py --lr 3", "no setting in it is one of a known trainer alone"),
        ("a.txt", "loss_type: dapo", "ends in .yaml"),
        ("a.yaml", "beta: 0.1\n", "no setting in it is one of a known trainer alone; say whose it is"),
        ("a.yaml", "loss_type: dapo\nalgorithm: {adv_estimator: grpo}\n", "more than one trainer's settings: TRL has"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_a_configuration_says_why_and_where(tmp_path, name, text, message):
    with pytest.raises(ls.LossError, match=message):
        read(written(tmp_path, name, text))


def test_two_launches_in_a_script_are_not_chosen_between(tmp_path):
    launch = "python -m verl.trainer.main_ppo algorithm."
    text = f"{launch}adv_estimator=grpo\n{launch}lam=1\n"
    with pytest.raises(ls.LossError, match="launched in lines 1 and 2"):
        read(written(tmp_path, "a.sh", text))


def test_what_only_the_shell_could_know_is_not_taken_for_granted(tmp_path):
    text = """
if [ "$1" = big ]; then KL=0.1; else KL=0.2; fi
CLIP=${CLIP:-0.3}
python3 prepare.py --local_dir ~/data  # not a trainer
python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=$KL \\
  actor_rollout_ref.actor.clip_ratio_high=$CLIP actor_rollout_ref.actor.clip_ratio_low=$(cat low.txt) \\
  trainer.project_name=$HOME/x ~actor_rollout_ref.actor.tau_pos= "$@"
"""
    reading = read(written(tmp_path, "run.sh", text))
    assert reading.not_understood.keys() == {f"{ACTOR}kl_loss_coef", f"{ACTOR}clip_ratio_low"}
    assert "$(cat low.txt)" in reading.not_understood[f"{ACTOR}clip_ratio_low"]
    assert reading.loss.trust.high == 0.3
    assert any("$@" in note for note in reading.notes)


def test_a_script_may_hold_its_settings_in_lists_and_in_text(tmp_path):
    text = """
ACTOR=(
  # of the policy
  actor_rollout_ref.actor.clip_ratio_high=0.28   # DAPO's
  actor_rollout_ref.model.path="${HOME}/a model"
)
ACTOR+=( actor_rollout_ref.actor.clip_ratio_c=$((2 * (3 + 2))) )
read -r -d '' MORE <<EOF
python3 -m verl.trainer.main_ppo
    algorithm.adv_estimator=grpo
    trainer.logger=['console']
EOF
$MORE "${ACTOR[@]}"
"""
    reading = read(written(tmp_path, "run.sh", text))
    assert reading.call == "grpo@verl(clip_high=0.28, dual_clip=10)" and not reading.not_understood


def test_a_config_of_ones_own_that_verl_is_given_is_named():
    settings = {"config-name": "mine", "algorithm.adv_estimator": "grpo"}
    assert "not in this file" in read(settings).not_understood["config-name"]
    assert not read(settings | {"config-name": "ppo_megatron_trainer.yaml"}).not_understood
    listed = {"defaults": ["ppo_trainer", {"override /x": "y"}], "algorithm.adv_estimator": "grpo"}
    assert "defaults" in read(listed).not_understood


def test_the_words_of_a_script_are_those_that_a_shell_sees():
    text = 'A=\'x y\'\nprog $A "$A" \'$A\' a\\ b "c\\"d" e#f # g\nX=1 other -z; third|fourth && fifth\n'
    found = [[word.text for word in command.words] for command in commands(text)]
    assert found == [
        ["prog", "x", "y", "x y", "$A", "a b", 'c"d', "e#f"],
        ["other", "-z"],
        ["third"],
        ["fourth"],
        ["fifth"],
    ]


@pytest.mark.parametrize("wrong", [3, None, [1, 2], SimpleNamespace(beta=1)])
def test_what_is_no_configuration_is_refused(wrong):
    with pytest.raises(ls.LossError, match="a configuration is a path, a mapping or a trainer's own object"):
        read(wrong)


def test_a_trainer_that_nobody_knows_is_refused():
    with pytest.raises(ls.LossError, match="Did you mean 'trl'"):
        read({"beta": 0.1}, trainer="trll")
    assert read({"beta": 0.1}, trainer="trl").call == "dapo@trl(beta=0.1)"
    with pytest.raises(ls.LossError, match="the name of a setting is text"):
        read({1: 2})


def test_what_is_known_of_a_trainer_has_one_meaning():
    for trainer in TRAINERS.values():
        assert trainer.version and trainer.title
        for name in trainer.defaults:
            assert trainer.own(name) or "." in name or name in ("beta", "delta", "max_completion_length")


@pytest.mark.parametrize("path", sorted(HERE.iterdir()), ids=lambda path: path.name)
def test_a_garbled_file_is_a_reading_or_one_sentence(tmp_path, path):
    rng, text = random.Random(0), path.read_text(encoding="utf-8")
    for _ in range(25):
        letters = list(text)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(letters) + 1)
            if rng.random() < 0.5:
                letters.insert(at, rng.choice("'\"$(){}[]#\\\n &|;<>=:-,.@~`\t0Ax"))
            else:
                del letters[at : at + rng.randint(1, 40)]
        try:
            assert read(written(tmp_path, path.name, "".join(letters))).call
        except ls.LossError as error:
            assert path.name in str(error)


# -- the shell ---------------------------------------------------------------------------------------------------------


def test_the_shell_says_whose_it_is_what_it_is_and_what_made_it():
    out = lossmith("losses", "from", HERE / "verl_dapo.sh", "--no-audit").stdout
    for part in (
        "verl 0.9.1, recognized by recipe.dapo.main_dapo", "grpo@verl(group_filter='zero_variance', clip_high=0.28",
        "clip(r, 0.8, 1.28)·A", "A > 0", "algorithm.adv_estimator=grpo", "not of the loss", "overlong_buffer_cfg",
    ):  # fmt: skip
        assert part in out
    assert "not understood" not in out


def test_the_shell_measures_what_the_loss_does():
    out = lossmith("losses", "from", HERE / "trl_gspo.py").stdout
    assert "Expected gradient" in out or "expected" in out.lower()
    assert "No check fails" in out


def test_the_shell_names_what_is_not_understood_and_leaves_with_1(tmp_path):
    path = written(tmp_path, "a.yaml", "loss_type: dapo\nepsilom: 0.1\n")
    result = lossmith("losses", "from", path, "--no-audit", code=1)
    assert "not understood" in result.stdout and "did you mean epsilon" in result.stdout
    told = json.loads(lossmith("losses", "from", path, "--json", code=1).stdout)
    assert told["not_understood"].keys() == {"epsilom"} and told["loss"] == "dapo@trl"


def test_the_shell_is_told_whose_it_is(tmp_path):
    path = written(tmp_path, "a.yaml", "beta: 0.1\n")
    assert "say whose it is" in lossmith("losses", "from", path, code=2).stderr
    assert "--trainer" in lossmith("losses", "from", path, code=2).stderr
    assert "dapo@trl(beta=0.1)" in lossmith("losses", "from", path, "--trainer", "trl", "--no-audit").stdout


def test_two_files_and_a_name_side_by_side():
    out = lossmith("losses", "compare", HERE / "trl_gspo.py", HERE / "verl_grpo.sh", "grpo").stdout
    assert "trl_gspo.py is grpo_classic@trl(ratio_level='sequence'" in out and "of TRL 1.16.0" in out
    assert "verl_grpo.sh is grpo@verl(beta=0.001), of verl 0.9.1" in out
    assert "what differs" in out
