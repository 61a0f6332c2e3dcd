"""Exact enumeration: known closed forms come out of it, and it agrees with doing the sum another way."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

import lossmith.losses as L
from batches import quiet_loss
from lossmith.errors import ProofError
from lossmith.losses.batch import FIELDS
from lossmith.proofs import (
    Tree,
    World,
    bias,
    default_world,
    enumeration,
    group_gradients,
    kl_push,
    kl_table,
    length_weights,
)
from lossmith.proofs.enumeration import WORLD_FIELDS, long_world
from lossmith.proofs.scenarios import (
    SUCCESS,
    baseline_variances,
    difficulty,
    moved_world,
    normalized,
    off_policy,
    unscaled,
    without_kl,
)

WORLD = default_world()
SUM = {"aggregate": "seq_mean_token_sum"}


def found(name="reinforce", world=WORLD, size=4, beta=0.0, **changes):
    return bias(group_gradients(quiet_loss(name, **changes), world, size), world.true_gradient(beta))


# -- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "limit", "count"), [(3, 2, 7), (2, 6, 7), (3, 3, 15), (2, 1, 2)])
def test_all_completions_are_there_once(vocabulary, limit, count):
    tree = Tree(vocabulary, limit)
    theta = torch.randn(tree.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(tree.sequences) == len(set(tree.sequences)) == count
    assert float(tree.logp(theta).exp().sum()) == pytest.approx(1, abs=1e-14)
    end = vocabulary - 1
    for y, cut in zip(tree.sequences, tree.truncated.tolist(), strict=True):
        assert end not in y[:-1] and len(y) <= limit and cut == (y[-1] != end)
        assert y[-1] == end or len(y) == limit


def test_by_hand():
    """Two tokens, at most two: end; a, end; a, a."""
    tree = Tree(2, 2)
    theta = torch.log(torch.tensor([0.7, 0.3, 0.4, 0.6], dtype=torch.float64))
    assert tree.sequences == [(1,), (0, 0), (0, 1)]
    assert tree.logp(theta).exp().tolist() == pytest.approx([0.3, 0.28, 0.42])
    ref = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64))
    kl = sum(p * math.log(p / q) for p, q in ((0.3, 0.5), (0.28, 0.25), (0.42, 0.25)))
    assert float(tree.sequence_kl(theta, ref)) == pytest.approx(kl)
    assert float(tree.state_kl(theta, theta, ref)) == pytest.approx(kl)  # the chain rule, at its own states
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert tree.entropy(theta)[:, 0].tolist() == pytest.approx([entropy] * 3)
    world = World(tree, theta, theta, ref, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), exact_critic=True)
    assert world.field("value")[2].tolist() == pytest.approx([1.14, 1.2])
    assert world.field("reward_greedy").tolist() == [2.0] * 3  # a, then end
    assert float(world.field("sum_prob_sq")[0, 0]) == pytest.approx(0.58)


def test_every_field_that_can_be_drawn_can_be_enumerated():
    assert set(WORLD_FIELDS) == set(FIELDS)
    for name in WORLD_FIELDS:
        assert len(WORLD.field(name)) == 7, name
    with pytest.raises(ProofError, match="no mood"):
        WORLD.field("mood")


def test_reference_rewards_are_those_of_the_reference():
    mean = float((WORLD.tree.logp(WORLD.ref).exp() * WORLD.reward).sum())
    assert float(WORLD.field("reference_reward")[0].mean()) == pytest.approx(mean, abs=0.02)


# -- the sum done another way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_expected_gradient_is_that_of_all_ordered_groups(name):
    """Straight through theta by autograd, one ordered pair after another, off-policy, with entropy and full KL."""
    loss = quiet_loss(name, entropy_coef=0.1, beta=0.3, kl_estimator="full")
    world, total = moved_world(0.2), torch.zeros(9, dtype=torch.float64)
    tree = world.tree
    for rows in itertools.product(range(7), repeat=2):
        theta, index = world.theta.clone().requires_grad_(), list(rows)
        fields = {k: world.field(k)[index] for k in {*loss.needs, "mask", "old_logp", "group"}}
        fields["logp"], fields["entropy"] = tree.token_logp(theta)[index], tree.entropy(theta)[index]
        fields["full_kl"] = tree.full_kl(theta, world.ref)[index]
        value = loss(L.Batch(**fields)).loss
        total += world.probability[index].prod() * torch.autograd.grad(value, theta)[0]
    gradients = group_gradients(loss, world, 2)
    assert float(gradients.weight.sum()) == pytest.approx(1, abs=1e-14) and len(gradients.weight) == 28
    torch.testing.assert_close(gradients.mean(), total, rtol=1e-11, atol=1e-13)
    parts = sum(gradients.mean(term) for term in gradients.terms if term != "loss")
    torch.testing.assert_close(parts, total, rtol=1e-11, atol=1e-13)


APART = {
    "grpo": {"entropy_coef": 0.1, "beta": 0.3, "entropy_aggregate": "token_mean", "kl_aggregate": "token_sum"},
    "dapo": {"truncated": "mask", "mismatch": "tis"},
    "reinforce": {"advantage": "loo", "aggregate": "prompt_mean", "group_filter": "zero_variance"},
    "ppo": {"value_clip": 0.2},
}


@pytest.mark.parametrize("name", APART)
def test_all_groups_at_once_have_the_gradients_of_each_alone(name, monkeypatch):
    loss, world = quiet_loss(name, **APART[name]), moved_world(0.2)
    at_once = group_gradients(loss, world, 3).terms
    monkeypatch.setattr(enumeration, "_keeps_groups_apart", lambda loss: False)
    alone = group_gradients(loss, world, 3).terms
    assert at_once.keys() == alone.keys() and len(alone["loss"]) == 84
    for term, gradient in alone.items():
        torch.testing.assert_close(at_once[term], gradient, rtol=1e-11, atol=1e-13)


def test_a_piece_that_couples_groups_and_says_that_it_does_not_changes_nothing():
    class Silent(L.BatchMean):
        coupling = "group"

    honest = quiet_loss("reinforce", advantage="batch_mean")
    told = honest.replace(advantage=Silent())
    assert (honest.coupling, told.coupling) == ("batch", "group")
    ours, theirs = (group_gradients(loss, WORLD, 2).mean() for loss in (told, honest))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_sampled_groups_agree_with_their_interval():
    tree = Tree(3, 3)
    draw = torch.Generator().manual_seed(0)
    theta, reward = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (tree.size, 15))
    world = World(tree, theta, theta, theta, reward)
    loss = quiet_loss("reinforce", advantage="loo", **SUM)
    one = bias(group_gradients(loss, world, 4, samples=400), world.true_gradient())
    assert not one.exact and 0.02 < one.interval < 0.5
    assert one.residual < 2 * one.interval and abs(one.scale - 1) < 2 * one.interval
    assert bias(group_gradients(loss, world, 2), world.true_gradient()).exact  # 120 multisets are all enumerated


# -- closed forms ----------------------------------------------------------------------------------------------------


def check_exact(one, scale):
    assert one.exact and one.residual < 1e-12 and one.scale == pytest.approx(scale, rel=1e-12)
    assert one.cosine == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_reinforce_leave_one_out_and_the_mean_of_the_group(size):
    check_exact(found(size=size, advantage="raw", **SUM), 1)
    check_exact(found(size=size, advantage="loo", **SUM), 1)
    check_exact(found(size=size, advantage="group", **SUM), (size - 1) / size)
    check_exact(found(size=size, advantage="raw", aggregate="token_sum"), size)
    check_exact(found("dr_grpo", size=size), (size - 1) / size / 8)


def test_a_token_mean_is_not_the_gradient():
    for world, least in ((WORLD, 0.005), (long_world(), 0.15)):
        for aggregate in ("token_mean", "seq_mean_token_mean"):
            assert found(world=world, advantage="loo", aggregate=aggregate).residual > least


def test_a_token_mean_divided_by_a_constant_is():
    """What biases it is that the number of tokens it divides by goes with the reward."""
    world = long_world()
    loss = quiet_loss("reinforce", advantage="loo", aggregate="token_mean")
    fixed = normalized(loss, world)
    one = bias(group_gradients(fixed, world), world.true_gradient())
    check_exact(one, 4 / fixed.normalizer.tokens)
    fixed = normalized(quiet_loss("reinforce", advantage="loo", aggregate="seq_mean_token_mean"), world)
    assert bias(group_gradients(fixed, world), world.true_gradient()).residual > 0.15


def test_a_wrong_sign_and_a_loss_of_nothing():
    good, bad = (found(advantage="raw", shaping="scale", a=a, **SUM) for a in (1, -1))
    assert good.cosine == pytest.approx(1) and bad.cosine == pytest.approx(-1) and bad.scale == pytest.approx(-1)
    nothing = found(advantage="raw", shaping="scale", a=1e-300, **SUM)  # 0 itself is refused
    assert (nothing.scale, nothing.cosine, nothing.norm_ratio) == (0, 0, 0) and nothing.residual == math.inf


def test_the_ratio_of_completions_is_exact_off_policy_and_others_are_not():
    exact = {"advantage": "raw", "trust": "none", "ratio_level": "sequence_sum", "aggregate": "seq_mean_token_mean"}
    for nats in (0.01, 0.1, 0.5):
        world = moved_world(nats)
        assert float(world.tree.sequence_kl(world.behavior, world.theta)) == pytest.approx(nats)
        check_exact(found(world=world, size=2, **exact), 1)
        assert found(world=world, size=2, **exact | {"trust": "clip"}).residual > 0.05
        assert found(world=world, size=2, advantage="raw", trust="none", **SUM).residual > 1e-3
    by = off_policy(quiet_loss("reinforce", **exact), size=2, directions=2)
    assert [one.cosine for one in by] == pytest.approx([1, 1, 1])


def test_cosine_falls_with_the_distance_under_a_clip():
    by = off_policy(quiet_loss("grpo"), size=2, directions=2)
    assert 1 > by[0].cosine > by[1].cosine > by[2].cosine
    assert all(one.worst <= one.cosine for one in by)


def test_a_sampler_that_differs_is_what_a_mismatch_correction_is_for():
    """The ratio of completions to the sampler, unbounded, makes it exact; without one it is not."""
    corrected = {"mismatch": "tis", "mismatch_level": "sequence", "mismatch_high": 1e9}
    plain = {"advantage": "raw", "trust": "logp", **SUM}
    for nats in (0.01, 0.1):
        world = dataclasses.replace(moved_world(nats), old=moved_world(nats).theta)
        check_exact(found(world=world, size=2, **plain, **corrected), 1)
        assert found(world=world, size=2, **plain).residual > 0.05
    by = off_policy(quiet_loss("reinforce", **plain, **corrected), (0.1,), 2, 2, sampler_only=True)
    assert by[0].worst == pytest.approx(1)


def test_rloo_climbs_the_regularized_objective_exactly():
    loss = quiet_loss("rloo")
    check_exact(found("rloo", beta=loss.kl.beta), 1)
    assert found("rloo").residual > 0.01  # it is not that of E[r] alone


def test_a_critic_that_is_right_is_unbiased_and_one_that_is_wrong_is_not():
    exact = World(WORLD.tree, WORLD.theta, WORLD.theta, WORLD.ref, WORLD.reward, exact_critic=True)
    check_exact(found("a2c", world=exact, size=1), 1)
    assert found("a2c", size=1).residual > 0.1


def test_variance_by_hand():
    """Without a baseline and one completion: E‖r∇logp‖² - ‖∇J‖²."""
    one = found(size=1, advantage="raw", **SUM)
    squares = torch.einsum("slp->sp", WORLD.jacobians["logp"]).square().sum(1)
    expected = float(WORLD.probability @ (WORLD.reward**2 * squares) - WORLD.true_gradient().square().sum())
    assert one.variance == pytest.approx(expected)
    assert found(size=4, advantage="raw", **SUM).variance == pytest.approx(expected / 4)  # independent completions
    plain = baseline_variances(4)
    assert plain["leave_one_out"] < plain["reinforce"] == pytest.approx(expected / 4)


def test_what_dividing_by_the_deviation_does_to_easy_and_hard_prompts():
    """c(p) = Σ_k Binomial(k; G, p)/G·[k A₁/p - (G - k) A₀/(1 - p)] with A = (r - k/G)/(σ_k + eps)."""

    def expected(p, size, divide):
        total = 0.0
        for k in range(1, size):
            sigma = math.sqrt(k * (size - k) / size / (size - 1)) + 1e-6 if divide else 1.0
            right, wrong = (1 - k / size) / sigma, -k / size / sigma
            chance = math.comb(size, k) * p**k * (1 - p) ** (size - k)
            total += chance / size * (k * right / p - (size - k) * wrong / (1 - p))
        return total

    loss = quiet_loss("grpo")
    for size in (4, 16):
        for subject, divide in ((loss, True), (unscaled(loss), False)):
            got = [one.scale for one in difficulty(subject, size)]
            assert got == pytest.approx([expected(p, size, divide) for p in SUCCESS], rel=1e-9)
    assert expected(0.1, 16, True) / expected(0.5, 16, True) > 1.4
    assert expected(0.1, 16, False) == pytest.approx(15 / 16)
    assert unscaled(quiet_loss("dr_grpo")) is None


# -- KL --------------------------------------------------------------------------------------------------------------

STATES = "reverse KL(π‖π_ref) at sampled states"


def test_what_each_kl_term_regularizes():
    assert {row.term: row.regularizes for row in kl_table()} == {
        "k1 in the loss": "nothing",
        "k2 in the loss": STATES,
        "k3 in the loss": "forward KL(π_ref‖π) at sampled states",
        "abs in the loss": "neither",
        "full in the loss": STATES,
        "k1 by the token ratio": STATES,
        "k3 by the token ratio": STATES,
        "k1 by the ratio of completions": "reverse KL(π‖π_ref) of completions",
        "k1 straight through": STATES,
        "k3 straight through": STATES,
        "abs straight through": STATES,
        "k1 in the reward": "reverse KL(π‖π_ref) of completions",
    }
    rows = {row.term: row for row in kl_table(seed=3)}
    assert rows["k1 in the loss"].norm < 1e-12 and rows["k2 in the loss"].reverse < 1e-12
    assert rows["k3 in the loss"].forward < 1e-12 and rows["k3 in the loss"].reverse > 0.05
    assert min(rows["abs in the loss"].reverse, rows["abs in the loss"].forward) > 0.05
    assert rows["k1 in the reward"].completions < 1e-12 and rows["k1 in the reward"].reverse > 0.05


def test_the_books_penalty_pushes_nowhere_or_away():
    itself, old, reference = kl_push(quiet_loss("book_ppo_clip"), 0.1)
    assert (itself.cosine, itself.size) == (0, 0)
    assert old.size > 0.1 and old.cosine < 0
    assert reference.cosine < -0.9 and reference.size > 0.5
    k2 = kl_push(quiet_loss("reinforce", beta=0.1, kl_estimator="k2"), 0.1)
    assert all(push.cosine > 0.9 for push in k2)
    assert kl_push(quiet_loss("rloo"), 0.05) == []


# -- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregate", "exponent"),
    [("token_mean", 0), ("seq_mean_token_mean", -1), ("seq_mean_token_sum", 0), ("token_sum", 0), ("prompt_mean", 0)],
)
def test_length_exponents(aggregate, exponent):
    weights = length_weights(quiet_loss("grpo", aggregate=aggregate))
    assert weights.exponent == pytest.approx(exponent, abs=1e-12) and weights.misfit < 1e-12
    total = [w * t for w, t in zip(weights.token, weights.lengths, strict=True)]
    assert list(weights.completion) == pytest.approx(total)
    assert ("every completion weighs the same" in weights.statement) == (exponent == -1)


def test_length_of_the_ratio_of_a_completion():
    assert length_weights(quiet_loss("gspo")).exponent == pytest.approx(-1)
    assert length_weights(quiet_loss("gspo", aggregate="seq_mean_token_sum")).exponent == pytest.approx(0)
    assert length_weights(quiet_loss("rloo")).exponent == pytest.approx(0)


# -- what a summary claims -------------------------------------------------------------------------------------------

CLAIM = re.compile(r"policy gradient|unbiased|without its two biases|∇E\[r\]")  # of the catalogue's one-line summaries


def test_a_summary_that_claims_the_policy_gradient_is_held_to_it():
    """Completions of one to six tokens too, where a denominator that varies with the length shows."""
    claiming = [name for name, entry in L.CATALOGUE.items() if CLAIM.search(entry.summary)]
    assert {"reinforce", "dr_grpo", "book_reinforce"} <= set(claiming)
    for name in claiming:
        loss = without_kl(L.example_loss(name))
        for world in (WORLD, long_world()):
            one = bias(group_gradients(loss, world, 3), world.true_gradient())
            assert one.residual < 1e-12 and one.scale > 0, name
    assert found("reinforce", long_world(), 3, aggregate="token_mean").residual > 0.1  # which it is not as a token mean
