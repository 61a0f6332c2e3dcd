"""Losses of preferences against the book's fixture, formulas typed by hand, and the optimum that theory promises."""

import itertools
import math

import pytest
import torch

import lossmith.losses as L
from batches import double, evaluate, quiet_loss, random_fields
from lossmith.proofs import bias, check_loss, default_world, group_gradients
from lossmith.proofs.scenarios import normalized

PAIRED = ["dpo", "cdpo", "robust_dpo", "ipo", "ipo@trl", "dpo_hinge", "slic", "cpo", "simpo", "orpo"]
FREE = ["slic", "cpo", "simpo", "orpo"]  # of a reference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def two_pairs(**more):
    """Two pairs (rows 0 > 1, 3 > 2) of ragged completions; (batch, log-probabilities, reference's, lengths)."""
    lengths = [3, 2, 1, 4]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(4)
    logp, ref = (-0.1 - 2 * torch.rand(4, 4, generator=draw).double() for _ in range(2))
    fields = {"reward": double([1, 0, 0, 1]), "group": torch.tensor([0, 0, 1, 1]), "ref_logp": ref, **more}
    totals = ((x * mask).sum(1).tolist() for x in (logp, ref))
    return L.Batch(logp, mask, **fields), *totals, lengths


def of_pairs(f):
    """The mean of f(log p_w, log p_l, ref_w, ref_l, T_w, T_l) over the two pairs."""
    _, p, q, t = two_pairs()
    return sum(f(p[w], p[x], q[w], q[x], t[w], t[x]) for w, x in ((0, 1), (3, 2))) / 2


def value(name, batch=None, **changes):
    return float(L.get_loss(name, **changes)(batch or two_pairs()[0]).loss)


def test_the_fixture_of_the_book():
    """π = (-10, -12), π_ref = (-11, -11.5), β = 0.1: margin 0.15, loss 0.620957."""
    batch = L.Batch(
        double([[-10], [-12]]), torch.ones(2, 1).bool(), ref_logp=double([[-11], [-11.5]]),
        reward=double([1, 0]), group=torch.tensor([0, 0]),
    )  # fmt: skip
    out = L.get_loss("dpo")(batch)
    assert float(out.loss) == pytest.approx(0.620957, abs=5e-7)
    assert 0.1 * out.metrics["margin"] == pytest.approx(0.15)
    assert out.metrics["accuracy"] == 1 and out.metrics["chosen_log_ratio"] == pytest.approx(1)
    assert out.metrics["rejected_log_ratio"] == pytest.approx(-0.5) and out.metrics["chosen_logp"] == -10


def test_dpo_and_what_is_made_of_its_margin():
    def d(p, x, q, y):
        return (p - q) - (x - y)

    assert value("dpo", beta=0.3) == pytest.approx(of_pairs(lambda p, x, q, y, *_: -log_sigmoid(0.3 * d(p, x, q, y))))
    smoothed = of_pairs(
        lambda p, x, q, y, *_: -0.9 * log_sigmoid(0.1 * d(p, x, q, y)) - 0.1 * log_sigmoid(-0.1 * d(p, x, q, y))
    )
    assert value("cdpo") == pytest.approx(smoothed)
    robust = of_pairs(
        lambda p, x, q, y, *_: (-0.8 * log_sigmoid(0.1 * d(p, x, q, y)) + 0.2 * log_sigmoid(-0.1 * d(p, x, q, y))) / 0.6
    )
    assert value("robust_dpo", flip=0.2) == pytest.approx(robust)
    assert value("ipo", beta=0.4) == pytest.approx(of_pairs(lambda p, x, q, y, *_: (d(p, x, q, y) - 1.25) ** 2))
    hinge = of_pairs(lambda p, x, q, y, *_: max(0.0, 1 - 0.5 * d(p, x, q, y)))
    assert value("dpo_hinge", beta=0.5) == pytest.approx(hinge)


def test_ipo_as_trl_computes_it():
    """chosen_avg_score = Σ log-ratio / tokens; (chosen_avg_score - rejected_avg_score - 1/(2β))²."""
    expected = of_pairs(lambda p, x, q, y, t, u: ((p - q) / t - (x - y) / u - 5) ** 2)
    assert value("ipo@trl") == pytest.approx(expected)


def test_losses_without_a_reference():
    for name in FREE:
        assert "ref_logp" not in L.get_loss(name).needs
    simpo = of_pairs(lambda p, x, q, y, t, u: -log_sigmoid(2 * p / t - 2 * x / u - 0.7))
    assert value("simpo", beta=2.0, target_margin=0.7) == pytest.approx(simpo)
    cpo = of_pairs(lambda p, x, *_: -log_sigmoid(0.2 * (p - x)) - p)
    assert value("cpo", beta=0.2) == pytest.approx(cpo)
    slic = of_pairs(lambda p, x, *_: max(0.0, 1.5 - p + x) - 0.3 * p)
    assert value("slic", delta=1.5, nll_coef=0.3) == pytest.approx(slic)

    def log_odds(mean):
        return math.log(math.exp(mean) / (1 - math.exp(mean)))

    orpo = of_pairs(lambda p, x, q, y, t, u: -p / t - 0.4 * log_sigmoid(log_odds(p / t) - log_odds(x / u)))
    assert value("orpo", odds_coef=0.4) == pytest.approx(orpo)


def test_a_completion_that_is_certain_has_finite_odds():
    logp = torch.zeros(2, 1).requires_grad_()
    fields = {"reward": torch.tensor([1.0, 0.0]), "group": torch.tensor([0, 0])}
    loss = L.get_loss("orpo")(L.Batch(logp, torch.ones(2, 1).bool(), **fields)).loss
    loss.backward()
    assert math.isfinite(float(loss.detach())) and torch.isfinite(logp.grad).all()


def test_kto_by_hand():
    batch, p, q, _ = two_pairs(mismatched_log_ratio=double([0.5, -0.1, 0.9, 0.3]))
    z, total = 0.4, 0.0
    for i, good in enumerate([True, False, False, True]):
        x = 0.6 * (p[i] - q[i] - z)
        total += 1.5 * (1 - sigmoid(x)) if good else 0.8 * (1 - sigmoid(-x))
    assert value("kto", batch, beta=0.6, lam_d=1.5, lam_u=0.8) == pytest.approx(total / 4)
    below = batch.replace(mismatched_log_ratio=double([-1, -1, -1, 0.2]))
    assert L.get_loss("kto")(below).metrics["reference_point"] == 0


def test_the_label_of_a_pair_may_be_a_probability_with_a_weight():
    given = {"pair_probability": double([0.9, 0, 0, 0.6]), "pair_weight": double([1, 0, 0, 0.5])}
    batch, p, q, _ = two_pairs(**given)
    margins = [p[0] - q[0] - p[1] + q[1], p[3] - q[3] - p[2] + q[2]]
    each = [
        -a * log_sigmoid(0.1 * d) - (1 - a) * log_sigmoid(-0.1 * d) for a, d in zip((0.9, 0.6), margins, strict=True)
    ]
    assert value("dpo", batch, labels="given") == pytest.approx((each[0] + 0.5 * each[1]) / 1.5)
    assert L.get_loss("dpo", labels="given")(batch).metrics["units"] == 1.5
    with pytest.raises(L.LossError, match="pair_weight"):
        value("dpo", labels="given")


def test_certain_labels_given_are_the_labels_of_the_rewards():
    for name in PAIRED:
        fields = random_fields(0) | {"pair_probability": torch.ones(9).double(), "pair_weight": torch.ones(9).double()}
        plain, grads = evaluate(quiet_loss(name), fields)
        given, more = evaluate(quiet_loss(name, labels="given"), fields)
        torch.testing.assert_close(given.loss, plain.loss)
        torch.testing.assert_close(more["logp"], grads["logp"])


@pytest.mark.parametrize("name", PAIRED)
def test_given_labels_pass_every_proof(name):
    check_loss(quiet_loss(name, labels="given"), seeds=(0,))


def test_a_soft_label_is_reached_not_exceeded():
    """-p ln σ(βd) - (1-p) ln σ(-βd) is least where σ(βd) = p."""
    term = L.OnlineDPO(beta=0.5, labels="given")
    p, d = 0.8, math.log(0.8 / 0.2) / 0.5
    margin = double([d])
    slope = p * term.of_margin_slope(margin) - (1 - p) * term.of_margin_slope(-margin)
    assert float(slope) == pytest.approx(0, abs=1e-15)


def test_robust_dpo_is_dpo_in_expectation_over_flips():
    clean, robust = L.OnlineDPO(beta=0.7), L.RobustDPO(beta=0.7, flip=0.3)
    d = torch.linspace(-5, 5, 11).double()
    torch.testing.assert_close(0.7 * robust.of_margin(d) + 0.3 * robust.of_margin(-d), clean.of_margin(d))


@pytest.mark.parametrize(("name", "key"), [("dpo", "label_smoothing"), ("robust_dpo", "flip")])
def test_labels_that_are_wrong_half_the_time_are_refused(name, key):
    with pytest.raises(L.LossError, match=r"must be below 0\.5"):
        L.get_loss(name, **{key: 0.5})


def fitted(name, reward, ref, probability, **changes):
    """The policy [S] that minimizes the loss over all pairs of S completions, each as likely as under ref."""
    pairs = list(itertools.combinations(range(len(ref)), 2))
    rows = torch.tensor(pairs).flatten()
    fields = {
        "ref_logp": ref.log()[rows][:, None],
        "reward": double([1, 0]).repeat(len(pairs)),
        "group": torch.arange(len(pairs)).repeat_interleave(2),
        "pair_probability": double([probability(reward[i] - reward[j]) for i, j in pairs]).repeat_interleave(2),
        "pair_weight": torch.stack([ref[i] * ref[j] for i, j in pairs]).repeat_interleave(2),
    }
    theta = torch.zeros(len(ref)).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    loss = L.get_loss(name, labels="given", **changes)

    def closure():
        optimizer.zero_grad()
        found = loss(L.Batch(theta.log_softmax(0)[rows][:, None], torch.ones(len(rows), 1).bool(), **fields)).loss
        found.backward()
        return found

    optimizer.step(closure)
    return theta.detach().softmax(0)


def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward():
    """On all pairs, judged as Bradley and Terry judge by r: π* = π_ref exp(r/β)/Z (book eq. 4.76)."""
    reward, ref = [0.3, -0.4, 1.0, 0.1, -1.2], double([0.1, 0.3, 0.05, 0.35, 0.2])
    tilted = ref * (double(reward) / 0.5).exp()
    found = fitted("dpo", reward, ref, sigmoid, beta=0.5)
    torch.testing.assert_close(found, tilted / tilted.sum(), atol=1e-5, rtol=0)


def test_the_optimum_of_ipo_is_the_reference_tilted_by_the_preference():
    """IPO, theorem 1: π* ∝ π_ref exp(P(y ≻ ref)/τ), where preferences are those of a difference p(y) - p(y') + ½."""
    level, ref = [0.1, 0.45, 0.3, 0.0], double([0.4, 0.3, 0.2, 0.1])
    tilted = ref * (double(level) / 0.5).exp()
    found = fitted("ipo", level, ref, lambda gap: 0.5 + gap, beta=0.5)
    torch.testing.assert_close(found, tilted / tilted.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PAIRED)
def test_ties_say_nothing_and_swapped_rewards_swap_the_pair(name):
    batch, *_ = two_pairs()
    assert value(name, batch.replace(reward=torch.zeros(4).double())) == 0
    swapped = value(name, batch.replace(reward=double([0, 1, 1, 0])))
    again = value(name, batch.rows(torch.tensor([1, 0, 3, 2])).replace(reward=double([0, 1, 1, 0])))
    assert again == pytest.approx(value(name, batch), rel=1e-12) and swapped != pytest.approx(again)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_losses_of_completions_are_enumerated(name):
    loss, world = L.example_loss(name), default_world()
    assert bias(group_gradients(loss, world), world.true_gradient()).cosine > 0.8
    assert normalized(loss, world) is None  # a mean over pairs does not divide by the number of tokens
