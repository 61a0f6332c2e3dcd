"""The KL term: values, slopes, where it acts, and how its coefficient moves. Expected gradients: test_loss_exact.py."""

import math

import pytest
import torch

import lossmith.losses as L
from batches import double, evaluate, quiet_loss, random_fields
from lossmith.losses.axes.kl import kl_slope

KAPPA = double([-1.3, -0.2, 0.4, 2.0])


def term_and_slope(estimator: str, kappa: torch.Tensor = KAPPA, ratio: torch.Tensor | None = None, **kl) -> tuple:
    """(value, d/dlogp) of the KL term of single tokens, β = 1, policy term zero."""
    loss = quiet_loss("reinforce", trust="none", aggregate="token_sum", beta=1.0, kl_estimator=estimator, **kl)
    logp = torch.full((len(kappa), 1), -2.0, dtype=torch.float64, requires_grad=True)
    old = None if ratio is None else logp.detach() - ratio.log()[:, None]
    zero = torch.zeros(len(kappa), dtype=torch.float64)
    batch = L.Batch(logp, torch.ones(len(kappa), 1).bool(), old_logp=old, ref_logp=-2 - kappa[:, None], advantage=zero)
    out = loss(batch)
    return float(out.loss.detach()), torch.autograd.grad(out.loss, logp)[0][:, 0]


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda k: k, lambda k: 1.0),
        ("k2", lambda k: k * k / 2, lambda k: k),
        ("k3", lambda k: math.exp(-k) - 1 + k, lambda k: 1 - math.exp(-k)),
        ("abs", abs, lambda k: math.copysign(1, k)),
    ],
)
def test_values_and_slopes(estimator, value, slope):
    got, grad = term_and_slope(estimator)
    assert got == pytest.approx(sum(value(k) for k in KAPPA.tolist()), rel=1e-12)
    assert grad.tolist() == pytest.approx([slope(k) for k in KAPPA.tolist()], rel=1e-12)
    torch.testing.assert_close(grad, kl_slope(KAPPA, estimator))
    # straight through: that value, the gradient of k2
    got, grad = term_and_slope(estimator, kl_straight_through=True)
    assert got == pytest.approx(sum(value(k) for k in KAPPA.tolist()), rel=1e-12)
    torch.testing.assert_close(grad, KAPPA, rtol=1e-12, atol=1e-14)
    # by the ratio: product rule
    ratio = double([0.5, 1.0, 1.7, 3.0])
    got, grad = term_and_slope(estimator, ratio=ratio, kl_ratio_weight=True)
    pairs = list(zip(KAPPA.tolist(), ratio.tolist(), strict=True))
    assert got == pytest.approx(sum(r * value(k) for k, r in pairs), rel=1e-12)
    assert grad.tolist() == pytest.approx([r * (value(k) + slope(k)) for k, r in pairs], rel=1e-12)


def test_the_ratio_that_weights_the_kl_is_not_clipped():
    """The policy term may be cut off by the clip; the KL beside it is not."""
    fields = random_fields(0, drift=1.0) | {"advantage": torch.zeros(9, dtype=torch.float64)}
    free, clipped = (
        quiet_loss("grpo", trust=t, beta=0.5, kl_ratio_weight=True, aggregate="token_mean") for t in ("none", "clip")
    )
    torch.testing.assert_close(evaluate(free, fields)[1]["logp"], evaluate(clipped, fields)[1]["logp"])


def test_k3_far_out_is_finite():
    """κ = -50: the exponent is held at 20; the value keeps its linear part, the gradient of e^(-κ) is cut."""
    value, grad = term_and_slope("k3", double([-50.0]))
    assert value == pytest.approx(math.exp(20) - 1 - 50) and grad.tolist() == [1.0]
    value, grad = term_and_slope("k3", double([50.0]))
    assert value == pytest.approx(49 + math.exp(-20)) and float(grad) == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_reference_of_minus_infinity_at_a_masked_token(estimator, place):
    loss = quiet_loss("grpo", beta=0.1, kl_estimator=estimator, kl_place=place)
    fields = random_fields(0)
    ref = fields["ref_logp"].masked_fill(~fields["mask"], -math.inf)
    clean, grads = evaluate(loss, fields)
    sick, sick_grads = evaluate(loss, fields | {"ref_logp": ref})
    assert torch.equal(clean.loss, sick.loss) and torch.equal(grads["logp"], sick_grads["logp"])


def test_in_the_reward_by_the_books_numbers():
    """lp = (-1, -.5, -2, -.1), ref = (-1.2, -.4, -1, -.3), β = .1, R = 1: rewards (-.02, .01, .1, .98)."""
    lp, ref = [[-1.0, -0.5, -2.0, -0.1]], [[-1.2, -0.4, -1.0, -0.3]]
    loss = quiet_loss(
        "reinforce", advantage="return", gamma=0.0, beta=0.1, kl_estimator="k1", kl_place="reward"
    )  # a discount of 0 shows each token's own reward
    batch = L.Batch(logp=lp, mask=[[1] * 4], ref_logp=ref, reward=[1.0])
    assert loss.credit(batch).advantage[0].tolist() == pytest.approx([-0.02, 0.01, 0.1, 0.98], abs=1e-12)
    # the literal penalty in the loss: Σ (lp - ref) = -.7
    plain = quiet_loss("book_ppo_clip", beta=1.0)
    assert float(plain(batch.replace(reward=torch.zeros(1).double())).loss) == pytest.approx(-0.7)


def test_in_the_reward_it_is_the_old_policy_that_pays():
    """Detached, at the policy that sampled: the update itself does not move its own reward."""
    fields = random_fields(1)
    loss = quiet_loss("rloo")
    credit = loss.credit(L.Batch(**fields))
    moved = loss.credit(L.Batch(**(fields | {"logp": fields["logp"] - 1})))
    assert torch.equal(credit.advantage, moved.advantage)
    moved = loss.credit(L.Batch(**(fields | {"old_logp": fields["old_logp"] - 1})))
    assert not torch.equal(credit.advantage, moved.advantage)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_in_the_reward_every_estimator_is_subtracted_before_the_advantage(estimator):
    fields = random_fields(2)
    loss = quiet_loss("reinforce", advantage="raw", beta=0.3, kl_estimator=estimator, kl_place="reward")
    kappa = fields["old_logp"] - fields["ref_logp"]
    penalty = (L.kl_estimate(kappa, estimator) * fields["mask"]).sum(1)
    expected = (fields["reward"] - 0.3 * penalty)[:, None] * fields["mask"]
    torch.testing.assert_close(loss.credit(L.Batch(**fields)).advantage, expected, rtol=1e-12, atol=1e-14)


def test_full_kl_is_taken_as_given():
    fields = random_fields(3) | {"advantage": torch.zeros(9, dtype=torch.float64)}
    loss = quiet_loss("reinforce", aggregate="token_mean", beta=0.3, kl_estimator="full")
    out, grads = evaluate(loss, fields)
    mask = fields["mask"]
    assert float(out.loss.detach()) == pytest.approx(0.3 * float(fields["full_kl"][mask].mean()))
    torch.testing.assert_close(grads["full_kl"], 0.3 * mask.double() / mask.sum())
    assert "ref_logp" not in loss.needs and "full_kl" in loss.needs


def test_mismatch_weights_and_trust_regions_do_not_touch_the_kl():
    """Masks and weights multiply the policy term only."""
    fields = random_fields(4, drift=1.0)
    plain = quiet_loss("grpo", entropy_coef=0.1)(L.Batch(**fields)).terms
    for changes in (
        {"mismatch": "tis", "mismatch_high": 0.5},
        {"mismatch": "gate", "mismatch_low": 3.0, "mismatch_high": 4.0},
        {"mismatch": "icepop", "mismatch_level": "sequence"},
        {"clip_low": 0.0, "clip_high": 0.0},
    ):
        terms = quiet_loss("grpo", entropy_coef=0.1, **changes)(L.Batch(**fields)).terms
        assert torch.equal(terms["kl"], plain["kl"]) and torch.equal(terms["entropy"], plain["entropy"])
        assert not torch.equal(terms["policy"], plain["policy"])


@pytest.mark.parametrize("aggregate", ["seq_mean_token_mean", "seq_mean_token_sum", "token_mean", "prompt_mean"])
def test_kl_and_entropy_are_aggregated_like_the_policy_term(aggregate):
    fields = random_fields(5) | {"advantage": torch.zeros(9, dtype=torch.float64)}
    loss = quiet_loss("grpo", aggregate=aggregate, beta=0.5, kl_estimator="k2", entropy_coef=0.25)
    batch = L.Batch(**fields)
    terms, weight = loss(batch).terms, loss.credit(batch).weight
    kappa = batch.logp - batch.ref_logp
    assert float(terms["kl"]) == pytest.approx(0.5 * float((weight * kappa**2 / 2).sum()))
    assert float(terms["entropy"]) == pytest.approx(-0.25 * float((weight * batch.entropy).sum()))
    if aggregate in ("seq_mean_token_mean", "token_mean", "prompt_mean"):
        assert float(weight.sum()) == pytest.approx(1.0)


def test_adaptive_coefficient():
    """arXiv:1909.08593, section 2.2: proportional to the error, the error held within ±.2."""
    kl = L.KL(0.1, "k1", "reward", control="adaptive", target=6.0, horizon=100.0)
    assert L.adapt_coefficient(kl, 6.0, 10).beta == pytest.approx(0.1)
    assert L.adapt_coefficient(kl, 6.6, 10).beta == pytest.approx(0.1 * 1.01)
    assert L.adapt_coefficient(kl, 600.0, 10).beta == pytest.approx(0.1 * 1.02)
    assert L.adapt_coefficient(kl, 0.0, 10).beta == pytest.approx(0.1 * 0.98)
    fixed = L.KL(0.1)
    assert L.adapt_coefficient(fixed, 600.0, 10) is fixed


def test_the_listing_of_a_straight_through_term_asks_for_nothing_that_only_its_comment_names():
    listing = L.get_loss("grpo", kl_straight_through=True).code()
    assert "# its value" in listing and "value" not in listing.partition("\n")[0]
