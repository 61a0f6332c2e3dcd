"""Losses of scores: the book's numbers, closed forms, and what its misprints would do."""

import itertools
import math

import pytest
import torch

from lossmith.reward_model.losses import (
    all_pairs,
    bradley_terry,
    centring,
    hinge,
    logistic,
    mean_squared,
    plackett_luce,
)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_books_numbers():
    pair = bradley_terry(t(1.5), t(0.5))
    assert float(pair) == pytest.approx(0.313262, abs=1e-6)
    assert float(pair + 0.01 * centring(t(1.5, 0.5))) == pytest.approx(0.353262, abs=1e-6)
    r = t(2, 1, 0.5, -1)
    assert float(plackett_luce(r, range(4))) == pytest.approx(1.251552, abs=1e-6)
    assert float(all_pairs(r, range(4))) == pytest.approx(0.227613, abs=1e-6)
    assert float(all_pairs(r, range(4)) * 6) == pytest.approx(1.365681, abs=1e-6)


def test_two_outputs_ranked_are_a_pair():
    for a, b in itertools.product((-2.0, 0.3, 1.5), repeat=2):
        assert float(plackett_luce(t(a, b), (0, 1))) == pytest.approx(float(bradley_terry(t(a), t(b))))
        assert float(all_pairs(t(a, b), (0, 1))) == pytest.approx(float(bradley_terry(t(a), t(b))))


def test_plackett_luce_is_the_probability_of_the_order():
    r = t(0.7, -0.2, 1.1)
    total = 0.0
    for order in itertools.permutations(range(3)):
        left, p = list(range(3)), 1.0
        for i in order:
            p *= math.exp(r[i]) / sum(math.exp(r[j]) for j in left)
            left.remove(i)
        assert math.exp(-float(plackett_luce(r[list(order)], range(3)))) == pytest.approx(p)
        total += p
    assert total == pytest.approx(1.0)


def test_ties_are_drawn_from_the_same_outputs():
    """Breslow: both of the best tier against all three; the last adds nothing."""
    r = t(0.4, 0.1, -1.0)
    everything = math.log(sum(math.exp(x) for x in r))
    assert float(plackett_luce(r, (0, 0, 1))) == pytest.approx(2 * everything - 0.5)
    # and two that are as good as each other are best with equal scores
    tied = t(1.0, -0.5).requires_grad_()
    plackett_luce(tied, (0, 0)).backward()
    assert tied.grad[0] > 0 > tied.grad[1]
    assert float(all_pairs(t(1.0, -0.5), (0, 0))) == 0.0


def test_soft_labels_and_margins_move_the_optimum():
    """The best difference of a pair preferred with probability p is logit(p), shifted by the margin."""
    for p, margin in ((0.5, 0.0), (0.8, 0.0), (0.8, 0.7)):
        d = math.log(p / (1 - p)) + margin
        a = t(d).requires_grad_()
        bradley_terry(a, t(0.0), p, margin).sum().backward()
        assert float(a.grad) == pytest.approx(0.0, abs=1e-12)


def test_only_one_order_counts():
    """(4.57) as printed sums both orders, and is then best at equal scores: nothing would be learned."""
    r = t(0.0, 0.0).requires_grad_()
    all_pairs(r, (0, 1)).backward()
    assert r.grad[0] < 0 < r.grad[1]
    literal = all_pairs(r, (0, 1)) + all_pairs(r, (1, 0))
    (gradient,) = torch.autograd.grad(literal, r)
    assert gradient.abs().max() < 1e-12


def test_the_squares_are_added_not_taken_off():
    """(4.62), (4.63) as printed have no lower bound: the further off, the better."""
    assert float(mean_squared(t(3.0), t(1.0))) == 4.0
    assert float(centring(t(1e3, 1e3))) > float(centring(t(1.0, 1.0))) > 0
    literal = float(bradley_terry(t(1.5), t(0.5)) - centring(t(1.5, 0.5)))
    assert literal == pytest.approx(-3.69, abs=0.01)
    assert float(bradley_terry(t(101.5), t(100.5)) - centring(t(101.5, 100.5))) < -40000


def test_segment_and_label_losses():
    assert hinge(t(0.4, 2.0, 0.4), t(1.0, 1.0, -1.0)).tolist() == pytest.approx([0.6, 0.0, 1.4])
    assert logistic(t(0.0, 2.0), torch.tensor([True, False])).tolist() == pytest.approx(
        [math.log(2), math.log(1 + math.exp(2))]
    )


@pytest.mark.parametrize("loss", [plackett_luce, all_pairs, lambda r, tiers: centring(r)])
def test_gradients_against_finite_differences(loss):
    r = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, (0, 0, 1, 2, 2)), (r,))


# -- annotators who use the scale differently -------------------------------------------------------------------------


def fitted(loss_of, rows, count):
    """Free scores, one an output, that minimize the mean loss."""
    scores = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(loss_of(scores, row) for row in rows) / len(rows) + 1e-3 * (scores**2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach()


def test_offset_and_scale_of_annotators_hurt_squares_but_not_comparisons():
    """Each output is seen by some annotators only; harsh ones see the good outputs."""
    utility = torch.linspace(-1, 1, 8, dtype=torch.float64)
    annotators = [(0.0, 3.0, range(4)), (-4.0, 0.5, range(3, 8))]  # (offset, scale, outputs seen)
    ratings = [(i, offset + scale * float(utility[i])) for offset, scale, seen in annotators for i in seen]
    pairs = [(j, i) for _, _, seen in annotators for i in seen for j in seen if utility[j] > utility[i]]
    orders = [sorted(seen, key=lambda i: -float(utility[i])) for _, _, seen in annotators]

    squares = fitted(lambda s, row: mean_squared(s[row[0]], t(row[1])).sum(), ratings, 8)
    bt = fitted(lambda s, row: bradley_terry(s[row[0]], s[row[1]]), pairs, 8)
    pl = fitted(lambda s, row: plackett_luce(s[list(row)], range(len(row))), orders, 8)

    def order_kept(scores):
        right = [scores[j] > scores[i] for i, j in itertools.combinations(range(8), 2)]
        return sum(map(bool, right)) / len(right)

    assert order_kept(bt) == order_kept(pl) == 1.0
    assert order_kept(squares) < 0.7
