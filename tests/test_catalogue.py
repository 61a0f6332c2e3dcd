"""The losses beyond the common clip, by hand: typed numbers and plain loops for what no library's data holds."""

import itertools
import math

import pytest
import torch

import lossmith.losses as L
from batches import double, evaluate, no_trap_warnings, normal, quiet_loss, random_fields, single_tokens
from lossmith.losses.axes.shaping import SHAPING
from lossmith.losses.completion.regressions import TERMS
from lossmith.losses.composition.flat import AXES


def same_gradient(a: tuple, b: tuple, factor: float = 1.0) -> None:
    torch.testing.assert_close(factor * a[1]["logp"], b[1]["logp"], rtol=1e-11, atol=1e-14)


# -- estimators, typed from losses.md section 8 ----------------------------------------------------------------------

GROUP_OF_FOUR = {
    # estimator: (A for [1, 0, 0, 0], A for [1, 1, 1, 0])
    "nemo_loo": ([1, -0.57735, -0.57735, -0.57735], [0.57735, 0.57735, 0.57735, -1]),
    "gpg": ([3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1]),
    "maxrl": ([3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1]),
    "pass_at_k": ([1, 0, 0, 0], [0, 0, 0, 0]),
    "opo": ([0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]),
}


def credited(rewards: list, changes: dict, lengths: list | None = None, **fields) -> torch.Tensor:
    """A [N, T] of one group."""
    n = len(rewards)
    lengths = lengths or [1] * n
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = L.Batch(mask=mask, reward=double(rewards), group=torch.zeros(n, dtype=torch.int64), **fields)
    return quiet_loss("reinforce", **changes).credit(batch).advantage


@pytest.mark.parametrize("estimator", GROUP_OF_FOUR)
def test_advantages_of_one_group(estimator):
    for rewards, expected in zip(([1, 0, 0, 0], [1, 1, 1, 0]), GROUP_OF_FOUR[estimator], strict=True):
        got = credited(rewards, {"advantage": estimator})[:, 0]
        torch.testing.assert_close(got, double(expected), rtol=0, atol=2e-5)
    assert not credited([0.3] * 4, {"advantage": estimator}).any()
    assert not credited([1.7], {"advantage": estimator}).any()  # alone: 0, by declaration


def test_pass_at_k_divided_by_the_deviation():
    got = credited([1, 0, 0, 0], {"advantage": "pass_at_k", "advantage_scale": "group_std"})[:, 0]
    torch.testing.assert_close(got, double([2, 0, 0, 0]), rtol=0, atol=1e-5)


def test_equal_others_have_a_deviation_of_exactly_zero():
    """Rounding must not scale the lone winner by 1e16: rewards whose mean is not representable."""
    for dtype in (torch.float32, torch.float64):
        for low in (0.1, 1 / 3, 1e-9, 7.7):
            rewards = torch.tensor([low + 0.6, low, low, low, low, low, low], dtype=dtype)
            batch = L.Batch(mask=torch.ones(7, 1).bool(), reward=rewards, group=torch.zeros(7, dtype=torch.int64))
            for changes in ({"advantage": "nemo_loo"}, {"advantage": "loo", "advantage_scale": "loo_std"}):
                winner = float(quiet_loss("reinforce", **changes).credit(batch).advantage[0, 0])
                assert winner == pytest.approx(0.6, rel=1e-5)


def test_opo_weights_the_mean_by_length():
    got = credited([1, 0], {"advantage": "opo"}, lengths=[3, 1])
    torch.testing.assert_close(got[:, 0], double([1 - 0.75, -0.75]))


def test_remax_and_a_given_baseline():
    greedy = double([0.4, 0.4])
    got = credited([1, 0], {"advantage": "remax"}, lengths=[2, 1], reward_greedy=greedy)
    torch.testing.assert_close(got, double([[0.6, 0.6], [-0.4, 0]]))
    got = credited([1, 0], {"advantage": "baseline"}, baseline=double([0.25, 0.5]))
    torch.testing.assert_close(got[:, 0], double([0.75, -0.5]))


def test_gfpo_keeps_the_shortest_and_the_most_efficient():
    """Rewards 4, 1, 3, 0 with lengths 4, 1, 2, 3: the two shortest are rows 1 and 2."""
    half = math.sqrt(0.5)
    got = credited([4, 1, 3, 0], {"advantage": "gfpo", "keep": 2}, lengths=[4, 1, 2, 3])[:, 0]
    torch.testing.assert_close(got, double([0, -half, half, 0]), rtol=0, atol=1e-6)
    # reward per token 1, 1, 1.5, 0: rows 2 and, of the tie, the first
    by_efficiency = {"advantage": "gfpo", "keep": 2, "metric": "efficiency"}
    got = credited([4, 1, 3, 0], by_efficiency, lengths=[4, 1, 2, 3])[:, 0]
    torch.testing.assert_close(got, double([half, 0, -half, 0]), rtol=0, atol=1e-6)
    with pytest.raises(L.LossError, match="at least 2"):  # one that is kept has nothing to be compared with
        quiet_loss("reinforce", advantage="gfpo", keep=1)


def test_gdpo_by_plain_loops():
    fields = random_fields(0)
    live = fields["mask"].any(1)
    parts, group = fields["reward_parts"], fields["group"]
    got = quiet_loss("reinforce", advantage="gdpo", score_weights=[0.5, 2.0]).credit(L.Batch(**fields)).advantage
    total = torch.zeros(9, dtype=torch.float64)
    for k, weight in enumerate((0.5, 2.0)):
        for i in range(9):
            mates = parts[(group == group[i]) & live, k]
            if live[i] and len(mates) > 1:
                total[i] += weight * (parts[i, k] - mates.mean()) / (mates.std() + 1e-6)
    expected = (total - total[live].mean()) / (total[live].std() + 1e-6)
    for i in range(9):
        assert torch.allclose(got[i][fields["mask"][i]], expected[i], rtol=1e-12)
    with pytest.raises(L.LossError, match=r"score_weights has 3 numbers, but .* 2 scores"):
        quiet_loss("reinforce", advantage="gdpo", score_weights=[1, 1, 1]).credit(L.Batch(**fields))


def test_the_optimal_token_baseline_by_plain_loops():
    fields = random_fields(1)
    mask, group = fields["mask"], fields["group"]
    old, square, reward = fields["old_logp"].exp(), fields["sum_prob_sq"], fields["reward"]
    weights = {}  # (row, number of the token) -> W
    for i in range(9):
        running = 0.0
        for k, t in enumerate(mask[i].nonzero()[:, 0].tolist()):
            running += float(1 - 2 * old[i, t] + square[i, t])
            weights[i, k] = running
    got = quiet_loss("reinforce", advantage="otb").credit(L.Batch(**fields)).advantage
    for i in range(9):
        for k, t in enumerate(mask[i].nonzero()[:, 0].tolist()):
            mates = [j for j in range(9) if group[j] == group[i] and (j, k) in weights]
            top = sum(float(reward[j]) * weights[j, k] for j in mates)
            expected = float(reward[i]) - top / (sum(weights[j, k] for j in mates) + 1e-8)
            assert float(got[i, t]) == pytest.approx(expected, rel=1e-10)


def test_vapo_by_hand():
    """T = 40, alpha .05: lam = 1 - 1/2; the critic's target is the plain return."""
    values = normal(0, 1, 40)
    batch = L.Batch(
        torch.zeros(1, 40).double(), torch.ones(1, 40).bool(), reward=double([2.0]), value=values, old_value=values
    )
    loss = quiet_loss("vapo")
    credit = loss.credit(batch)
    advantage = 0.0
    for t in reversed(range(40)):
        after = float(values[0, t + 1]) if t < 39 else 0.0
        delta = (2.0 if t == 39 else 0.0) + after - float(values[0, t])
        advantage = delta + 0.5 * advantage
        assert float(credit.advantage[0, t]) == pytest.approx(advantage, rel=1e-12)
    torch.testing.assert_close(credit.returns, torch.full((1, 40), 2.0).double())
    # short completions have lam 0, not a negative one: the temporal-difference error
    short = random_fields(0)
    td = quiet_loss("reinforce", advantage="td").credit(L.Batch(**short)).advantage
    torch.testing.assert_close(loss.credit(L.Batch(**short)).advantage, td)
    # and imitation of what went well: 0.1 of the log-likelihood where A > 0
    out = loss(batch)
    good = (credit.advantage > 0).double()
    assert float(out.terms["nll_positive"]) == pytest.approx(0.0)  # logp is 0 here
    with no_trap_warnings():
        bare = loss.replace(extra=L.NoExtra())
    gap = loss.closed_form_gradient(batch) - bare.closed_form_gradient(batch)
    torch.testing.assert_close(gap, -0.1 * good / 40)


def test_the_gap_to_the_reference_or_a_teacher_is_the_reverse_kl_by_policy_gradient():
    fields = random_fields(0)
    for name, anchor in (("reference_gap", "ref_logp"), ("teacher_gap", "teacher_logp")):
        got = quiet_loss("opd", advantage=name).credit(L.Batch(**fields)).advantage
        torch.testing.assert_close(got, (fields[anchor] - fields["old_logp"]) * fields["mask"])


def test_potential_shaping_leaves_the_sum_as_it_was_but_for_the_start():
    """Σ_t (r_t + Φ_{t+1} - Φ_t) = Σ r_t - Φ at the first token."""
    fields = random_fields(0)
    loss = quiet_loss("reinforce", advantage="return", shaping=["potential"])
    got = loss.credit(L.Batch(**fields)).advantage
    for i in range(9):
        where = fields["mask"][i].nonzero()[:, 0]
        if len(where):
            expected = float(fields["reward"][i] - fields["potential"][i, where[0]])
            assert float(got[i, where[0]]) == pytest.approx(expected, rel=1e-12)


# -- trust regions, by hand ------------------------------------------------------------------------------------------


def test_bapo_raises_its_bounds_until_good_actions_carry_their_share():
    """Ratio .5 with A = -4 and ratio 2 with A = 1: P = min(2, hi), Q = 4·max(.5, lo)."""
    fields = single_tokens([2.0, 0.5], 1.0) | {"advantage": double([1.0, -4.0])}

    def bounds(**changes):
        loss = quiet_loss("bapo", **changes)
        at = loss._tokens(L.Batch(**fields), loss.credit(L.Batch(**fields)))
        return loss.trust._range(at.detach())

    # with target .35 the start is short (1.2/3.6 = .33); raising the lower bound only adds to Q; then hi 1.6 and on
    low, high = bounds(low_step=0.1, high_step=0.4, target=0.35)
    assert low == pytest.approx(0.9) and high == pytest.approx(2.0)  # 2/(2 + 3.6) = .357
    assert bounds(low_step=0.1, high_step=0.4, target=0.3) == (0.6, 1.2)  # enough at the start
    assert bounds(low_step=0.1, high_step=0.4, target=0.99) == (0.9, 3.0)  # never enough
    # the weight at those bounds: ratio 2 is inside (0.9, 2.0]
    closed = quiet_loss("bapo", low_step=0.1, high_step=0.4, target=0.35).closed_form_gradient(L.Batch(**fields))
    torch.testing.assert_close(closed[:, 0], double([-2 * 1 / 2, 0.0]))


def test_luffy_by_hand():
    """Own completion: -A·r. The other policy's: -A·p/(p + .1), slope p·.1/(p + .1)²."""
    logp = double([[math.log(0.4)], [math.log(0.05)]])
    batch = L.Batch(
        logp.requires_grad_(),
        torch.ones(2, 1).bool(),
        old_logp=double([[math.log(0.2)], [0.0]]),
        advantage=double([1.0, 2.0]),
        off_policy=torch.tensor([False, True]),
    )
    out = quiet_loss("luffy", max_length=1)(batch)
    expected = (-1.0 * 2 - 2 * 0.05 / 0.15) / 2
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-12)
    grad = torch.autograd.grad(out.loss, logp)[0]
    torch.testing.assert_close(grad[:, 0], double([-2.0 / 2, -2 * 0.05 * 0.1 / 0.15**2 / 2]))


TOKEN_MEAN = {"aggregate": "token_mean"}


def test_quadratic_pull_to_the_old_policy():
    """dro with tau 0 is REINFORCE; with A = 0 only the pull is left."""
    fields = random_fields(0) | {"advantage": normal(1, 9)}
    same_gradient(evaluate(quiet_loss("dro", tau=0), fields), evaluate(quiet_loss("reinforce", **TOKEN_MEAN), fields))
    still = fields | {"advantage": torch.zeros(9).double()}
    grad = evaluate(quiet_loss("dro", tau=0.4), still)[1]["logp"]
    mask = fields["mask"]
    torch.testing.assert_close(grad, 0.4 * (fields["logp"] - fields["old_logp"]) * mask / mask.sum())


def test_the_random_share_of_clip_cov_is_seeded_and_of_the_right_size():
    fields = random_fields(0) | {"advantage": normal(1, 9, 8)}
    settings = {"fraction": 0.2, "cov_low": -100, "cov_high": 100, "clip_low": 5, "clip_high": 100}
    grads = [evaluate(quiet_loss("clip_cov", seed=s, **settings), fields)[1]["logp"] for s in (0, 0, 1)]
    valid = int(fields["mask"].sum())
    dropped = [fields["mask"] & (g == 0) for g in grads]
    assert all(int(d.sum()) == int(0.2 * valid) for d in dropped)
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])


def test_covariance_does_not_depend_on_the_normalizer():
    """Chosen by unscaled advantages: the same tokens under any aggregation (losses.md, section 9, 2 and 3)."""
    fields = random_fields(0) | {"advantage": normal(1, 9, 8)}
    for name in ("clip_cov", "kl_cov"):
        settings = {"fraction": 0.2} | ({"cov_low": 0.1, "cov_high": 9} if name == "clip_cov" else {})
        sums = evaluate(quiet_loss(name, aggregate="token_sum", **settings), fields)
        means = evaluate(quiet_loss(name, aggregate="token_mean", **settings), fields)
        same_gradient(means, sums, factor=float(fields["mask"].sum()))


def test_top_entropy_takes_its_quantile_over_valid_tokens():
    fields = random_fields(0) | {"advantage": torch.ones(9).double()}
    grad = evaluate(quiet_loss("reinforce", **TOKEN_MEAN, token_mask="top_entropy", top_entropy=0.3), fields)[1]["logp"]
    entropy = fields["entropy"][fields["mask"]]
    bound = torch.quantile(entropy, 0.7)
    assert torch.equal(grad != 0, fields["mask"] & (fields["entropy"] >= bound))
    assert torch.allclose(grad[grad != 0], double(-1 / len(entropy)))  # the normalizer keeps all tokens


def test_staleness_and_opsm_keep_the_normalizer():
    fields = random_fields(0) | {"advantage": -torch.ones(9).double()}
    fresh = evaluate(quiet_loss("reinforce", **TOKEN_MEAN, sequence_mask="staleness", max_lag=0), fields)[1]["logp"]
    rows = (fields["lag"] == 0)[:, None] & fields["mask"]
    assert torch.equal(fresh != 0, rows) and torch.allclose(fresh[rows], 1 / fields["mask"].sum().double())
    near = evaluate(quiet_loss("reinforce", sequence_mask="opsm", opsm_delta=0.05), fields)[1]["logp"]
    gap = ((fields["behavior_logp"] - fields["logp"]) * fields["mask"]).sum(1) / fields["mask"].sum(1).clamp(min=1)
    assert torch.equal(near != 0, (gap <= 0.05)[:, None] & fields["mask"])


# -- identities (losses.md, section 5) --------------------------------------------------------------------------------

AT_ONE = ("importance_sampling", "ppo", "cispo", "sapo", "vespo", "gppo", "dcpo", "gspo_token", "dro", "kimi_opmd")


@pytest.mark.parametrize("name", [*AT_ONE, "tis_pg", "topr", "gspo", "gmpo", "luspo", "ce_gppo", "dppo_tv", "fipo"])
def test_on_policy_every_one_of_them_is_reinforce(name):
    fields = {k: v for k, v in random_fields(0).items() if k != "old_logp"} | {"advantage": normal(1, 9)}
    how = {"aggregate": "seq_mean_token_mean"} if name in ("gspo", "gmpo") else {"aggregate": "token_mean"}
    how = {"aggregate": "seq_mean_token_sum"} if name == "luspo" else how
    changes = how if name != "luspo" else {}
    same_gradient(evaluate(quiet_loss(name, **changes), fields), evaluate(quiet_loss("reinforce", **how), fields))


def test_topr_on_rewarded_rows_is_reinforce():
    fields = random_fields(0) | {"reward": normal(3, 9).abs() + 0.1}
    how = {"advantage": "group", "aggregate": "token_mean"}
    same_gradient(evaluate(quiet_loss("topr"), fields), evaluate(quiet_loss("reinforce", **how), fields))


def test_cispo_capped_at_one_is_truncated_importance_sampling():
    fields = random_fields(0) | {"advantage": normal(1, 9)}
    same_gradient(evaluate(quiet_loss("cispo", cap=1), fields), evaluate(quiet_loss("tis_pg"), fields))


def test_gppo_inside_its_band_is_ppo_and_ce_gppo_without_its_betas_has_its_gradient():
    near = random_fields(0, 0.05) | {"advantage": normal(1, 9)}
    how = {"clip_low": 0.2, "clip_high": 0.28}
    same_gradient(evaluate(quiet_loss("gppo"), near), evaluate(quiet_loss("ppo", value_coef=0, **how), near))
    far = random_fields(0, 0.8) | {"advantage": normal(1, 9)}
    cut = quiet_loss("ce_gppo", beta_low=0, beta_high=0)
    same_gradient(evaluate(cut, far), evaluate(quiet_loss("ppo", value_coef=0, dual_clip=3, **how), far))


def test_values_at_one():
    assert float(quiet_loss("sapo").weight(1.0, 1.0)) == pytest.approx(1) == float(quiet_loss("sapo").weight(1.0, -1.0))
    assert float(quiet_loss("vespo").weight(1.0, 1.0)) == 1 == float(quiet_loss("vespo").weight(1.0, -1.0))


# -- losses of whole completions --------------------------------------------------------------------------------------


def completions(seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """(fields, Λ against the reference, Λ against the old policy)."""
    fields = random_fields(seed)
    return fields, *(((fields["logp"] - fields[k]) * fields["mask"]).sum(1) for k in ("ref_logp", "old_logp"))


def groups_of(fields: dict) -> list[list[int]]:
    live = fields["mask"].any(1)
    ids = fields["group"].tolist()
    return [[i for i in range(9) if ids[i] == g and live[i]] for g in sorted(set(ids))]


def test_online_dpo_and_ipo_by_plain_loops():
    fields, lam, _ = completions()
    r = fields["reward"].tolist()
    for pairs in ("best_worst", "all"):
        margins = []
        for members in groups_of(fields):
            if pairs == "all":
                margins += [float(lam[i] - lam[j]) for i, j in itertools.permutations(members, 2) if r[i] > r[j]]
            elif len({r[i] for i in members}) > 1:
                margins.append(float(lam[max(members, key=r.__getitem__)] - lam[min(members, key=r.__getitem__)]))
        assert len(margins) > 2
        dpo = sum(math.log1p(math.exp(-0.3 * d)) for d in margins) / len(margins)
        got = evaluate(quiet_loss("online_dpo", beta=0.3, pairs=pairs), fields)[0]
        assert float(got.loss.detach()) == pytest.approx(dpo, rel=1e-12)
        ipo = sum((d - 1 / 0.6) ** 2 for d in margins) / len(margins)
        got = evaluate(quiet_loss("online_ipo", beta=0.3, pairs=pairs), fields)[0]
        assert float(got.loss.detach()) == pytest.approx(ipo, rel=1e-12)
        assert got.metrics["units"] == len(margins)


def test_swapping_the_rewards_of_a_pair_turns_its_margin_round():
    fields, lam, _ = completions()
    two = {k: v[[0, 2]] for k, v in fields.items()}
    margin = float(lam[0] - lam[2])
    for rewards, sign in (([1.0, 0.0], 1), ([0.0, 1.0], -1)):
        got = evaluate(quiet_loss("online_dpo"), two | {"reward": double(rewards)})[0]
        assert float(got.loss.detach()) == pytest.approx(math.log1p(math.exp(-0.1 * sign * margin)), rel=1e-12)


def test_ties_make_no_pair():
    fields = random_fields(0) | {"reward": torch.zeros(9).double()}
    for name in ("online_dpo", "online_ipo"):
        out, grads = evaluate(quiet_loss(name), fields)
        assert float(out.loss.detach()) == 0 and not grads["logp"].any() and out.metrics["units"] == 0


def test_online_kto_by_hand():
    fields, lam, _ = completions()
    live = fields["mask"].any(1)
    z = max(0.0, float(lam[live].mean()))
    total = 0.0
    for i in live.nonzero()[:, 0].tolist():
        good = float(fields["reward"][i]) > 0.2
        x = 0.5 * (float(lam[i]) - z) * (1 if good else -1)
        total += (2.0 if good else 0.7) * (1 - 1 / (1 + math.exp(-x)))
    loss = quiet_loss("online_kto", beta=0.5, lam_d=2.0, lam_u=0.7, threshold=0.2)
    assert float(evaluate(loss, fields)[0].loss.detach()) == pytest.approx(total / int(live.sum()), rel=1e-12)


def test_a2po_sppo_gvpo_by_hand():
    fields, lam, old = completions()
    live = fields["mask"].any(1).nonzero()[:, 0].tolist()
    reward, theirs = fields["reward"], fields["reference_reward"]
    best = [0.4 * math.log(sum(math.exp(float(x) / 0.4) for x in theirs[i]) / 5) for i in range(9)]
    expected = sum((0.3 * float(lam[i]) - (float(reward[i]) - best[i])) ** 2 for i in live) / len(live)
    got = evaluate(quiet_loss("a2po", beta1=0.4, beta2=0.3), fields)[0].loss
    assert float(got.detach()) == pytest.approx(expected, rel=1e-12)
    expected = sum((float(old[i]) - 0.8 * float(reward[i])) ** 2 for i in live) / len(live)
    assert float(evaluate(quiet_loss("sppo", eta=0.8), fields)[0].loss.detach()) == pytest.approx(expected, rel=1e-12)
    total, several = 0.0, [m for m in groups_of(fields) if len(m) > 1]
    for members in several:
        mean_l, mean_r = (sum(float(x[i]) for i in members) / len(members) for x in (old, reward))
        gaps = [0.6 * (float(old[i]) - mean_l) - (float(reward[i]) - mean_r) for i in members]
        total += sum(0.5 * g * g for g in gaps) / (len(members) - 1)
    got = evaluate(quiet_loss("gvpo", beta=0.6), fields)[0].loss
    assert float(got.detach()) == pytest.approx(total / len(several), rel=1e-12)


def test_real_by_hand():
    fields, _, old = completions()
    lengths, reward = fields["mask"].sum(1), fields["reward"]
    total, groups = 0.0, groups_of(fields)
    for members in groups:
        mean = sum(float(reward[i]) for i in members) / len(members)
        bad = [float(old[i] / lengths[i]) / 0.7 for i in members if float(reward[i]) <= mean]
        good = [-float(old[i] / lengths[i]) / 0.7 for i in members if float(reward[i]) > mean]
        if len(members) > 1:
            total += math.log(1 + sum(map(math.exp, bad))) + math.log(1 + sum(map(math.exp, good)))
    got = evaluate(quiet_loss("real", tau=0.7), fields)[0].loss
    assert float(got.detach()) == pytest.approx(total / len(groups), rel=1e-12)


def test_best_of_n_imitates_one_completion_a_group():
    fields = random_fields(0)
    out, grads = evaluate(quiet_loss("best_of_n"), fields)
    winners = [max(members, key=lambda i: float(fields["reward"][i])) for members in groups_of(fields)]
    rows = torch.zeros(9).bool().index_fill(0, torch.tensor(winners), True)[:, None] & fields["mask"]
    torch.testing.assert_close(grads["logp"], -rows.double() / len(winners))
    assert float(out.loss.detach()) == pytest.approx(-float(fields["logp"][rows].sum()) / len(winners), rel=1e-12)


def test_rejection_sampling_imitates_what_is_above_the_threshold():
    fields = random_fields(0)
    rows = (fields["reward"] > 0.1) & fields["mask"].any(1)
    grads = evaluate(quiet_loss("rejection_sampling", threshold=0.1), fields)[1]["logp"]
    torch.testing.assert_close(grads, -(rows[:, None] & fields["mask"]).double() / rows.sum())


@pytest.mark.parametrize("name", ["online_dpo", "online_ipo", "gvpo", "real", "sppo", "a2po", "online_kto"])
def test_losses_of_completions_add_up_over_ranks(name):
    loss, fields = quiet_loss(name), random_fields(0)
    if loss.coupling == "batch":
        return
    whole, grads = evaluate(loss, fields)
    halves = [torch.isin(fields["group"], torch.tensor(g)) for g in ([5, 9], [2, 7])]
    shares = [{k: v[h] for k, v in fields.items()} for h in halves]
    counts = sum((loss.counts(L.Batch(**s)) for s in shares[1:]), loss.counts(L.Batch(**shares[0])))
    total = sum(float(loss(L.Batch(**s), counts).loss.detach()) for s in shares)
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    assert grads["logp"].abs().sum() > 0


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_catalogue_holds_what_the_field_has():
    named = [n for n in L.CATALOGUE if "@" not in n]
    assert len(named) >= 60 and len(L.CATALOGUE) >= 120
    assert {n.split("@")[1] for n in L.CATALOGUE if "@" in n} >= {
        "trl",
        "verl",
        "openrlhf",
        "skyrl",
        "nemo_rl",
        "slime",
    }


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *[("raft", "best_of_n"), ("oaif", "online_dpo"), ("REINFORCE++", "reinforce_pp"), ("Clip-Cov", "clip_cov")],
        *[("pg", "reinforce"), ("dr.grpo", "dr_grpo"), ("a*-po", "a2po"), ("GRPO", "grpo"), ("hinge", "dpo_hinge")],
    ],
)
def test_names_people_search_for(alias, name):
    assert L.find_entry(alias).name == name


def test_presets_differ_from_their_base_exactly_where_they_say():
    """Typed from the libraries' own defaults (losses.md, section 4)."""
    weights = {n: [float(quiet_loss(n).weight(r, -1.0)) for r in (0.5, 2.5, 10.0)] for n in ("grpo@trl", "grpo@verl")}
    assert weights == {"grpo@trl": [0, 2.5, 10], "grpo@verl": [0, 2.5, 0]}  # verl's dual clip of 3 is always on
    winner = {
        n: float(quiet_loss(n).credit(winner_of_four()).advantage[0, 0])
        for n in ("grpo@trl", "grpo@verl", "grpo@nemo_rl", "grpo@open_instruct", "rloo@trl")
    }
    typed = {"grpo@trl": 1.4997, "grpo@verl": 1.5, "grpo@nemo_rl": 1.0, "grpo@open_instruct": 0.75, "rloo@trl": 1.0}
    assert winner == pytest.approx(typed, abs=5e-5)
    assert float(quiet_loss("grpo@verl").credit(alone()).advantage[0, 0]) == pytest.approx(1.0)
    assert float(quiet_loss("grpo").credit(alone()).advantage[0, 0]) == 0


def winner_of_four() -> L.Batch:
    logp = torch.zeros(4, 1).double()
    policies = dict.fromkeys(("old_logp", "ref_logp", "behavior_logp"), logp)
    group = torch.zeros(4, dtype=torch.int64)
    return L.Batch(logp, torch.ones(4, 1).bool(), reward=double([1, 0, 0, 0]), group=group, **policies)


def alone() -> L.Batch:
    return winner_of_four().rows(slice(0, 1))


def test_what_is_missing_is_named():
    with pytest.raises(L.LossError, match="m2_threshold, which has no agreed default: pass m2_threshold"):
        L.get_loss("m2po")(L.Batch(**random_fields(0)))
    with pytest.raises(L.LossError, match=r"online_dpo has no parameter 'bta'.*'beta'"):
        L.get_loss("online_dpo", bta=0.1)
    with pytest.raises(L.LossError, match=r"gamma is .* both read it, so it must agree"):
        L.get_loss("fipo", advantage="return", advantage_scale="none")
    with pytest.raises(L.LossError, match="ratio of each token"):
        L.get_loss("dcpo", ratio_level="sequence")


# -- edges that only a small batch shows -------------------------------------------------------------------------------


def test_a_missing_reward_is_the_sum_of_its_parts():
    batch = L.Batch(mask=torch.ones(2, 1).bool(), reward_parts=double([[0.25, 0.5, 1.0], [2.0, 0.0, 0.0]]))
    torch.testing.assert_close(batch.reward, double([1.75, 2.0]))


def test_a_prompt_without_a_token_is_not_counted():
    """Three prompts, one of them with an empty completion only: the mean over prompts is over two."""
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    logp = torch.zeros(3, 2).double().requires_grad_()
    batch = L.Batch(logp, mask, group=torch.tensor([0, 1, 2]), advantage=double([1.0, 1.0, 1.0]))
    loss = quiet_loss("reinforce", aggregate="prompt_mean")
    grad = torch.autograd.grad(loss(batch).loss, logp)[0]
    torch.testing.assert_close(grad, double([[-0.25, -0.25], [-0.5, 0.0], [0.0, 0.0]]))
    assert L.Normalizer.of(mask, torch.tensor([0, 1, 2])).groups == 2
    paired = quiet_loss("real")
    assert paired.counts(batch.replace(reward=double([1.0, 2.0, 3.0]))).units == 2


def test_ties_go_to_the_first():
    fields = {"reward": double([1.0, 1.0, 0.0]), "group": torch.zeros(3, dtype=torch.int64)}
    batch = L.Batch(torch.zeros(3, 1).double(), torch.ones(3, 1).bool(), **fields)
    assert quiet_loss("best_of_n").token_weights(batch)[:, 0].tolist() == [1, 0, 0]
    dpo = quiet_loss("online_dpo", beta=1.0).closed_form_gradient(
        L.Batch(torch.zeros(4, 1).double(), torch.ones(4, 1).bool(), ref_logp=torch.zeros(4, 1).double(),
                reward=double([0.0, 1.0, 1.0, 0.0]), group=torch.zeros(4, dtype=torch.int64))
    )  # fmt: skip
    torch.testing.assert_close(dpo[:, 0], double([0.5, -0.5, 0.0, 0.0]))


def test_a_reward_sits_on_the_last_valid_token_wherever_that_stands():
    mask = torch.tensor([[False, True, True, False], [True, False, True, False], [False, False, False, True]])
    batch = L.Batch(mask=mask, reward=double([1.0, 2.0, 3.0]), value=torch.zeros(3, 4).double())
    got = quiet_loss("reinforce", advantage="td").credit(batch).advantage
    torch.testing.assert_close(got, double([[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 3]]))


def test_a_reward_at_a_threshold_is_not_above_it():
    fields = {"reward": double([0.5, 0.6]), "ref_logp": torch.zeros(2, 1).double()}
    batch = L.Batch(double([[0.3], [0.3]]), torch.ones(2, 1).bool(), **fields)
    assert quiet_loss("rejection_sampling", threshold=0.5).token_weights(batch)[:, 0].tolist() == [0, 1]
    slope = quiet_loss("online_kto", threshold=0.5, beta=1.0).closed_form_gradient(batch)[:, 0]
    assert slope[0] > 0 > slope[1]


def test_all_pairs_put_the_better_completion_first():
    fields = {"reward": double([0.0, 2.0, 1.0]), "group": torch.zeros(3, dtype=torch.int64)}
    batch = L.Batch(torch.zeros(3, 1).double(), torch.ones(3, 1).bool(), ref_logp=torch.zeros(3, 1).double(), **fields)
    grad = quiet_loss("online_dpo", beta=1.0, pairs="all").closed_form_gradient(batch)[:, 0]
    torch.testing.assert_close(grad, double([1 / 3, -1 / 3, 0.0]))


def test_potential_shaping_discounts_the_potential_that_follows():
    """gamma .5, potentials 1, 2, 4: r_t + .5·Φ_{t+1} - Φ_t = 0, 0, 3 - 4."""
    batch = L.Batch(mask=torch.ones(1, 3).bool(), reward=double([3.0]), potential=double([[1.0, 2.0, 4.0]]))
    shaped = L.Potential(gamma=0.5)(batch.reward, batch)
    torch.testing.assert_close(shaped, double([[0.0, 0.0, -1.0]]))


def test_counts_that_do_not_say_what_a_loss_averages_over_are_refused():
    batch = L.Batch(**random_fields(0))
    with pytest.raises(L.LossError, match=r"make it with loss\.counts\(batch\)"):
        quiet_loss("online_dpo")(batch, L.Normalizer.of(batch.mask, batch.group))


def test_vapo_counts_tokens_not_columns():
    """A completion of 40 tokens in a row of 60 has the advantages it has in a row of 40."""
    values = normal(0, 1, 60)
    found = []
    for width in (40, 60):
        mask, value = (torch.arange(width) < 40)[None], values[:, :width]
        batch = L.Batch(mask=mask, reward=double([2.0]), value=value, old_value=value)
        found.append(quiet_loss("vapo").credit(batch).advantage[:, :40])
    torch.testing.assert_close(*found)


def test_entropy_and_kl_may_be_aggregated_otherwise():
    fields = random_fields(0) | {"advantage": torch.zeros(9).double()}
    rows, tokens = int(fields["mask"].any(1).sum()), int(fields["mask"].sum())
    both = {"entropy_coef": 0.3, "beta": 0.2, "kl_estimator": "k2", "aggregate": "token_mean"}
    sums = {"entropy_aggregate": "seq_mean_token_sum", "kl_aggregate": "seq_mean_token_sum"}
    kappa = (fields["logp"] - fields["ref_logp"]) * fields["mask"]
    for changes, share in ((both, 1 / tokens), (both | sums, 1 / rows)):
        grads = evaluate(quiet_loss("grpo", **changes), fields)[1]
        torch.testing.assert_close(grads["entropy"], -0.3 * share * fields["mask"].double())
        torch.testing.assert_close(grads["logp"], 0.2 * share * kappa)


def test_the_advantage_is_bounded_on_both_sides_and_multiplied_before():
    got = credited([3, 0, 0], {"advantage": "group", "advantage_mul": 0.5, "advantage_clip": 0.4})[:, 0]
    torch.testing.assert_close(got, double([0.4, -0.4, -0.4]))
    got = credited([3, 0, 0], {"advantage": "group", "advantage_mul": 0.1, "advantage_clip": 0.15})[:, 0]
    torch.testing.assert_close(got, double([0.15, -0.1, -0.1]))


# the word of an axis, where it follows the option's name in that of the class: TokenRatio is ratio_level="token"
WORDS = {"ratio_level": "ratio", "shaping": "reward", "group_filter": "filter", "token_mask": "mask"}
WORDS |= {"sequence_mask": "mask", "advantage_scale": "scale"}


@pytest.mark.parametrize("axis, known", [*AXES.items(), ("shaping", SHAPING), ("completion", TERMS)])
def test_the_class_of_an_option_has_its_name(axis, known):
    """GroupStd is "group_std", TVMask is "tv_mask"; No... is "none"."""
    for option, piece in known.items():
        word = WORDS.get(axis, axis)
        name = "no" + word if option == "none" else option.replace("_", "")
        assert piece.__name__.lower() in (name, name + word), f"{axis}={option!r} is {piece.__name__}"


def test_no_option_means_one_thing_on_one_axis_and_another_on_another():
    homes = [(option, piece) for known in AXES.values() for option, piece in known.items() if option != "none"]
    assert len(dict(homes)) == len(homes)
