"""On a policy that can be enumerated: the gradient is the true one, and one step makes the policy better."""

import dataclasses

import pytest
import torch

import lossmith.losses as L
from batches import NAMES, double, no_trap_warnings, normal, quiet_loss
from enumerable import (
    COMPLETIONS,
    expected_gradient,
    expected_reward,
    full_kl,
    gradient,
    policy,
    probabilities,
    sequence_kl,
    state_kl,
    token_logp,
)

REWARD = double([0.3, -1.0, 2.0, 0.0, 0.7, -0.4, 1.1, -2.0, 0.5])
THETA, REF = policy(1), policy(2).detach()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-12)


def rewarded(y: int) -> dict:
    return {"reward": REWARD[y : y + 1], "group": torch.tensor([0])}


# -- M6: the expected gradient ---------------------------------------------------------------------------------------

TRUE_GRADIENT = {
    "raw": {"advantage": "raw"},
    "reward to go": {"advantage": "return"},
    "importance sampling": {"advantage": "raw", "trust": "none"},
    # one number a completion, at each of its tokens: their mean, not their sum, is that number
    "trajectory ratio": {
        "advantage": "raw",
        "trust": "none",
        "ratio_level": "sequence_sum",
        "aggregate": "seq_mean_token_mean",
    },
    "clip": {"advantage": "raw", "trust": "clip"},
    "dual clip": {"advantage": "raw", "trust": "clip", "dual_clip": 3},
    "book clip": {"advantage": "raw", "trust": "book_clip"},
    "capped": {"advantage": "raw", "trust": "sg_clip"},
    "truncated": {"advantage": "raw", "trust": "truncate"},
}


@pytest.mark.parametrize("label", TRUE_GRADIENT)
def test_expected_gradient_is_minus_the_gradient_of_the_expected_reward(label):
    """Sampled from the policy itself, ratio 1: the surrogate's expected gradient is -∇J, exactly."""
    loss = quiet_loss("reinforce", **({"aggregate": "seq_mean_token_sum"} | TRUE_GRADIENT[label]))
    truth = -gradient(expected_reward(THETA, REWARD), THETA)
    assert float(truth.abs().max()) > 0.1
    assert close(expected_gradient(loss, THETA, rewarded), truth)


def test_a_critic_leaves_the_expected_gradient_true():
    """TD, MC and GAE with the right values; a value that depends on the state only is a baseline."""
    p, after = probabilities(THETA).detach(), []
    for first in range(3):
        here = COMPLETIONS[:, 0] == first
        after.append(float((p[here] * REWARD[here]).sum() / p[here].sum()))
    true_value = torch.stack([torch.full((9,), float((p * REWARD).sum())), double(after)[COMPLETIONS[:, 0]]], 1)
    any_value = torch.stack([torch.full((9,), 0.37), double([1.0, -2.0, 0.5])[COMPLETIONS[:, 0]]], 1).double()
    truth = -gradient(expected_reward(THETA, REWARD), THETA)
    for advantage, changes, value in [
        ("td", {}, true_value),
        ("mc", {}, any_value),
        ("gae", {"lam": 1.0}, any_value),
        ("gae", {"lam": 0.6}, true_value),
    ]:
        loss = quiet_loss("reinforce", advantage=advantage, aggregate="seq_mean_token_sum", **changes)
        got = expected_gradient(loss, THETA, lambda y, v=value: rewarded(y) | {"value": v[y : y + 1]})
        assert close(got, truth), (advantage, changes)


def test_mean_over_tokens_is_biased_by_length_only_through_its_normalizer():
    """Both completions have two tokens here, so a token mean is half the gradient of the sum."""
    loss = quiet_loss("reinforce", advantage="raw", aggregate="token_mean")
    truth = -gradient(expected_reward(THETA, REWARD), THETA)
    assert close(2 * expected_gradient(loss, THETA, rewarded), truth)


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_is_unbiased_and_a_group_mean_shrinks(group_size):
    """All groups enumerated: loo gives -∇J, the group's mean (own sample included) (G-1)/G of it."""
    truth = -gradient(expected_reward(THETA, REWARD), THETA)
    p, index = probabilities(THETA).detach(), torch.cartesian_prod(*[torch.arange(9)] * group_size)
    for advantage, factor in [("loo", 1.0), ("group", (group_size - 1) / group_size)]:
        loss = quiet_loss("reinforce", advantage=advantage, aggregate="token_sum")
        rows, logp = index.flatten(), token_logp(THETA)
        group = torch.arange(len(index)).repeat_interleave(group_size)
        credit = loss.credit(L.Batch(logp[rows], torch.ones(len(rows), 2).bool(), reward=REWARD[rows], group=group))
        weight = p[index].prod(1).repeat_interleave(group_size)[:, None] / group_size
        got = gradient(-(weight * credit.advantage * logp[rows]).sum(), THETA)
        assert close(got, factor * truth)


# -- KL: what each choice regularizes (losses.md, section 7) ---------------------------------------------------------


def kl_gradient(ref=REF, **kl) -> torch.Tensor:
    """Expected gradient of β·KL alone, β = 1: reward 0."""
    name = "reinforce"
    loss = quiet_loss(name, advantage="raw", aggregate="seq_mean_token_sum", beta=1.0, **kl)
    ref_logp = token_logp(ref)

    def fields(y: int) -> dict:
        found = {"reward": torch.zeros(1, dtype=torch.float64), "ref_logp": ref_logp[y : y + 1]}
        if kl["kl_estimator"] == "full":
            found["full_kl"] = full_kl(THETA, ref)[y : y + 1]
        return found

    return expected_gradient(loss, THETA, fields)


def reverse() -> torch.Tensor:
    return gradient(state_kl(THETA, THETA, REF), THETA)


def forward() -> torch.Tensor:
    return gradient(state_kl(THETA, REF, THETA), THETA)


def test_k1_in_the_loss_regularizes_nothing():
    assert close(kl_gradient(kl_estimator="k1"), torch.zeros(12).double())


def test_k1_in_the_loss_off_policy_is_noise_without_the_reference_in_it():
    loss = quiet_loss("reinforce", advantage="raw", beta=1.0, kl_estimator="k1")
    grads = []
    for ref in (REF, policy(3).detach()):
        logp = token_logp(THETA)
        batch = L.Batch(logp, torch.ones(9, 2).bool(), ref_logp=token_logp(ref), reward=torch.zeros(9).double())
        grads.append(gradient(loss(batch).loss, THETA))
    assert torch.equal(*grads) and grads[0].abs().max() > 1e-3


def test_k2_in_the_loss_is_the_reverse_kl():
    assert close(kl_gradient(kl_estimator="k2"), reverse())


def test_k3_in_the_loss_is_the_forward_kl():
    assert close(kl_gradient(kl_estimator="k3"), forward())
    assert not close(forward(), reverse())


@pytest.mark.parametrize(
    "kl",
    [
        {"kl_estimator": "k3", "kl_ratio_weight": True},
        {"kl_estimator": "k1", "kl_ratio_weight": True},
        {"kl_estimator": "k1", "kl_straight_through": True},
        {"kl_estimator": "k2", "kl_straight_through": True},
        {"kl_estimator": "k3", "kl_straight_through": True},
        {"kl_estimator": "abs", "kl_straight_through": True},
        {"kl_estimator": "full"},
    ],
    ids=lambda kl: " ".join(map(str, kl.values())),
)
def test_ratio_weight_straight_through_and_full_are_the_reverse_kl(kl):
    assert close(kl_gradient(**kl), reverse())


def test_abs_is_neither():
    got = kl_gradient(kl_estimator="abs")
    assert not close(got, reverse()) and not close(got, forward()) and got.abs().max() > 1e-3


def test_k1_weighted_by_the_trajectory_ratio_is_the_reverse_kl_of_completions():
    truth = gradient(sequence_kl(THETA, REF), THETA)
    got = kl_gradient(kl_estimator="k1", kl_ratio_weight=True, ratio_level="sequence_sum", trust="none")
    assert close(got, truth)
    assert not close(got, reverse())


@pytest.mark.parametrize("advantage", ["return", "raw"])
def test_k1_in_the_reward_is_the_reverse_kl_of_completions(advantage):
    """Per token with reward-to-go, or per completion; and reward and penalty add up to the regularized objective."""
    loss = quiet_loss(
        "reinforce",
        advantage=advantage,
        aggregate="seq_mean_token_sum",
        beta=0.7,
        kl_estimator="k1",
        kl_place="reward",
    )
    ref_logp = token_logp(REF)
    got = expected_gradient(loss, THETA, lambda y: rewarded(y) | {"ref_logp": ref_logp[y : y + 1]})
    truth = gradient(0.7 * sequence_kl(THETA, REF) - expected_reward(THETA, REWARD), THETA)
    assert close(got, truth)


# -- M7: one step makes it better ------------------------------------------------------------------------------------


def sampled(theta: torch.Tensor, prompts: int = 40, size: int = 8, seed: int = 0) -> dict:
    """Completions of the policy, with everything a loss may need; the reference is the policy itself."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.multinomial(probabilities(theta).detach(), prompts * size, replacement=True, generator=draw)
    logp = token_logp(theta)[y]
    zeros = torch.zeros_like(logp).detach()
    frozen = logp.detach()
    return {
        "logp": logp,
        "mask": torch.ones(len(y), 2, dtype=torch.bool),
        "old_logp": frozen,
        "behavior_logp": frozen,
        "ref_logp": frozen,
        "teacher_logp": frozen - 0.1,
        "full_kl": full_kl(theta, theta.detach())[y],
        "reward": REWARD[y],
        "group": torch.arange(prompts).repeat_interleave(size),
        "value": zeros,
        "old_value": zeros,
        "entropy": zeros,
        "truncated": torch.zeros(len(y), dtype=torch.bool),
        "reward_greedy": torch.full((len(y),), float(REWARD.mean()), dtype=torch.float64),
        "off_policy": torch.zeros(len(y), dtype=torch.bool),
    }


def gain_of_one_step(loss: L.PolicyLoss, seed: int, size: float = 0.05) -> float:
    """Change of the exact expected reward over one SGD step of this length."""
    theta = policy(seed)
    before = expected_reward(theta, REWARD)
    direction = gradient(loss(L.Batch(**sampled(theta, seed=seed))).loss, theta)
    after = expected_reward(theta - size * direction / direction.norm(), REWARD)
    return float(after.detach() - before.detach())


def raises_the_reward(loss: L.PolicyLoss) -> bool:
    return all(gain_of_one_step(loss, seed) > 0 for seed in range(4))


# on-policy distillation follows its teacher, whatever the reward
TAUGHT = ("opd", "iw_opd")
TRAINABLE = [name for name in NAMES if not L.CATALOGUE[name].demonstration and name not in TAUGHT]


@pytest.mark.parametrize("name", TRAINABLE)
def test_one_step_raises_the_expected_reward(name):
    assert raises_the_reward(quiet_loss(name))


class Flipped(L.PolicyLoss):
    """The loss with its sign turned round."""

    def objective(self, batch, credit):
        out = super().objective(batch, credit)
        return L.LossOutput(-out.loss, out.advantage, out.terms, out.metrics)


class NegatedAdvantage(L.PolicyLoss):
    def credit(self, batch, normalizer=None):
        c = super().credit(batch, normalizer)
        return dataclasses.replace(c, advantage=-c.advantage)


@pytest.mark.parametrize("planted", [Flipped, NegatedAdvantage])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_planted_sign_flip_is_caught(name, planted):
    loss = quiet_loss(name)
    with no_trap_warnings():
        wrong = planted(**{field: getattr(loss, field) for field in loss.__dataclass_fields__})
    assert not raises_the_reward(wrong)


def test_the_penalty_alone_brings_the_policy_nearer():
    """KL with no reward: a step lowers it, for every way that regularizes; k1 in the loss is not among them."""
    ways = [
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_estimator": "k1", "kl_ratio_weight": True},
        {"kl_estimator": "k3", "kl_straight_through": True},
        {"kl_estimator": "full"},
    ]
    before = state_kl(THETA, THETA, REF).detach()
    for kl in ways:
        step = THETA - 0.01 * kl_gradient(**kl)
        assert state_kl(THETA, step, REF) < before, kl
    reward = expected_gradient(
        quiet_loss("reinforce_pp", advantage_scale="none", beta=1.0),
        THETA,
        lambda y: {"reward": torch.zeros(1).double(), "ref_logp": token_logp(REF)[y : y + 1]},
    )
    assert sequence_kl(THETA - 0.01 * reward, REF) < sequence_kl(THETA, REF)


def test_the_value_of_the_surrogate_is_not_the_performance():
    """-E[r] is reported beside the loss, which is near 0 at ratio 1 whatever the policy is worth."""
    out = quiet_loss("grpo", beta=0)(L.Batch(**sampled(THETA)))
    assert abs(float(out.loss.detach())) < 1e-12
    assert out.metrics["performance_loss"] == pytest.approx(-float(sampled(THETA)["reward"].mean()))


def test_raising_a_completion_needs_a_positive_advantage():
    """Negative advantage lowers log π(y), positive raises it, in every loss at ratio 1."""
    for name in NAMES:
        loss = quiet_loss(name, beta=0)
        logp = normal(0, 4, 3).abs().neg().requires_grad_()
        fields = dict.fromkeys(("old_logp", "behavior_logp", "ref_logp", "teacher_logp", "entropy"), logp.detach())
        fields |= {"off_policy": torch.zeros(4, dtype=torch.bool), "group": torch.zeros(4, dtype=torch.int64)}
        if loss.group_filter.option != "none":
            fields["reward"] = double([1.0, 2.0, 3.0, 4.0])
        if loss.group_filter.option == "best" or name in ("clip_cov", "grpo_top_entropy"):  # some take no part
            continue
        batch = L.Batch(logp, torch.ones(4, 3).bool(), advantage=double([1.0, -1.0, 2.0, -3.0]), **fields)
        sign = -torch.autograd.grad(loss(batch).loss, logp)[0].sign()
        assert torch.equal(sign, double([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 3)), name
