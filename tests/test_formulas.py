"""The printed formula is the loss: read as a program it gives its value and its slope, and its mistakes are found."""

import dataclasses

import pytest

import lossmith.losses as L
from batches import no_trap_warnings
from lossmith.losses.composition.flat import AXES
from lossmith.losses.composition.notation import read, read_expression
from lossmith.proofs import CHECKS
from lossmith.proofs.printed.check import formula

FILLED = {
    "keep": 2, "max_lag": 1, "threshold": 0.1, "m2_threshold": 0.04, "opsm_delta": 0.05, "tau": 0.5, "low_step": 0.05,
    "high_step": 0.1, "max_length": 8,
}  # fmt: skip
# Beside every entry of the catalogue (tests/test_proofs.py holds each to all checks): every option, and what
# changes a formula in more places than one.
OPTIONS = [(axis, option) for axis, known in AXES.items() for option in known if option != "zero"]
CHANGED = {
    "shaping": ("grpo", {"shaping": ["clip", "scale", "overlong"], "reward_low": -1.0, "a": 2.0, "b": 0.3}),
    "weighted sum": ("grpo", {"shaping": ["weighted_sum"], "score_weights": [0.3, 0.5, 0.2]}),
    "gdpo weights": ("grpo", {"advantage": "gdpo", "advantage_scale": "none", "score_weights": [0.3, 0.5, 0.2]}),
    "potential": ("ppo", {"shaping": ["potential"], "kl_place": "reward", "beta": 0.1, "kl_estimator": "k2"}),
    "truncated mask": ("grpo", {"truncated": "mask", "kl_aggregate": "token_sum", "entropy_coef": 0.1}),
    "truncated zero": ("grpo", {"truncated": "zero", "shaping": ["potential"], "group_filter": "above"}),
    "apart": ("grpo", {"entropy_coef": 0.1, "entropy_aggregate": "token_sum", "kl_aggregate": "token_mean"}),
    "masked": ("grpo", {"masked": "keep", "shaping": ["scale"]}),
    "masked, by token": ("grpo", {"masked": "keep", "kl_place": "reward", "kl_estimator": "k1"}),
    "alone": ("grpo", {"singleton": "raw"}),
    "alone, scaled": ("reinforce", {"advantage": "gpg", "singleton": "raw", "advantage_scale": "group_std_biased"}),
    "critic, whitened": ("ppo", {"advantage_scale": "whiten", "value_clip": 0.3, "lam": 0.9, "gamma": 0.8}),
    "factor and bound": ("ppo", {"advantage_mul": 2.0, "advantage_clip": 0.5}),
    "straight-through": ("grpo", {"kl_straight_through": True, "kl_is_cap": 1.1}),
    "by ratio": ("grpo", {"kl_ratio_weight": True, "kl_estimator": "k1"}),
    "kl masked": ("grpo", {"mask_kl": True, "mismatch": "tis", "sequence_mask": "staleness"}),
    "full kl": ("grpo", {"kl_estimator": "full"}),
    "denominator": ("dppo_tv", {"denominator": "behavior", "surrogate": "ratio"}),
    "split by the score": ("topr", {"shaping": ["scale"], "a": 2.0, "b": 0.7}),
    "drawn": ("clip_cov", {"cov_low": -1.0, "cov_high": 0.3, "fraction": 0.2, "seed": 3}),
    "highest": ("kl_cov", {"fraction": 0.3}),
    "normalized": ("grpo", {"mismatch": "icepop", "mismatch_batch_normalize": True, "mismatch_low": 0.8}),
    "digits": ("grpo", {"clip_low": 1 / 3, "eps": 1.2345678e-5}),
    "given labels": ("cdpo", {"labels": "given"}),
    "the teacher's likeliest": ("gkd", {"distil_top_k": 2, "distil_support": "teacher", "distil_coef": 0.3}),
    "no others": ("skew_kl", {"distil_top_k": 3, "distil_tail": False, "skew": 0.35}),
    "beside a policy term": ("grpo", {"extra": "jsd", "jsd_beta": 0.2, "distil_coef": 0.1}),
    "given labels, both sides": ("apo_down", {"labels": "given"}),
    "sorted, best and worst": ("aot", {"pairs": "best_worst"}),
    "given labels, imitation": ("orpo", {"labels": "given", "pairs": "best_worst"}),
}


def made(name, changes):
    loss = L.example_loss(name, **changes)
    with no_trap_warnings():
        return loss.replace(**{k: v for k, v in FILLED.items() if k in loss.needs})


def wrong(loss, seeds=(0, 1)):
    found = [formula(loss, seed) for seed in seeds]
    return [x for x in found if x.status == "failed"]


@pytest.mark.parametrize(("axis", "option"), OPTIONS)
def test_every_option_prints_what_it_does(axis, option):
    base = "reinforce" if axis in ("advantage", "trust", "aggregate") else "grpo"
    assert not wrong(made(base, {axis: option}))


@pytest.mark.parametrize("label", CHANGED)
def test_what_is_changed_in_many_places_is_printed_in_all(label):
    assert not wrong(made(*CHANGED[label]))


@pytest.mark.parametrize("stat", ["ratio", "tv", "binary_kl", "k1", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_every_gate_prints_its_statistic(stat, level):
    gate = {"mismatch_stat": stat, "mismatch_level": level, "mismatch_high": 0.9, "mismatch_low": 1e-4}
    assert not wrong(made("grpo", {"mismatch": "gate", **gate}))


# -- planted mistakes ------------------------------------------------------------------------------------------------

# (loss, what its text says, what a mistaken piece would say)
PLANTED = {
    "bounds swapped": ("dapo", "clip(r, 0.8, 1.28)", "clip(r, 0.72, 1.2)"),
    "wrong sign": ("grpo", "[ −min(", "[ min("),
    "wrong sign of the penalty": ("grpo", "+ 0.04·", "− 0.04·"),
    "maximum for minimum": ("grpo", "min(r·A", "max(r·A"),
    "the product clipped without A": ("grpo", "clip(r, 0.8, 1.2)·A)", "clip(r, 0.8, 1.2))"),
    "mean missing": ("grpo", "R − mean_g(R)", "R"),
    "mean over the batch": ("dr_grpo", "mean_g(R)", "mean_batch(R)"),
    "biased deviation": ("grpo", "std_g(R)", "std0_g(R)"),
    "another default": ("grpo", "0.04", "0.05"),
    "eps left out": ("grpo@trl", " + 0.0001", ""),
    "length not divided by": ("grpo", "1/T_i ", ""),
    "token mean for a mean of completions": ("reinforce", "1/N", "1/(Σ_i T_i)"),
    "ratio turned over": ("grpo", "π_θ(y_t) / π_old(y_t)", "π_old(y_t) / π_θ(y_t)"),
    "ratio of tokens": ("gspo", "(π_θ(y) / π_old(y))^(1/T)", "π_θ(y_t) / π_old(y_t)"),
    "another policy": ("grpo", "log π_ref(y_t)", "log π_old(y_t)"),
    "k1 for k3": ("grpo", "(e^(−κ) − 1 + κ)", "κ"),
    "κ with the wrong sign": ("grpo", "(e^(−κ) − 1 + κ)", "(e^(κ) − 1 − κ)"),
    "half left out": ("ppo", "½", ""),
    "discount left out": ("ppo", "0.95·", ""),
    "value of the wrong token": ("ppo", "r_t + V_{t+1} − V_t", "r_t + V_t − V_{t+1}"),
    "target after scaling": ("ppo@verl", "G = Â + V", "G = A + V"),
    "the wrong side": ("dppo_tv", "A ≥ 0 and π_θ(y_t) − π_old(y_t)", "A ≥ 0 and π_old(y_t) − π_θ(y_t)"),
    "gradient stopped where it is not": ("reinforce", "log π_θ(y_t)", "sg(log π_θ(y_t))"),
    "gradient not stopped": ("cispo", "sg(min(r, 5))", "min(r, 5)"),
    "teacher and policy": ("reverse_kl", "log π_θ(v) − log π_T(v)", "log π_T(v) − log π_θ(v)"),
    "shares swapped": ("skew_kl", "0.1·π_T(v) + 0.9·π_θ(v)", "0.9·π_T(v) + 0.1·π_θ(v)"),
    "the rest left out": ("sdpo", ", rest)", ")"),
    "the whole prefix": ("iw_opd", "Σ_{k<t}", "Σ_{k≤t}"),
    "not in order": ("aot", "matched_P((X_w − X_l), (Y_w − Y_l))", "(Y_w − Y_l)"),
    "winner and loser": ("dpo", "(Λ_w − Λ_l)", "(Λ_l − Λ_w)"),
    "all pairs": ("online_dpo", "w = argmax_g(R), l = argmin_g(R), ", ""),
    "against another anchor": ("dpo", " − log π_ref(y_t)", " − log π_old(y_t)"),
    "temperatures swapped": ("sapo", "1 if A > 0 else 1.05", "1.05 if A > 0 else 1"),
    "filter left out": ("rejection_sampling", "R > 0.5", "R > −9"),
    "penalty on the final reward": ("rloo", "r_t − sg(0.05·κ)", "r_t + sg(0.05·κ)"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake, monkeypatch):
    name, said, instead = PLANTED[mistake]
    loss = L.example_loss(name)
    text = loss.formula()
    assert said in text
    monkeypatch.setattr(type(loss), "formula", lambda self, style="text": text.replace(said, instead))
    monkeypatch.setattr(type(loss), "__str__", lambda self: "L")
    assert wrong(loss, (0,))


def test_a_piece_of_ones_own_is_held_to_its_text():
    @dataclasses.dataclass(frozen=True)
    class Half(L.LogP):
        def value(self, at):
            return 0.5 * super().value(at)

        def weight(self, at):
            return 0.5 * super().weight(at)

        def code(self):
            return ["loss = -0.5 * A * logp"]

    loss = L.get_loss("reinforce", trust=Half())
    (found,) = wrong(loss, (0,))
    assert found.number == pytest.approx(1, rel=0.01)  # it says A·log π_θ
    assert CHECKS["formula"] is formula

    @dataclasses.dataclass(frozen=True)
    class Said(Half):
        def formula(self):
            return "0.5·A·log π_θ(y_t)"

    assert not wrong(L.get_loss("reinforce", trust=Said()))

    @dataclasses.dataclass(frozen=True)
    class Mumbled(Half):
        def formula(self):
            return "half of A·log π_θ(y_t"

    loss = L.get_loss("reinforce", trust=Mumbled())
    (found,) = wrong(loss, (0,))
    assert "cannot be read" in found.detail and "half of" in loss.formula()  # it is printed all the same
    with pytest.raises(L.LossError, match="cannot be read"):
        loss.formula("latex")


# -- the language ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("r·(A", "')' is missing before 'the end'"),
        ("r·A)", "nothing may follow here, but there is ')'"),
        ("r·", "a number, a name or a bracket is missing before 'the end'"),
        ("a if b", "'else' is missing before 'the end'"),
        ("π_θ(R)", "not to 'R'"),
        ("r ? A", "at '? A'"),
    ],
)
def test_what_cannot_be_read_is_named(text, why):
    with pytest.raises(L.LossError) as caught:
        read_expression(text)
    assert why in str(caught.value) and repr(text) in str(caught.value)


def test_a_line_that_defines_nothing_is_refused():
    with pytest.raises(L.LossError, match="a remark that is known"):
        read("L(θ) = 1\ngroups with equal rewards are left out")
