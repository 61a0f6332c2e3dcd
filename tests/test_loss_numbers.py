"""Numbers computed by hand, equivalences between losses, and bugs that other libraries had."""

import math

import pytest
import torch

import lossmith.losses as L
from batches import NAMES, double, evaluate, no_trap_warnings, normal, quiet_loss, random_fields, single_tokens
from lossmith.losses.axes.ratio import RATIO

GRID = [0.05, 0.5, 0.79, 0.81, 0.95, 1.0, 1.1, 1.19, 1.21, 1.5, 2.9, 3.1, 10.0]


def same(a: tuple, b: tuple, rtol: float = 1e-12) -> None:
    """Value and gradient of two (output, gradients) pairs agree."""
    torch.testing.assert_close(a[0].loss, b[0].loss, rtol=rtol, atol=1e-14)
    torch.testing.assert_close(a[1]["logp"], b[1]["logp"], rtol=rtol, atol=1e-14)


def same_gradient(a: tuple, b: tuple, factor: float = 1.0) -> None:
    torch.testing.assert_close(factor * a[1]["logp"], b[1]["logp"], rtol=1e-12, atol=1e-14)


# -- the book's numbers ---------------------------------------------------------------------------------------------


def value_of(name: str, batch: L.Batch, **changes) -> float:
    return float(quiet_loss(name, **changes)(batch).loss)


def test_book_clip_fixture():
    """old = (-1.1, -.9, -1.5, -.1), lp = (-1, -.5, -2, -.1), A = (1, 1, -1, -1), ε = .2."""
    batch = L.Batch(
        logp=[[-1.0, -0.5, -2.0, -0.1]],
        mask=[[1] * 4],
        old_logp=[[-1.1, -0.9, -1.5, -0.1]],
        advantage=[[1.0, 1.0, -1.0, -1.0]],
    )
    assert L.TokenRatio()(batch)[0].tolist() == pytest.approx([1.10517, 1.49182, 0.606531, 1], rel=1e-5)
    assert -value_of("book_clip", batch) == pytest.approx(0.698640, abs=5e-7)
    assert -value_of("ppo", batch, aggregate="seq_mean_token_sum") == pytest.approx(0.505171, abs=5e-7)


def test_utility_and_value_fixture():
    """U_TD = -.44, U_MC = -2.19; the critic's squared TD error, averaged over its four values, is .055."""
    batch = L.Batch(
        logp=[[-1.0, -0.5, -2.0, -0.1]], mask=[[1] * 4], reward=[[0.0, 0.0, 0.0, 1.0]], value=[[0.2, 0.3, 0.5, 0.6]]
    )
    td = quiet_loss("a2c")(batch)
    assert -float(td.terms["policy"]) == pytest.approx(-0.44)
    assert -value_of("a2c", batch, advantage="mc", value_coef=0) == pytest.approx(-2.19)
    # the term is ½·(error)²: twice it, with coefficient 1 and the mean over tokens, is the book's L_v
    mean = quiet_loss("a2c", value_coef=1.0, aggregate="token_mean")(batch)
    assert 2 * float(mean.terms["value"]) == pytest.approx(0.055)
    assert float(td.terms["value"]) == pytest.approx(0.5 * 0.5 * 4 * 0.055)
    # and its target is not differentiated: the slope is coef·(V - G), G = r + V_next
    value = double([[0.2, 0.3, 0.5, 0.6]]).requires_grad_()
    out = quiet_loss("a2c", value_coef=1.0)(batch.replace(value=value))
    out.loss.backward()
    assert value.grad[0].tolist() == pytest.approx([-0.1, -0.2, -0.1, -0.4])


def test_clipped_value_loss():
    """½ max((V - G)², (clip(V, V_old ± c) - G)²), token by token."""
    v, old, target = [2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.5, 0.0]
    batch = L.Batch(
        logp=[[-1.0] * 4], mask=[[1] * 4], advantage=[[0.0] * 4], value=[v], old_value=[old], returns=[target]
    )
    near = [1.5, 0.5, 1.0, 0.5]
    expected = sum(0.5 * max((a - g) ** 2, (b - g) ** 2) for a, b, g in zip(v, near, target, strict=True))
    loss = quiet_loss("ppo", value_coef=1.0, value_clip=0.5, aggregate="token_sum")
    assert float(loss(batch).terms["value"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "book", "ppo", "ppo_slope"),
    [(0.5, -1.0, -0.5, -0.8, 0.0), (1.5, -1.0, -1.2, -1.5, 1.5), (0.5, 1.0, 0.5, 0.5, 0.5), (1.5, 1.0, 1.2, 1.2, 0.0)],
)
def test_book_clip_and_ppo_by_number(ratio, advantage, book, ppo, ppo_slope):
    fields = single_tokens([ratio], advantage)
    got, grads = evaluate(quiet_loss("book_clip"), fields)
    assert -float(got.loss.detach()) == pytest.approx(book)
    assert float(grads["logp"]) == pytest.approx(0.0 if ratio > 1.2 else -advantage * ratio)
    got, grads = evaluate(quiet_loss("ppo"), fields)
    assert -float(got.loss.detach()) == pytest.approx(ppo)
    assert float(grads["logp"]) == pytest.approx(-advantage * ppo_slope)


# -- equivalences (losses.md, section 5) ----------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.3, -2.0])
def test_dual_clip_is_two_sided_delta(advantage):
    """TRL's delta bounds the unclipped ratio; dual clip bounds the loss: the same value and gradient."""
    fields = single_tokens(GRID, advantage)
    leaf = fields["logp"].clone().requires_grad_()
    r = (leaf - fields["old_logp"]).exp()
    ell = -torch.min(r.clamp(max=3.0) * advantage, r.clamp(0.8, 1.2) * advantage)
    out, grads = evaluate(quiet_loss("ppo", dual_clip=3), fields)
    torch.testing.assert_close(out.loss, ell.mean())
    torch.testing.assert_close(grads["logp"], torch.autograd.grad(ell.mean(), leaf)[0])


@pytest.mark.parametrize("drift", [0.3, 0.001])
def test_gspo_and_its_token_form_agree_for_one_advantage_a_completion(drift):
    fields = random_fields(0, drift)
    same(*(evaluate(quiet_loss("gspo", ratio_level=level), fields) for level in ("sequence", "sequence_token")))


AT_RATIO_ONE = {
    "ppo": {},
    "grpo": {"beta": 0},
    "dapo": {"group_filter": "none"},
    "dr_grpo": {},
    "cispo": {},
    "gspo": {"aggregate": "seq_mean_token_mean"},
    "gspo ": {"ratio_level": "sequence_token"},
    "reinforce": {"trust": "none"},
    "reinforce ": {"trust": "truncate"},
    "reinforce_pp": {"beta": 0},
    "rloo": {"beta": 0},
    "book_clip": {},
}


@pytest.mark.parametrize("label", AT_RATIO_ONE)
def test_without_an_old_policy_the_gradient_is_that_of_reinforce(label):
    loss = quiet_loss(label.strip(), **AT_RATIO_ONE[label])
    fields = random_fields(0) | {"advantage": normal(0, 9)}
    del fields["old_logp"]
    factor = double([[1.0]])
    if isinstance(loss.ratio_level, L.SequenceSumRatio):  # one number a completion: its mean over T tokens
        factor = fields["mask"].sum(1, keepdim=True).double()
    plain = evaluate(quiet_loss("reinforce").replace(aggregate=loss.aggregate), fields)
    torch.testing.assert_close(plain[1]["logp"] * factor, evaluate(loss, fields)[1]["logp"], rtol=1e-12, atol=1e-14)


def test_leave_one_out_is_the_centered_reward_rescaled():
    reward = normal(0, 6).tolist()
    batch = L.Batch(mask=[[1]] * 6, reward=reward, group=[0, 0, 1, 1, 1, 1])
    loo, group = (quiet_loss("reinforce", advantage=a).credit(batch).advantage[:, 0] for a in ("loo", "group"))
    torch.testing.assert_close(loo, group * double([2, 2, 4 / 3, 4 / 3, 4 / 3, 4 / 3]))


def test_aggregations_that_coincide():
    fields = random_fields(0)
    equal = fields | {"mask": torch.arange(8) < torch.full((9, 1), 5)}
    same(*(evaluate(quiet_loss("grpo", aggregate=a), equal) for a in ("token_mean", "seq_mean_token_mean")))
    even = equal | {"group": torch.tensor([4, 4, 1, 1, 4, 1, 8, 8, 8])}
    same(*(evaluate(quiet_loss("grpo", aggregate=a), even) for a in ("token_mean", "prompt_mean")))
    plain = evaluate(quiet_loss("grpo", aggregate="seq_mean_token_sum"), fields)
    norm = evaluate(quiet_loss("grpo", aggregate="seq_mean_token_sum_norm", max_length=50), fields)
    torch.testing.assert_close(plain[0].loss, 50 * norm[0].loss)
    same_gradient(norm, plain, 50)


@pytest.mark.parametrize("level", RATIO)
def test_bounds_at_infinity_are_importance_sampling(level):
    fields = random_fields(0, drift=1.0)
    free = quiet_loss("grpo", ratio_level=level, trust="none")
    same(
        evaluate(quiet_loss("grpo", ratio_level=level, clip_low=1, clip_high=math.inf), fields), evaluate(free, fields)
    )


def test_cispo_without_a_cap_has_the_gradient_of_importance_sampling():
    fields = random_fields(0, drift=1.0)
    same_gradient(
        evaluate(quiet_loss("cispo", cap=math.inf), fields), evaluate(quiet_loss("cispo", trust="none"), fields)
    )
    same(evaluate(quiet_loss("cispo", cap=1), fields), evaluate(quiet_loss("cispo", trust="truncate"), fields))


def test_gae_at_its_ends():
    fields = random_fields(0)
    batch = L.Batch(**fields)

    def advantage(**changes) -> torch.Tensor:
        return quiet_loss("reinforce", **changes).credit(batch).advantage

    torch.testing.assert_close(advantage(advantage="gae", lam=0, gamma=0.9), advantage(advantage="td", gamma=0.9))
    torch.testing.assert_close(advantage(advantage="gae", lam=1, gamma=1), advantage(advantage="mc"))


def test_k2_is_straight_through_k3_in_gradient():
    fields = random_fields(0)
    same_gradient(
        evaluate(quiet_loss("grpo", kl_estimator="k2"), fields),
        evaluate(quiet_loss("grpo", kl_estimator="k3", kl_straight_through=True), fields),
    )


def test_book_clip_is_ppo_for_improving_actions_only():
    for advantage in (0.0, 0.5, 2.0):
        fields = single_tokens(GRID, advantage)
        same(*(evaluate(quiet_loss(n, aggregate="token_sum"), fields) for n in ("ppo", "book_clip")))
    worse = single_tokens(GRID, -1.0)
    ppo, book = (evaluate(quiet_loss(n, aggregate="token_sum"), worse)[1]["logp"] for n in ("ppo", "book_clip"))
    assert not torch.allclose(ppo, book)


def test_decoupled_ppo_is_ppo_where_the_sampler_is_the_old_policy():
    fields = random_fields(0)
    decoupled = quiet_loss("decoupled_ppo")
    on = fields | {"behavior_logp": fields["old_logp"]}
    same(evaluate(decoupled, on), evaluate(quiet_loss("ppo"), fields))
    weights = decoupled.credit(L.Batch(**fields)).mismatch[fields["mask"]]
    torch.testing.assert_close(weights, (fields["old_logp"] - fields["behavior_logp"]).exp()[fields["mask"]])


# Losses with a part that does not follow the advantage, or that is chosen by its size.
NOT_LINEAR = {"dro", "kimi_opmd", "clip_cov", "kl_cov"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_LINEAR])
def test_scaling_a_positive_advantage_scales_the_loss(name):
    """Branches depend on the sign of A only."""
    with no_trap_warnings():
        loss = quiet_loss(name, beta=0).replace(extra=L.NoExtra())
    fields = random_fields(0) | {"advantage": normal(1, 9)}
    one, three = evaluate(loss, fields), evaluate(loss, fields | {"advantage": 3 * fields["advantage"]})
    torch.testing.assert_close(3 * one[0].terms["policy"], three[0].terms["policy"], rtol=1e-12, atol=1e-14)
    same_gradient(one, three, 3)


def test_luspo_is_gspo_with_each_completion_weighted_by_its_length():
    fields = random_fields(0, 0.001)
    gspo, luspo = quiet_loss("gspo"), quiet_loss("luspo")
    lengths = fields["mask"].sum(1, keepdim=True)
    torch.testing.assert_close(
        evaluate(gspo, fields)[1]["logp"] * lengths, evaluate(luspo, fields)[1]["logp"], rtol=1e-12, atol=1e-14
    )


# -- mismatch correction, by hand -----------------------------------------------------------------------------------

RHO = [[0.6, 1.0, 3.0, 8.0], [1.2, 0.9, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mismatch": "none"}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"mismatch": "tis"}, [[0.6, 1, 2, 2], [1.2, 0.9, 1, 1]]),
        ({"mismatch": "tis", "mismatch_low": 0.8}, [[0.8, 1, 2, 2], [1.2, 0.9, 1, 1]]),
        ({"mismatch": "tis", "mismatch_level": "sequence", "mismatch_high": 100}, [[14.4] * 4, [1.08] * 4]),
        ({"mismatch": "tis", "mismatch_level": "geometric"}, [[14.4**0.25] * 4, [1.08**0.25] * 4]),
        ({"mismatch": "icepop"}, [[0.6, 1, 3, 0], [1.2, 0.9, 1, 1]]),
        ({"mismatch": "icepop", "mismatch_level": "sequence"}, [[0] * 4, [1.08] * 4]),
        ({"mismatch": "gate", "mismatch_high": 5}, [[0] * 4, [1.2, 0.9, 1, 1]]),
        ({"mismatch": "gate", "mismatch_high": 5, "mismatch_weighted": False}, [[0] * 4, [1] * 4]),
        ({"mismatch": "gate", "mismatch_level": "token", "mismatch_high": 2}, [[0.6, 1, 0, 0], [1.2, 0.9, 1, 1]]),
    ],
)
def test_mismatch_weights(changes, expected):
    """Dropped tokens stay in the normalizer."""
    old = torch.full((2, 4), -4.0).double()
    batch = L.Batch(
        logp=old, mask=[[1] * 4, [1] * 4], old_logp=old, behavior_logp=old - double(RHO).log(), advantage=[1.0, 1.0]
    )
    credit = quiet_loss("ppo", **changes).credit(batch)
    torch.testing.assert_close(credit.mismatch, double(expected))
    assert credit.weight.tolist() == [[1 / 8] * 4] * 2


def test_gates_by_distance():
    mu, old = 0.5, 0.4
    tv, kl = 0.1, 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    batch = L.Batch(
        logp=[[math.log(old)]],
        mask=[[1]],
        old_logp=[[math.log(old)]],
        behavior_logp=[[math.log(mu)]],
        advantage=[1.0],
    )
    for stat, size in (("tv", tv), ("binary_kl", kl)):
        for bound, kept in ((size * 1.001, old / mu), (size * 0.999, 0.0)):
            loss = quiet_loss("ppo", mismatch="gate", mismatch_stat=stat, mismatch_high=bound)
            assert float(loss.credit(batch).mismatch) == pytest.approx(kept), (stat, bound)


# -- bugs that other libraries had (losses.md, section 9) -----------------------------------------------------------

ONES = {"logp": -torch.ones(2, 3).double(), "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()}


def mean_of_ones(aggregate: str, **changes) -> float:
    """Aggregate of ℓ = 1 at every valid token of lengths 2 and 1."""
    batch = L.Batch(**ONES, advantage=[1.0, 1.0], group=[0, 1])
    return float(quiet_loss("reinforce", aggregate=aggregate, **changes)(batch).loss)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("token_mean", 1.0),
        ("seq_mean_token_mean", 1.0),
        ("seq_mean_token_sum", 1.5),
        ("seq_mean_token_sum_norm", 1.5 / 8),  # N and the constant length, not the length alone
        ("token_sum", 3.0),
        ("prompt_mean", 1.0),
    ],
)
def test_aggregates_of_ones(aggregate, expected):
    assert mean_of_ones(aggregate) == pytest.approx(expected)


def test_dr_grpo_divides_by_a_constant_not_by_the_longest_row():
    fields = random_fields(0)
    ends = {2: (0, 30), 3: (0, 0, 0, 30)}
    wide = {k: torch.nn.functional.pad(v, ends[v.ndim]) if v.ndim > 1 else v for k, v in fields.items()}
    loss = quiet_loss("dr_grpo", max_length=64)
    torch.testing.assert_close(loss(L.Batch(**fields)).loss, loss(L.Batch(**wide)).loss)


def test_local_normalizers_would_break_micro_batches_and_the_shared_one_does_not():
    fields = random_fields(0)
    loss = quiet_loss("dapo", shaping=[], group_filter="none")
    full = float(loss(L.Batch(**fields)).loss)
    fields["advantage"] = loss.credit(L.Batch(**fields)).advantage
    halves = [L.Batch(**{k: v[part] for k, v in fields.items()}) for part in (slice(0, 2), slice(2, 9))]
    local = sum(float(loss(half).loss) for half in halves) / 2
    shared = sum(float(loss(half, L.Normalizer.of(fields["mask"], fields["group"])).loss) for half in halves)
    assert shared == pytest.approx(full, rel=1e-12) and abs(local - full) > 1e-3


def test_cispo_does_not_raise_small_ratios_unless_asked():
    assert float(quiet_loss("cispo").weight(0.1, 1.0)) == pytest.approx(0.1)
    assert float(quiet_loss("cispo", clip_low=0).weight(0.1, 1.0)) == 1.0


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(quiet_loss(n).trust, L.Clip)])
def test_one_symmetric_clip_sets_both_bounds(name):
    loss = quiet_loss(name, clip=0.01)
    assert (loss.trust.low, loss.trust.high) == (0.01, 0.01)
    assert (float(loss.weight(1.02, 1.0)), float(loss.weight(0.98, -1.0))) == (0, 0)


def test_one_symmetric_clip_is_refused_where_it_would_not_take_effect():
    for name in ("reinforce", "cispo", "book_clip"):
        with pytest.raises(L.LossError, match="clip_low and clip_high"):
            quiet_loss(name, clip=0.1)
    with pytest.raises(L.LossError, match="either"):
        quiet_loss("ppo", clip=0.1, clip_high=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_no_random_number_is_drawn(name):
    """Nothing depends on, or moves, the global generator."""
    fields, loss = random_fields(0), quiet_loss(name)
    before = torch.get_rng_state()
    first = evaluate(loss, fields)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    second = evaluate(loss, fields)
    torch.set_rng_state(before)
    assert torch.equal(first[0].loss, second[0].loss) and torch.equal(first[1]["logp"], second[1]["logp"])


def test_metrics_against_plain_loops():
    """Each reported number recomputed from the batch."""
    fields = random_fields(6)
    loss = quiet_loss("grpo", aggregate="token_mean")
    got = loss(L.Batch(**fields)).metrics
    mask = fields["mask"]
    ratio = (fields["logp"] - fields["old_logp"]).exp()[mask]
    advantage = loss.credit(L.Batch(**fields)).advantage[mask]
    stopped = torch.where(advantage >= 0, ratio > 1.2, ratio < 0.8)
    assert got["ratio"] == pytest.approx(float(ratio.mean()))
    assert got["clip_fraction"] == pytest.approx(float(stopped.double().mean()))
    assert 0 < got["clip_fraction"] < 1
    for key, below in (("kl_old", "old_logp"), ("kl_ref", "ref_logp")):
        kappa = (fields["logp"] - fields[below])[mask]
        assert got[key] == pytest.approx(float(((-kappa).exp() - 1 + kappa).mean()))
    assert got["entropy"] == pytest.approx(float(fields["entropy"][mask].mean()))
    assert got["advantage_abs"] == pytest.approx(float(advantage.abs().mean()))
    live = mask.any(1)
    assert got["performance_loss"] == pytest.approx(-float(fields["reward"][live].mean()))
    assert (got["tokens"], got["completions"]) == (float(mask.sum()), float(live.sum()))
    assert (got["groups"], got["constant_groups"]) == (4.0, 1.0)  # the group of one has no signal
