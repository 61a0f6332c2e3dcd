"""Where a library does something else than its name or its documentation says: the library's number, the closed form,
and Lossmith's number, which is the closed form. A library that is mended makes its test fail; then the test goes."""

import dataclasses
import math

import pytest
import torch

import live_liger
import live_trl
import live_verl
import live_verl_advantages
import lossmith as ls
from live_case import Fields, Params, get_loss, lossmith, require, their_ways, unsupported

pytestmark = pytest.mark.parity


def rows(*ratios: list[float], advantage: list[float], length: int = 0, **more: list[list[float]]) -> Fields:
    """Rows of these ratios r = exp(logp - old_logp), padded with ratio 1; old log-probability -2 everywhere."""
    length = length or max(len(row) for row in ratios)
    padded = torch.tensor([row + [1.0] * (length - len(row)) for row in ratios], dtype=torch.float64)
    mask = torch.tensor([[t < len(row) for t in range(length)] for row in ratios])
    old = torch.full_like(padded, -2.0)
    fields = {"logp": old + padded.log(), "old_logp": old, "mask": mask}
    fields |= {name: torch.tensor(value, dtype=torch.float64) for name, value in more.items()}
    return fields | {"advantage": torch.tensor(advantage, dtype=torch.float64)}


def trl(fields: Fields, params: Params, kind: str = "grpo", **changes: object) -> dict[str, torch.Tensor]:
    require("trl")
    with their_ways():
        return live_trl.call(fields, params, kind, **changes)


def liger(fields: Fields, params: Params, **changes: object) -> dict[str, torch.Tensor]:
    require("liger")
    with their_ways():
        return live_liger.call(fields, params, **changes)


def verl(name: str, fields: Fields, params: Params, **config: object) -> dict[str, torch.Tensor]:
    require("verl")
    with their_ways():
        return live_verl.policy_loss(name, fields, params, live_verl.config(**config) if config else None)


def ours(loss: str, fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    """Lossmith's numbers; what the library does has been checked by then."""
    if reason := unsupported(loss, params, fields):
        pytest.skip(reason)
    return lossmith(loss, fields, params)


def is_number(got: dict[str, torch.Tensor], loss: float | None = None, grad: list | None = None) -> None:
    if loss is not None:
        assert float(got["loss"]) == pytest.approx(loss, rel=1e-7, abs=1e-7)
    if grad is not None:
        torch.testing.assert_close(got["grad_logp"], torch.tensor(grad, dtype=torch.float64), rtol=1e-7, atol=1e-9)


WIDE = {"clip_low": 0.5, "clip_high": 0.5}
PLAIN = WIDE | {"beta": 0.0}


def test_liger_luspo_at_token_level_counts_padding():
    """LUSPO is the mean over rows of the sum over their tokens: here −(3 + 1.1)/2. Liger sums the padding too."""
    fields = rows([1.0, 1.0, 1.0], [1.1], advantage=[1.0, 1.0])
    params = PLAIN | {"aggregate": "seq_mean_token_sum"}
    is_number(liger(fields, PLAIN, loss_type="luspo"), loss=-(3 * 3 + 1.1 + 1 + 1) / 6)
    is_number(trl(fields, PLAIN, loss_type="luspo"), loss=-(3 + 1.1) / 2)
    is_number(ours("grpo", fields, params), loss=-(3 + 1.1) / 2)


def test_liger_luspo_weights_the_kl_term_by_the_length():
    fields = rows([1.0, 1.0], [1.0], advantage=[0.0, 0.0], ref_logp=[[-3.0, -3.0], [-3.0, -3.0]])
    k3 = math.exp(-1) - 1 + 1
    params = WIDE | {"beta": 0.1, "kl_estimator": "k3", "kl_place": "loss", "kl_ratio_weight": False}
    is_number(liger(fields, params, loss_type="luspo"), loss=0.1 * k3 * (2 * 2 + 1 + 1) / 4)
    is_number(trl(fields, params, loss_type="luspo"), loss=0.1 * k3 * 3 / 2)
    is_number(ours("grpo", fields, params | {"aggregate": "seq_mean_token_sum"}), loss=0.1 * k3 * 3 / 2)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_verl_dppo_caps_at_3_where_20_is_documented(name):
    """p = .1, q = .01: the ratio is 10, and the probability has moved by .09 only."""
    fields = rows([10.0], advantage=[1.0])
    shift = math.log(0.01) + 2
    fields |= {key: fields[key] + shift for key in ("logp", "old_logp")}
    deltas = {"delta_low": 0.2, "delta_high": 0.2}
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    is_number(verl(name, fields, {}, **bounds), grad=[[-3.0]])
    is_number(verl(name, fields, {}, **bounds, clip_ratio_c=20.0), grad=[[-10.0]])
    is_number(ours(name, fields, deltas), grad=[[-10.0]])


def test_verl_clip_ratio_alone_is_without_effect():
    fields = rows([1.1], advantage=[1.0])
    is_number(verl("vanilla", fields, {}, clip_ratio=0.01), loss=-1.1, grad=[[-1.1]])
    is_number(ours("ppo", fields, {"clip": 0.01}), loss=-1.01, grad=[[0.0]])


def test_trl_cispo_default_cap_is_a_fifth():
    """Its help recommends 5, its default epsilon is .2: every weight is .2, on-policy too."""
    require("trl")
    with their_ways():
        from trl import GRPOConfig
    default = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert (default["epsilon_high"], default["epsilon"]) == (None, 0.2)
    fields = rows([1.0, 3.0], advantage=[1.0])
    is_number(trl(fields, {}, loss_type="cispo", epsilon_high=default["epsilon"]), grad=[[-0.1, -0.1]])
    is_number(ours("cispo", fields, {}), grad=[[-0.5, -1.5]])


def test_trl_and_liger_delta_cuts_positive_advantages_too():
    """Below 1 + clip_high; the dual clip of the paper is for A < 0 alone."""
    fields = rows([1.25], advantage=[1.0])
    params = PLAIN | {"dual_clip": 1.1}
    for call in (trl, liger):
        is_number(call(fields, params | {"aggregate": "token_mean"}, loss_type="dapo"), loss=-1.1)
    is_number(ours("dapo", fields, params), loss=-1.25, grad=[[-1.25]])


def test_trl_and_liger_count_rows_without_a_token_as_sequences():
    fields = rows([1.0, 1.0], [], advantage=[1.0, 1.0])
    params = PLAIN | {"aggregate": "seq_mean_token_mean"}
    for call in (trl, liger):
        is_number(call(fields, params, loss_type="grpo"), loss=-0.5)
    is_number(verl("vanilla", fields, params | {"dual_clip": 3.0}), loss=-1.0)
    is_number(ours("grpo", fields, params), loss=-1.0)


def test_trl_entropy_is_a_token_mean_under_a_sequence_mean_loss():
    """Entropy 1 on the single token of one row, 0 on the three of the other: half in the policy term's aggregation."""
    fields = rows([1.0] * 3, [1.0], advantage=[0.0, 0.0], entropy=[[0.0] * 3, [1.0] * 3])
    params = PLAIN | {"entropy_coef": 0.1, "aggregate": "seq_mean_token_mean"}
    is_number(trl(fields, params, loss_type="grpo"), loss=-0.1 / 4)
    is_number(ours("grpo", fields, params), loss=-0.1 / 2)


def test_trl_bnpo_depends_on_how_the_batch_is_cut():
    """Rows of 3 tokens with A = 1 and of 1 token with A = −1: −(3 − 1)/4, and 0 as two micro-batches."""
    whole = rows([1.0] * 3, [1.0], advantage=[1.0, -1.0])
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(2)]
    is_number(trl(whole, PLAIN, loss_type="bnpo"), loss=-0.5)
    cut = [trl(part, PLAIN, loss_type="bnpo", current_gradient_accumulation_steps=2) for part in parts]
    assert sum(float(part["loss"]) for part in cut) == pytest.approx(0.0)
    loss, shared = get_loss("dapo", **PLAIN), ls.Normalizer(tokens=4, sequences=2, groups=2)
    assert sum(float(loss(ls.Batch(**part), shared).loss) for part in parts) == pytest.approx(-0.5)


def test_verl_gmpo_ignores_the_shared_normalizer():
    whole = rows([1.1, 1.1], [0.9], advantage=[1.0, 1.0])
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(2)]
    shared = {"global_batch_info": {"dp_size": 1, "batch_num_tokens": 3, "global_batch_size": 2}}
    cut = [verl("geo_mean", part, {}, clip_ratio_low=0.4, clip_ratio_high=0.4, **shared) for part in parts]
    assert sum(float(part["loss"]) for part in cut) == pytest.approx(-2.0)
    is_number(ours("gmpo", whole, {"beta": 0.0}), loss=-1.0)
    loss, normalizer = get_loss("gmpo", beta=0.0), ls.Normalizer(tokens=3, sequences=2, groups=2)
    assert sum(float(loss(ls.Batch(**part), normalizer).loss) for part in parts) == pytest.approx(-1.0)


def test_trl_gmpo_lost_the_ratio_weight_of_the_kl_term():
    fields = rows([1.1], advantage=[0.0], ref_logp=[[-3.0]])
    params = {"clip_low": 0.4, "clip_high": 0.4, "beta": 0.1, "kl_estimator": "k3", "kl_place": "loss"}
    kappa = math.log(1.1) + 1
    k3 = math.exp(-kappa) - 1 + kappa
    is_number(trl(fields, params | {"kl_ratio_weight": True}, "gmpo"), loss=0.1 * k3)
    is_number(ours("gmpo", fields, params | {"kl_ratio_weight": True}), loss=0.1 * 1.1 * k3)


def test_verl_sapo_ignores_the_aggregation_asked_for():
    fields = rows([1.0] * 3, [1.0], advantage=[1.0, -1.0])
    params = {"tau_pos": 1.0, "tau_neg": 1.0, "beta": 0.0}
    for aggregate in ("token_mean", "seq_mean_token_mean"):
        is_number(verl("sapo", fields, params | {"aggregate": aggregate}), loss=0.0)
    is_number(ours("sapo", fields, params | {"aggregate": "seq_mean_token_mean"}), loss=0.0)
    is_number(ours("sapo", fields, params | {"aggregate": "token_mean"}), loss=-2 * (3 - 1) / 4)


def test_verl_icepop_that_keeps_nothing_is_an_error():
    """Its metrics divide by zero; the loss itself is 0."""
    fields = rows([1.0], advantage=[1.0], behavior_logp=[[-5.0]])
    params = {"mismatch": "icepop", "mismatch_level": "token", "mismatch_low": 0.5, "mismatch_high": 2.0}
    with pytest.raises(ZeroDivisionError):
        verl("vanilla", fields, params)
    is_number(ours("ppo", fields, params), loss=0.0, grad=[[0.0]])


def test_verl_k3_is_cut_at_10():
    """κ = −3: k3 = e³ − 4, slope 1 − e³. verl: 10, slope 0."""
    fields = {name: torch.tensor([[value]]).double() for name, value in (("logp", -4.0), ("ref_logp", -1.0))}
    fields["mask"] = torch.tensor([[True]])
    params = {"kl_estimator": "k3", "kl_place": "loss", "beta": 1.0, "kl_straight_through": False}
    params["aggregate"] = "token_mean"
    require("verl")
    with their_ways():
        theirs = live_verl.kl_term(fields, params)
    is_number(theirs, loss=10.0, grad=[[0.0]])
    is_number(ours("kl_only", fields, params), loss=math.exp(3) - 4, grad=[[1 - math.exp(3)]])


def test_verl_gives_a_group_of_one_its_raw_reward_in_some_estimators():
    """grpo, opo, gpg: the reward; vectorized rloo: 0. Lossmith: 0 in all, unless singleton="raw" is asked for."""
    require("verl")
    fields = {"reward": torch.tensor([3.0]).double(), "group": torch.tensor([0]), "mask": torch.tensor([[True]])}
    found = {}
    for name in ("grpo", "opo", "gpg", "rloo_vectorized"):
        with their_ways():
            found[name] = float(live_verl_advantages.estimate(f"{name}_outcome", fields, {})["advantage"])
    assert found == pytest.approx({"grpo": 3.0, "opo": 3.0, "gpg": 3.0, "rloo_vectorized": 0.0}, rel=1e-5)
    for advantage in ("group", "loo", "opo", "gpg"):
        if not unsupported("advantage", {"advantage": advantage}, fields):
            got = lossmith("advantage", fields, {"advantage": advantage, "advantage_scale": "none"})["advantage"]
            assert float(got) == 0.0


def test_verl_whitening_of_equal_advantages_is_not_zero():
    """1e-8 in the denominator of its mean leaves A·1e-8/n, which is divided by a standard deviation of 1e-4."""
    require("verl")
    fields = {"reward": torch.tensor([3.0]).double(), "group": torch.tensor([0]), "mask": torch.tensor([[True, True]])}
    with their_ways():
        found = live_verl_advantages.estimate("reinforce_plus_plus_baseline_outcome", fields, {})["advantage"]
    assert found[0].tolist() == pytest.approx([1e-4 * 3 / 2] * 2, rel=1e-4)
    params = {"advantage": "group", "advantage_scale": "whiten", "singleton": "raw"}
    assert lossmith("advantage", fields, params)["advantage"][0].tolist() == [0.0, 0.0]


def test_verl_clip_cov_draws_from_the_global_generator():
    """So its loss depends on whatever else drew random numbers. Lossmith's choice has its own seed."""
    fields = rows(*[[1.0, 1.1, 1.2, 0.9]] * 3, advantage=[1.0, 3.0, -1.0])
    shift = torch.linspace(-1, 1, 12).double().view(3, 4)
    fields |= {name: fields[name] + shift for name in ("logp", "old_logp")}
    params = PLAIN | {"fraction": 0.05, "cov_low": 0.01, "cov_high": 5.0, "aggregate": "token_mean"}

    def values(call):
        found = set()
        for seed in range(8):
            torch.manual_seed(seed)
            found.add(round(float(call()["loss"]), 9))
        return found

    with torch.random.fork_rng():
        assert len(values(lambda: verl("clip_cov", fields, params))) > 1
        assert len(values(lambda: ours("clip_cov", fields, params))) == 1


def test_what_stands_at_a_masked_position_reaches_the_loss():
    """The mask is multiplied with, and 0 · NaN is NaN. verl selects, under its token mean only."""
    fields = rows([1.0, 1.0], [1.0], advantage=[1.0, 1.0])
    fields["logp"][1, 1] = math.nan
    params = PLAIN | {"aggregate": "token_mean"}
    by_sequence = PLAIN | {"aggregate": "seq_mean_token_mean", "dual_clip": 3.0}
    for theirs in (trl(fields, params, loss_type="dapo"), liger(fields, params), verl("vanilla", fields, by_sequence)):
        assert math.isnan(float(theirs["loss"]))
    is_number(verl("vanilla", fields, params | {"dual_clip": 3.0}), loss=-1.0)
    is_number(ours("dapo", fields, params), loss=-1.0, grad=[[-1 / 3, -1 / 3], [-1 / 3, 0.0]])
    is_number(ours("grpo", fields, PLAIN | {"aggregate": "seq_mean_token_mean"}), loss=-1.0)
