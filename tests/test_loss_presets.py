"""Presets of other libraries: their numbers stay whatever is changed, and their words lead to ours."""

import re

import pytest
import torch

import lossmith.losses as L
from batches import EVERY, no_trap_warnings, quiet_loss, random_fields
from lossmith.errors import RecipeError
from lossmith.losses.composition.flat import AXES
from lossmith.losses.composition.foreign import FOREIGN
from lossmith.training import Recipe

PRESETS = [name for name in EVERY if "@" in name and isinstance(quiet_loss(name), L.PolicyLoss)]
# in each library's own source, losses.md section 4
EPS = {"trl": 1e-4, "trl_vllm": 1e-4, "verl": 1e-6, "openrlhf": 1e-9, "skyrl": 1e-6, "ms_swift": 1e-4}
OF_TRL = [name for name in EVERY if name.endswith("@trl_vllm")]


def changed(name: str, **changes: object) -> L.PolicyLoss | None:
    """The preset with another option; None where that means nothing."""
    try:
        return quiet_loss(name, **changes)
    except L.LossError:
        return None


@pytest.mark.slow  # every preset with every option of every axis
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_keeps_its_numbers_when_an_axis_changes(name, axis):
    with no_trap_warnings():
        before, preset = quiet_loss(name).to_dict(), L.get_loss(name)
    for option in AXES[axis]:
        loss = changed(name, **{axis: option})
        if loss is None:
            continue
        after = loss.to_dict()
        lost = {k: after[k] for k in before.keys() & after.keys() - {axis} if after[k] != before[k]}
        assert not lost or (before["cap"] is None and lost.keys() == {"cap"}), option  # "no cap": some know it only
        with no_trap_warnings():
            assert preset.replace(**{axis: option}) == L.get_loss(name, **{axis: option})


@pytest.mark.parametrize("scale", ["group_std", "group_std_biased", "batch_std", "loo_std"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name.partition("@")[2] in EPS])
def test_every_scale_of_a_library_has_its_eps(name, scale):
    loss = changed(name, advantage_scale=scale)
    assert loss is None or loss.advantage_scale.eps == EPS[name.partition("@")[2]]


def test_an_option_that_a_preset_does_not_have_gets_the_librarys_numbers():
    assert quiet_loss("dapo@trl", mismatch="tis").mismatch == L.TIS("sequence", 0.0, 3.0)
    assert quiet_loss("dapo@trl", mismatch="icepop").mismatch == quiet_loss("dapo@trl_vllm").mismatch
    assert quiet_loss("grpo@verl", trust="cov_kl").trust == quiet_loss("kl_cov@verl").trust
    assert quiet_loss("sapo@verl", trust="clip").trust == L.Clip(0.2, 0.2, dual=3.0)
    assert quiet_loss("grpo@trl", advantage="maxrl").advantage.eps == 1e-4


def test_the_batchs_standard_deviation_in_trl_is_divided_by_with_its_own_eps():
    """Rewards 1, 0, 0, 0.5 in two groups: A = (R - mean of the group) / (std of the batch + 1e-4), by hand."""
    batch = L.Batch(mask=[[1]] * 4, reward=[1.0, 0.0, 0.0, 0.5], group=[0, 0, 1, 1])
    std = (((1 - 0.375) ** 2 + 2 * 0.375**2 + 0.125**2) / 3) ** 0.5
    got = L.get_loss("dapo@trl", advantage_scale="batch_std").credit(batch).advantage[:, 0]
    assert got.tolist() == pytest.approx([x / (std + 1e-4) for x in (0.5, -0.5, -0.25, 0.25)], abs=1e-15)


def test_a_named_loss_brings_the_options_own_numbers_and_keeps_what_was_chosen_on_purpose():
    assert L.get_loss("grpo", trust="dynamic_clip").trust.low == 0.16  # of that option's paper
    assert L.get_loss("cispo", trust="clip").trust == L.Clip(0.2, 0.2)
    assert L.get_loss("grpo", eps=1e-3).replace(advantage_scale="batch_std").advantage_scale.eps == 1e-3
    assert L.get_loss("gspo", trust="preserve").trust.high == 4e-4


# -- with vLLM and without --------------------------------------------------------------------------------------------


def test_there_is_a_preset_for_each_of_trls_two_samplers():
    """In VESPO the factor is a part of W, and its default mode is refused; GMPO's and RLOO's trainers have none."""
    names = ("grpo", "dapo", "bnpo", "dr_grpo", "grpo_classic", "cispo", "sapo", "luspo", "gspo")
    assert [f"{name}@trl_vllm" for name in names] == OF_TRL
    assert not quiet_loss("gmpo@trl").kl.ratio_weight  # gmpo_trainer.py has no weight on its KL term


@pytest.mark.parametrize("name", OF_TRL)
def test_the_factor_for_the_samplers_mismatch_is_there_with_vllm_only(name):
    with_vllm, without = quiet_loss(name), quiet_loss(name.removesuffix("_vllm"))
    assert "behavior_logp" in with_vllm.needs and "behavior_logp" not in without.needs
    assert "u·" in str(with_vllm) and "ρ" in str(with_vllm) and "ρ" not in str(without)
    assert "behavior_logp" in with_vllm.code() and "behavior_logp" not in without.code()
    fields = random_fields(0)
    gap = torch.where(fields["mask"], fields["old_logp"] - fields["behavior_logp"], 0.0).sum(1)
    factor = torch.where(gap.exp() <= 3, gap.exp(), 0.0)[:, None].expand(fields["mask"].shape)
    batch = L.Batch(**fields)
    torch.testing.assert_close(with_vllm.credit(batch).mismatch, factor, rtol=1e-12, atol=0)
    assert bool((without.credit(batch).mismatch == 1).all())
    assert "use_vllm=True" in L.CATALOGUE[name].summary


# -- the words of other libraries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word", "value", "message"),
    [
        (
            "grpo",
            "epsilon",
            0.2,
            r"epsilon is TRL's name for clip_low and clip_high here: write clip_low=0.2, clip_high=0.2",
        ),
        ("grpo", "epsilon", 0.2, r"`eps` here is another thing: what is added to a standard deviation"),
        ("grpo", "epsilon_high", 0.28, r"write clip_high=0.28\."),
        ("cispo", "epsilon_high", 5.0, r"write cap=5.0\."),
        ("grpo", "delta", 4.0, r"delta is TRL's name for dual_clip here: write dual_clip=4.0.*another thing"),
        ("grpo", "kl_coef", 0.01, r"verl.* for beta here: write beta=0.01"),
        ("grpo", "kl_loss_coef", 0.01, r"write beta=0.01.*kl_place='loss'"),
        ("grpo", "init_kl_coef", 0.01, r"OpenRLHF's name for beta.*kl_place='reward'"),
        ("grpo", "clip_ratio", 0.2, r"verl's name for clip_low and clip_high"),
        ("grpo", "clip_ratio_high", 0.28, r"write clip_high=0.28"),
        ("grpo", "clip_ratio_c", 3.0, r"write dual_clip=3.0"),
        ("ppo", "cliprange", 0.2, r"write clip_low=0.2, clip_high=0.2"),
        ("ppo", "cliprange_value", 0.2, r"write value_clip=0.2"),
        ("ppo", "vf_coef", 0.1, r"write value_coef=0.1"),
        ("ppo", "eps_clip", 0.2, r"write clip_low=0.2, clip_high=0.2"),
        ("grpo", "importance_sampling_level", "sequence", r"write ratio_level='sequence'"),
        ("grpo", "scale_rewards", "batch", r"write advantage_scale='batch_std'"),
        ("grpo", "scale_rewards", False, r"write advantage_scale='none'"),
        ("grpo", "norm_adv_by_std_in_grpo", False, r"verl.*write advantage_scale='none'"),
        ("grpo", "loss_type", "dr_grpo", r"the loss dr_grpo@trl"),
        ("grpo", "loss_agg_mode", "token-mean", r"write aggregate='token_mean'"),
        ("grpo", "kl_loss_type", "low_var_kl", r"write kl_estimator='k3'"),
        ("grpo", "kl_target", 6.0, r"kl_control_target=6.0.*another thing"),
        ("grpo", "mask_truncated_completions", True, r"write truncated='mask'"),
        ("grpo", "num_iterations", 2, r"TRL's name for epochs, a setting of the recipe"),
        ("reinforce", "epsilon", 0.2, r"On reinforce that has no effect: it belongs to trust='clip'"),
        ("simpo", "simpo_gamma", 1.0, r"write target_margin=1.0"),
        ("dpo", "epsilon", 0.2, r"On dpo that has no effect"),
        ("real", "beta", 0.1, r"real has no parameter 'beta'.*It has: tau"),
        ("grpo", "clip_ration", 0.2, r"clip_ratio is verl's name"),  # misspelt, too
        ("grpo", "clip_hihg", 0.2, r"Did you mean 'clip_high'"),
    ],
)
def test_the_words_of_other_libraries_lead_to_ours(name, word, value, message):
    expected = re.compile(message, re.DOTALL)
    for ask in (
        lambda: L.get_loss(name, **{word: value}),
        lambda: L.get_loss(f"{name}({word}={value!r})"),
        lambda: L.parse_loss({"name": name, word: value}),
        lambda: L.get_loss(name).replace(**{word: value}),
        lambda: Recipe.make(loss=f"{name}({word}={value!r})").policy_loss(),
    ):
        with pytest.raises(L.LossError, match=expected):
            ask()


@pytest.mark.parametrize("word", FOREIGN)
def test_what_a_word_leads_to_exists(word):
    """Each of our names that the table gives is a parameter, and each option of an axis is one."""
    entry, ours = FOREIGN[word], L.all_parameters()
    assert entry.setting in {"", *Recipe.model_fields} and set(entry.ours) <= {*ours, "target_margin", "lam_d", "lam_u"}
    assert entry.ours or entry.write or entry.note or entry.setting
    for advice in entry.write.values():
        for key, value in re.findall(r"(\w+)='(\w+)'", advice):
            assert key in ours and (key not in AXES or value in AXES[key]), advice
        for name in re.findall(r"the loss (\S+)", advice):
            assert name in L.CATALOGUE
    for value in (0.2, True, False, "x", None, [1]):
        assert len(entry.said(word, value, ["clip_high", "beta"])) > 20


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("beta", 0.04, r'no setting \'beta\'. It is a parameter of the loss: write loss = "grpo\(beta=0.04\)"'),
        ("epsilon", 0.2, r"no setting 'epsilon'. It is a parameter of the loss.*clip_low=0.2"),
        ("num_generations", 8, r"TRL's name for samples_per_prompt here"),
        ("learning_rat", 1e-4, r"Did you mean 'learning_rate'"),
    ],
)
def test_a_word_in_the_wrong_place_of_a_recipe(key, value, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.make(**{key: value})


def test_a_loss_is_asked_for_as_the_shell_does():
    assert L.get_loss("grpo(beta=0.1)") == L.get_loss("grpo", beta=0.1) == L.parse_loss("grpo(beta=0.1)")
    assert L.get_loss("grpo@trl(clip_high=0.28)", beta=0.1) == L.get_loss("grpo@trl", clip_high=0.28, beta=0.1)
    assert L.get_loss(" grpo ( beta = 0.1 ) ") == L.get_loss("grpo", beta=0.1)
    assert L.get_loss("grpo", name="mine").name == "mine" and L.get_loss(name="grpo") == L.get_loss("grpo")
    for twice in (lambda: L.get_loss("grpo(beta=0.1, beta=0.9)"), lambda: L.get_loss("grpo(beta=0.1)", beta=0.1)):
        with pytest.raises(L.LossError, match=r"beta.*twice|twice.*beta|beta twice"):
            twice()
    for text in (
        "grpo(",
        "grpo(0.1)",
        "grpo(beta=open('x'))",
        "grpo(**{'beta': 1})",
        "(beta=1)",
        "grpo(beta=0.1",
        ")(",
    ):
        with pytest.raises(L.LossError, match=r"cannot read the loss|no loss"):
            L.get_loss(text)
