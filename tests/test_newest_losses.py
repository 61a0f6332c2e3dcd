"""The newest losses against their papers' equations, written out here once more."""

import math
import statistics

import pytest
import torch

import lossmith.losses as L
from batches import quiet_loss

RATIOS = torch.tensor([0.1, 0.7, 0.9, 1.0, 1.1, 1.3, 5.0], dtype=torch.float64)


def test_ngrpo_learns_from_a_group_of_failures_and_not_from_one_without():
    batch = L.Batch(
        mask=torch.ones(7, 1, dtype=torch.bool),
        logp=torch.zeros(7, 1).double(),
        reward=torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]).double(),
        group=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
    )
    rewards = ([0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1.0])
    want = []
    for group in rewards:
        mean, std = statistics.mean([*group, 1.0]), statistics.stdev([*group, 1.0])
        want += [(r - mean) / (std + 1e-6) for r in group]
    assert quiet_loss("ngrpo").credit(batch).advantage[:, 0].tolist() == pytest.approx(want, abs=1e-12)
    assert want[0] < 0 == want[3]


def test_tpos_gradient_is_the_policys_share_of_a_group_less_the_targets():
    generator = torch.Generator().manual_seed(0)
    logp, old = (-torch.rand(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    reward = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    leaf = logp.clone().requires_grad_()
    group = torch.zeros(4, dtype=torch.int64)
    batch = L.Batch(mask=torch.ones(4, 3, dtype=torch.bool), logp=leaf, old_logp=old, reward=reward, group=group)
    quiet_loss("tpo", eta=0.7)(batch).loss.backward()
    u = (reward - reward.mean()) / reward.std(correction=0)
    want = logp.sum(1).softmax(0) - (old.sum(1).log_softmax(0) + u / 0.7).softmax(0)
    torch.testing.assert_close(leaf.grad, want[:, None].expand(4, 3))


def test_up_bounds_the_bad_alone():
    loss = quiet_loss("up_grpo", dual_clip=3.0)
    assert loss.weight(RATIOS, 1.0).tolist() == [1.0] * 7
    assert loss.weight(RATIOS, -1.0).tolist() == [0, 0, 0.9, 1.0, 1.1, 1.3, 0]


def test_aspo_turns_the_ratio_of_the_good_around():
    loss = quiet_loss("aspo", dual_clip=3.0)
    assert loss.weight(RATIOS, 1.0).tolist() == pytest.approx([3.0, 1 / 0.7, 1 / 0.9, 1, 1 / 1.1, 0, 0])
    assert loss.weight(RATIOS, -1.0).tolist() == [0, 0, 0.9, 1.0, 1.1, 1.3, 5.0]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cfpo_is_at_rest_where_the_ratio_has_moved_by_its_width(advantage):
    loss, best = quiet_loss("cfpo", penalty_width=0.3), 1 + math.copysign(0.3, advantage)
    ratio = torch.tensor([best - 0.1, best, best + 0.1], dtype=torch.float64)
    pull = loss.weight(ratio, advantage) * advantage  # of logp, upwards
    assert pull[0] > 0 > pull[2] and abs(float(pull[1])) < 1e-12


def test_cppo_keeps_and_drops_as_its_equation_says():
    generator, delta, budget, floor = torch.Generator().manual_seed(1), 0.15, 0.02, 0.8
    old = -2 * torch.rand(40, generator=generator, dtype=torch.float64)
    logp = (old + 0.4 * torch.randn(40, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    for advantage in (1.0, -1.0):
        spent, weights, kept = 0.0, 0.0, []
        for t in range(40):
            w, q, p = 1 - (1 - floor) / 39 * t, math.exp(old[t]), math.exp(logp[t])
            near = w * abs(p - q) <= min(delta, delta + budget * weights - spent)
            kept.append(near or advantage * (p / q - 1) <= 0)
            spent, weights = spent + w * abs(p - q), weights + w
        leaf = logp[None].clone().requires_grad_()
        batch = L.Batch(
            mask=torch.ones(1, 40, dtype=torch.bool),
            logp=leaf,
            old_logp=old[None],
            advantage=torch.tensor([advantage]).double(),
        )
        quiet_loss("cppo", advantage="given", advantage_scale="none")(batch).loss.backward()
        assert (leaf.grad[0] != 0).tolist() == kept
        assert 5 < sum(kept) < 35
