"""Advantages: the typed tables of losses.md section 8, plain statistics per group, and the book's fixtures."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossmith.losses as L
from batches import double, normal, quiet_loss


def advantages(reward: list, *, group: list | None = None, mask: list | None = None, **changes) -> torch.Tensor:
    """[N, T] of REINFORCE with these choices."""
    group = group if group is not None else [0] * len(reward)
    value = changes.pop("value", None)
    mask = [[1]] * len(reward) if mask is None else mask
    batch = L.Batch(mask=mask, reward=reward, group=group, value=value)
    return quiet_loss("reinforce", **changes).credit(batch).advantage


def of_one_group(reward: list, advantage: str, scale: str = "none", **changes) -> list[float]:
    return advantages(reward, advantage=advantage, advantage_scale=scale, **changes)[:, 0].tolist()


# -- the table ------------------------------------------------------------------------------------------------------

SQRT3 = 3**0.5


@pytest.mark.parametrize(
    ("reward", "advantage", "scale", "changes", "expected"),
    [
        ([1, 0, 0, 0], "group", "group_std", {}, [1.5, -0.5, -0.5, -0.5]),
        ([1, 0, 0, 0], "group", "group_std", {"eps": 1e-4}, [1.4997, -0.4999, -0.4999, -0.4999]),
        ([1, 0, 0, 0], "group", "group_std_biased", {}, [1.7321, -0.5774, -0.5774, -0.5774]),
        ([1, 0, 0, 0], "group", "none", {}, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "loo", "none", {}, [1, -0.3333, -0.3333, -0.3333]),
        ([1, 0, 0, 0], "loo", "loo_std", {}, [1, -0.5774, -0.5774, -0.5774]),  # nemo_loo
        ([1, 1, 1, 0], "group", "group_std", {}, [0.5, 0.5, 0.5, -1.5]),
        ([1, 1, 1, 0], "loo", "none", {}, [0.3333, 0.3333, 0.3333, -1]),
        ([1, 1, 1, 0], "loo", "loo_std", {}, [0.5774, 0.5774, 0.5774, -1]),
        ([1], "group", "none", {}, [0]),
        ([1], "group", "group_std", {}, [0]),
        ([1], "group", "none", {"singleton": "raw"}, [1]),
        ([1], "group", "group_std", {"singleton": "raw"}, [1]),
        ([1], "loo", "none", {}, [0]),
        ([1], "loo", "loo_std", {}, [0]),
        ([1, 0, 0, 0], "batch_mean", "none", {}, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "batch_mean", "batch_std", {}, [1.5, -0.5, -0.5, -0.5]),
        ([1, 0, 0, 0], "raw", "none", {}, [1, 0, 0, 0]),
        ([1, 0, 0, 0], "return", "none", {}, [1, 0, 0, 0]),
    ],
)
def test_table(reward, advantage, scale, changes, expected):
    assert of_one_group(reward, advantage, scale, **changes) == pytest.approx(expected, abs=6e-5)


def test_eps_is_added_to_the_deviation():
    assert of_one_group([1, 0, 0, 0], "group", "group_std", eps=0.5) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_the_lone_winner_is_not_scaled_while_the_losers_are():
    """NeMo-RL's default: the group's advantages do not sum to 0."""
    assert sum(of_one_group([1, 0, 0, 0], "loo", "loo_std")) == pytest.approx(1 - SQRT3, abs=1e-5)


GROUP_CHOICES = [
    ("group", "none"),
    ("group", "group_std"),
    ("group", "group_std_biased"),
    ("group", "loo_std"),
    ("group", "batch_std"),
    ("loo", "none"),
    ("loo", "group_std"),
    ("loo", "loo_std"),
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    constants=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=4),
    size=st.integers(1, 7),
)
def test_constant_groups_and_singletons_are_exactly_zero(constants, size):
    """max == min is asked first, so that no rounding over (0 + eps) leaks."""
    reward = [c for c in constants for _ in range(size)]
    group = [i for i in range(len(constants)) for _ in range(size)]
    for advantage, scale in GROUP_CHOICES:
        got = advantages(reward, group=group, advantage=advantage, advantage_scale=scale)
        assert not got.any(), (advantage, scale)


@pytest.mark.parametrize("reward", [0.1, -3.3, 1e-9, 12345.678])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_a_batch_of_equal_rewards_has_no_signal_for_batch_statistics_either(reward, size):
    for advantage, scale in [
        ("batch_mean", "none"),
        ("batch_mean", "batch_std"),
        ("return", "whiten"),
        ("raw", "whiten"),
    ]:
        assert not advantages([reward] * size, advantage=advantage, advantage_scale=scale).any(), (advantage, scale)


# -- M14: groups are ids, not positions -------------------------------------------------------------------------------


def by_hand(rewards: list[float], ids: list[int], i: int, advantage: str, scale: str) -> float:
    """One row's advantage with the statistics module."""
    own = [r for r, g in zip(rewards, ids, strict=True) if g == ids[i]]
    others = [r for j, (r, g) in enumerate(zip(rewards, ids, strict=True)) if g == ids[i] and j != i]
    if len(own) < 2 or len(set(own)) == 1:
        return 0.0
    centered = rewards[i] - (statistics.mean(own) if advantage == "group" else statistics.mean(others))
    if scale == "none":
        return centered
    if scale == "loo_std":
        spread = statistics.stdev(others) if len(others) > 1 else 0.0
        return centered / (spread + 1e-6) if spread > 1e-9 else centered
    deviation = {
        "group_std": lambda: statistics.stdev(own),
        "group_std_biased": lambda: statistics.pstdev(own),
        "batch_std": lambda: statistics.stdev(rewards),
    }[scale]()
    return centered / (deviation + 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.25, 1.0, -2.0, 7.5])), min_size=2, max_size=12)
)
def test_advantages_follow_group_ids(rows):
    """Any order, uneven groups, any whole numbers as ids: equal to plain statistics of each group."""
    ids, reward = [g for g, _ in rows], [r for _, r in rows]
    for advantage, scale in GROUP_CHOICES:
        if scale == "batch_std" and len(set(reward)) == 1:
            continue
        got = advantages(reward, group=ids, advantage=advantage, advantage_scale=scale)[:, 0].tolist()
        expected = [by_hand(reward, ids, i, advantage, scale) for i in range(len(rows))]
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9), (advantage, scale)


@pytest.mark.parametrize("far", [1e4, 1e8])
def test_a_large_offset_does_not_cost_the_deviation_its_digits(far):
    near = [0.0, 1.0, 3.0, 4.5]
    for advantage, scale in GROUP_CHOICES:
        a, b = (of_one_group([r + c for r in near], advantage, scale) for c in (0.0, far))
        assert a == pytest.approx(b, rel=1e-6), (advantage, scale)


def test_a_row_without_a_token_is_not_in_its_group():
    three = of_one_group([1, 0, 0.5], "group", "group_std")
    four = advantages(
        [1, 0, 99, 0.5], advantage="group", advantage_scale="group_std", mask=[[1], [1], [0], [1]]
    )[:, 0].tolist()  # fmt: skip
    assert four == [three[0], three[1], 0, three[2]]


def test_token_rewards_are_summed_over_valid_tokens():
    reward = double([[0.25, 100.0, 0.75], [0.5, 0.0, 0.0]])
    got = advantages(reward, advantage="raw", mask=[[1, 0, 1], [1, 1, 0]])
    assert got.tolist() == [[1, 0, 1], [0.5, 0.5, 0]]


# -- per token: the book's numbers ------------------------------------------------------------------------------------

VALUE = [[0.2, 0.3, 0.5, 0.6]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"advantage": "td"}, [0.1, 0.2, 0.1, 0.4]),
        ({"advantage": "mc"}, [0.8, 0.7, 0.5, 0.4]),
        ({"advantage": "gae", "lam": 0.95}, [0.7232, 0.656, 0.48, 0.4]),
        ({"advantage": "gae", "lam": 0.0}, [0.1, 0.2, 0.1, 0.4]),
        ({"advantage": "gae", "lam": 1.0}, [0.8, 0.7, 0.5, 0.4]),
        ({"advantage": "td", "gamma": 0.5}, [-0.05, -0.05, -0.2, 0.4]),
        ({"advantage": "return"}, [1, 1, 1, 1]),
        ({"advantage": "return", "gamma": 0.5}, [0.125, 0.25, 0.5, 1]),
    ],
)
@pytest.mark.parametrize("reward", [[1.0], [[0.0, 0.0, 0.0, 1.0]]], ids=["per completion", "per token"])
def test_values_fixture(changes, expected, reward):
    """r = (0,0,0,1), V = (.2,.3,.5,.6), the value after the last token is 0; a score sits on the last token."""
    got = advantages(reward, mask=[[1, 1, 1, 1]], value=VALUE, **changes)
    assert got[0].tolist() == pytest.approx(expected, abs=5e-5)


def test_masked_tokens_are_stepped_over():
    """A tool's tokens in between neither bootstrap nor discount: the same numbers as without them."""
    for changes in (
        {"advantage": "gae", "lam": 0.9, "gamma": 0.8},
        {"advantage": "td", "gamma": 0.8},
        {"advantage": "mc"},
    ):
        plain = advantages([[0.1, 0.0, 1.0]], mask=[[1, 1, 1]], value=[[0.2, 0.3, 0.5]], **changes)
        holes = advantages(
            [[9.0, 0.1, 9.0, 0.0, 1.0, 9.0]],
            mask=[[0, 1, 0, 1, 1, 0]],
            value=[[7.0, 0.2, 7.0, 0.3, 0.5, 7.0]],
            **changes,
        )
        assert holes[0, [1, 3, 4]].tolist() == plain[0].tolist()
        assert not holes[0, [0, 2, 5]].any()


def test_gae_against_its_definition():
    """Σ_l (γλ)^l δ_{t+l}, summed directly."""
    reward, value, gamma, lam = normal(0, 3, 6), normal(1, 3, 6), 0.9, 0.7
    got = advantages(reward, mask=[[1] * 6] * 3, value=value, advantage="gae", gamma=gamma, lam=lam)
    ahead = torch.cat([value[:, 1:], torch.zeros(3, 1)], 1)
    delta = reward + gamma * ahead - value
    for t in range(6):
        expected = sum((gamma * lam) ** k * delta[:, t + k] for k in range(6 - t))
        torch.testing.assert_close(got[:, t], expected)


def test_old_values_are_what_the_estimator_reads():
    """Values of the start of the update; the trained ones only where there are no others. No gradient goes through."""
    value = double(VALUE).requires_grad_()
    batch = L.Batch(mask=[[1] * 4], reward=[1.0], value=value, old_value=torch.zeros(1, 4).double())
    credit = quiet_loss("reinforce", advantage="mc").credit(batch)
    assert credit.advantage[0].tolist() == [1, 1, 1, 1] and not credit.advantage.requires_grad


# -- scales over tokens, bounds, shaping ------------------------------------------------------------------------------


def test_whiten_is_over_valid_tokens():
    """Masked mean and masked, unbiased variance; 1e-8 inside the root."""
    reward, mask = normal(3, 4, 5), normal(4, 4, 5) > -0.5
    got = advantages(reward, mask=mask, advantage="return", advantage_scale="whiten")
    plain = advantages(reward, mask=mask, advantage="return")[mask]
    expected = (plain - plain.mean()) / (plain.var(correction=1) + 1e-8).sqrt()
    torch.testing.assert_close(got[mask], expected, rtol=1e-12, atol=1e-14)
    assert not got[~mask].any()


def test_whiten_of_fewer_than_two_tokens_is_zero():
    assert advantages([3.0], advantage="raw", advantage_scale="whiten").tolist() == [[0.0]]
    both = advantages([3.0, 4.0], mask=[[1, 0], [0, 0]], advantage="raw", advantage_scale="whiten")
    assert not both.any()


def test_advantage_clip_bounds_the_scaled_advantage():
    got = of_one_group([1, 0, 0, 0], "group", "group_std", advantage_clip=0.7)
    assert got == pytest.approx([0.7, -0.5, -0.5, -0.5], abs=1e-5)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (6, 0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1), (11, -1), (12, -1)]
)
def test_overlong_shaping(length, expected):
    """Limit 10, buffer 4: nothing up to 6, then down to -1 at the limit and beyond (DAPO, eq. 13)."""
    mask = [[1] * length + [0] * (12 - length)]
    settings_ = {"advantage": "raw", "shaping": ["overlong"], "max_length": 10, "buffer": 4}
    assert advantages([0.0], mask=mask, **settings_)[0, 0] == expected
    assert advantages([0.0], mask=mask, penalty=3, **settings_)[0, 0] == 3 * expected
    token = advantages([[0.0] * 12], mask=mask, **{**settings_, "advantage": "return"})
    assert token[0, :length].tolist() == [expected] * length


def test_shaping_is_applied_in_the_given_order():
    a = of_one_group([5.0], "raw", shaping=["clip", "scale"], reward_low=-1, reward_high=2, a=10, b=1)
    b = of_one_group([5.0], "raw", shaping=["scale", "clip"], reward_low=-1, reward_high=2, a=10, b=1)
    assert (a, b) == ([30.0], [2.0])


def test_truncated_keep_mask_zero():
    batch = {
        "logp": -torch.ones(2, 3).double(),
        "mask": [[1, 1, 1], [1, 0, 0]],
        "reward": [1.0, 5.0],
        "truncated": [True, False],
    }
    credits = {
        t: quiet_loss("reinforce", advantage="raw", aggregate="token_mean", truncated=t).credit(L.Batch(**batch))
        for t in ("keep", "mask", "zero")
    }
    assert [float(c.advantage[0, 0]) for c in credits.values()] == [1, 1, 0]
    # masked: no loss, still counted by the normalizer
    assert credits["keep"].weight.tolist() == credits["zero"].weight.tolist() == [[0.25] * 3, [0.25, 0, 0]]
    assert credits["mask"].weight.tolist() == [[0, 0, 0], [0.25, 0, 0]]


def test_zero_variance_groups_are_left_out_and_reported():
    """DAPO: groups without a signal are dropped, and the tokens that stay are the normalizer."""
    loss = quiet_loss("dapo", shaping=[])
    batch = L.Batch(
        logp=-torch.ones(5, 2).double(),
        mask=[[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]],
        reward=[1.0, 1.0, 1.0, 0.0, 1.0],
        group=[0, 0, 1, 1, 2],
    )
    credit = loss.credit(batch)
    assert credit.weight.tolist() == [[0, 0], [0, 0], [1 / 3, 1 / 3], [1 / 3, 0], [0, 0]]
    assert credit.metrics["groups"] == 3 and credit.metrics["constant_groups"] == 2


# -- given ------------------------------------------------------------------------------------------------------------


def test_a_given_advantage_bypasses_estimator_scale_and_bound():
    given_ = double([[5.0, -7.0], [0.5, 99.0]])
    batch = L.Batch(mask=[[1, 1], [1, 0]], advantage=given_, reward=[1.0, 2.0], group=[0, 0])
    for name, changes in [("grpo", {"beta": 0}), ("reinforce", {"advantage_scale": "whiten", "advantage_clip": 0.1})]:
        assert quiet_loss(name, **changes).credit(batch).advantage.tolist() == [[5, -7], [0.5, 0]]
    per_row = L.Batch(mask=[[1, 1], [1, 0]], advantage=[3.0, 4.0])
    assert quiet_loss("grpo", beta=0).credit(per_row).advantage.tolist() == [[3, 3], [4, 0]]


def test_a_given_advantage_carries_no_gradient():
    given_ = double([2.0]).requires_grad_()
    logp = double([[-1.0]]).requires_grad_()
    out = quiet_loss("ppo")(L.Batch(logp, [[1]], advantage=given_))
    out.loss.backward()
    assert given_.grad is None and logp.grad.tolist() == [[-2]]
