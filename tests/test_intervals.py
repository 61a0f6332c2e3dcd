"""Intervals hold what they promise, against other libraries and by simulation; verdicts say no more than they bear."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from lossmith.intervals import FEWEST, doubt, mean_of, share_across, share_of, verdict

# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 12, 48, 500])
def test_a_mean_has_students_interval(n):
    values = np.random.default_rng(n).normal(3, 2, n).tolist()
    found = mean_of(values)
    low, high = scipy.stats.t.interval(0.95, n - 1, np.mean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), n)


@pytest.mark.parametrize(("won", "n"), [(0, 4), (4, 4), (1, 1), (3, 10), (10, 10), (35, 48), (48, 48), (700, 1000)])
def test_a_share_has_the_interval_of_clopper_and_pearson(won, n):
    found = share_of([1.0] * won + [0.0] * (n - won))
    assert (found.low, found.high) == pytest.approx(proportion_confint(won, n, 0.05, "beta"), rel=1e-9)
    assert found.mean == won / n and found.n == n


def test_four_of_four_is_not_certainty():
    found = share_of([1.0] * 4)
    assert found.low == pytest.approx(0.025**0.25) and found.high == 1.0  # 0.398, by hand


def test_a_tie_is_half_a_win_and_never_narrows_the_interval():
    """Eight ties among 20: the interval of 10 wins of 20, though nothing is known to vary."""
    ties = share_of([1.0] * 6 + [0.5] * 8 + [0.0] * 6)
    assert (ties.low, ties.high) == pytest.approx(proportion_confint(10, 20, 0.05, "beta"))
    still = share_of([0.5] * 20)
    assert still.low < 0.3 and still.high > 0.7


def test_a_prompt_of_many_comparisons_counts_for_more_than_one_but_for_no_more_than_they():
    apart = share_of([0.0, 1.0] * 10, 120)  # each prompt all right or all wrong: 20 pieces of evidence
    assert (apart.low, apart.high) == pytest.approx(proportion_confint(10, 20, 0.05, "beta"))
    even = share_of([0.5, 0.51] * 10, 120)  # more alike than chance would have them: 120 and no more
    assert even.high - even.low == pytest.approx(np.diff(proportion_confint(60.6, 120, 0.05, "beta"))[0], rel=0.01)


# -- never without width ----------------------------------------------------------------------------------------------


def test_values_that_are_all_alike_bound_how_rare_others_are():
    """n = 20 of one value: others are below 1 - 0.025^(1/20) = 16.8% of all, and lie in [0, 1]."""
    found = mean_of([0.3] * 20, within=(0.0, 1.0))
    rare = proportion_confint(0, 20, 0.05, "beta")[1]
    assert (found.low, found.high) == pytest.approx((0.3 - rare * 0.3, 0.3 + rare * 0.7))
    change = mean_of([1.0] * 12, within=(-1.0, 1.0))  # from 0 to 1 on every prompt
    assert change.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 12))) and change.high == 1.0
    rounding = [0.1 + 0.2, 0.3, 0.3, 0.3]
    assert rounding[0] != 0.3 and math.isnan(mean_of(rounding).low)  # not 0.3 ± 1e-17


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0], [0.0] * 50])
def test_where_nothing_is_known_of_other_values_there_is_no_interval(values):
    found = mean_of(values)
    assert math.isnan(found.low) and math.isnan(found.high) and found.n == len(values)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["ci95_low"] is None


def test_no_sample_gives_an_interval_without_width():
    draw = np.random.default_rng(0)
    for _ in range(400):
        n = int(draw.integers(1, 15))
        values = draw.choice([0.0, 0.5, 1.0], n, p=draw.dirichlet([0.3, 0.3, 0.3])).tolist()
        for found in (share_of(values), share_of(values, 6 * n), mean_of(values, (0.0, 1.0)), mean_of(values)):
            assert math.isnan(found.low) or found.high - found.low > 0.01


# -- coverage ---------------------------------------------------------------------------------------------------------


def coverage(draw, truth, interval, tries=800):
    """How often the interval of a drawn sample holds the truth."""
    found = [interval(draw()) for _ in range(tries)]
    return sum(i.low <= truth <= i.high for i in found) / tries


@pytest.mark.parametrize("n", [4, FEWEST, 20, 48])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_shares_hold_their_95_percent(n, p):
    rng = np.random.default_rng(round(1000 * p) + n)
    wins = coverage(lambda: (rng.random(n) < p).astype(float), p, share_of)
    ties = coverage(lambda: rng.choice([0, 0.5, 1], n, p=[(1 - p) * 0.6, 0.4, p * 0.6]), p * 0.6 + 0.2, share_of)
    six = coverage(lambda: rng.binomial(6, p, n) / 6, p, lambda v: share_of(v, 6 * n))
    prompts = coverage(lambda: rng.binomial(6, rng.beta(3 * p, 3 - 3 * p, n)) / 6, p, lambda v: share_of(v, 6 * n))
    assert min(wins, ties, six, prompts) > 0.93


@pytest.mark.parametrize("n", [FEWEST, 20, 48])
def test_means_hold_theirs(n):
    rng = np.random.default_rng(n)
    assert coverage(lambda: rng.normal(1, 2, n), 1, mean_of) > 0.93
    assert coverage(lambda: rng.random(n), 0.5, mean_of) > 0.93
    assert coverage(lambda: rng.exponential(1, n), 1, mean_of) > 0.88  # skewed: what Student's t gives at so few
    # most prompts unchanged, as after a short run: many samples are all 0, and those hold the truth too
    rare = coverage(lambda: rng.choice([-1.0, 0, 1], n, p=[0.01, 0.95, 0.04]), 0.03, lambda v: mean_of(v, (-1, 1)))
    assert rare > 0.92


@pytest.mark.parametrize(("good", "bad"), [(20, 20), (8, 40)])
def test_pairs_between_prompts_hold_theirs_though_a_prompt_is_in_many(good, bad):
    """Φ(1/√2) = 0.76 of the pairs of N(1, 1) and N(0, 1) are right. By row as if independent: too short."""
    rng = np.random.default_rng(good)
    truth = scipy.stats.norm.cdf(1 / math.sqrt(2))

    def draw():
        better, worse = rng.normal(1, 1, good), rng.normal(0, 1, bad)
        return [(f"g{i}", f"b{j}", float(x > y)) for i, x in enumerate(better) for j, y in enumerate(worse)]

    def rows(pairs):
        by_row = {}
        for g, b, value in pairs:
            by_row.setdefault(g, []).append(value)
            by_row.setdefault(b, []).append(value)
        return mean_of([float(np.mean(v)) for v in by_row.values()])

    def contributions(pairs):
        return mean_of(list(share_across(pairs)[1].values()))

    assert coverage(draw, truth, lambda pairs: share_across(pairs)[0], 250) > 0.91
    assert coverage(draw, truth, contributions, 250) > 0.88
    assert coverage(draw, truth, rows, 250) < 0.85  # a mistake that such figures invite


def test_contributions_have_delongs_variance():
    """DeLong, DeLong and Clarke-Pearson 1988: Var(AUC) = S10/m + S01/n, from the placements of both kinds."""
    rng = np.random.default_rng(5)
    better, worse = rng.normal(1, 1, 9), rng.normal(0, 1, 31)
    won = (better[:, None] > worse).astype(float)
    pairs = [(f"g{i}", f"b{j}", won[i, j]) for i in range(9) for j in range(31)]
    found, parts = share_across(pairs)
    placed = won.mean(1), won.mean(0)
    values = np.array(list(parts.values()))
    assert found.mean == pytest.approx(won.mean()) == pytest.approx(values.mean()) and found.n == 40
    delong = placed[0].var(ddof=0) / 9 + placed[1].var(ddof=0) / 31
    assert values.var(ddof=0) / 40 == pytest.approx(delong)


def test_perfect_order_between_prompts_is_no_more_than_its_separate_pairs_say():
    pairs = [(f"g{i}", f"b{j}", 1.0) for i in range(3) for j in range(40)]
    found, _ = share_across(pairs)
    assert (found.low, found.high) == pytest.approx(proportion_confint(3, 3, 0.05, "beta"))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def change(low, high, n=48):
    return {"mean": (low + high) / 2, "ci95_low": low, "ci95_high": high, "n": n}


def test_a_verdict_follows_the_interval_and_the_number():
    assert verdict(change(0.1, 0.2), "held-out score").startswith("Held-out score rose")
    assert verdict(change(-0.2, -0.1), "watched score").startswith("Watched score FELL")
    unclear = verdict(change(-0.1, 0.2), "held-out score")
    assert unclear.startswith("No clear change") and "-0.100 to +0.200" in unclear and "steps" not in unclear
    for n in range(FEWEST):
        said = verdict(change(0.1, 0.2, n), "held-out score")
        assert said.startswith(f"Too few held-out prompts ({n})") and "rose" not in said
    same = verdict({"mean": 0.0, "ci95_low": None, "ci95_high": None, "n": 48}, "held-out score")
    assert same.startswith("No verdict") and "would tell" not in same


def test_below_the_fewest_even_a_unanimous_sample_can_be_turned_by_one():
    """The reason for the number: sign tests."""
    assert scipy.stats.binomtest(5, 5).pvalue > 0.05 and scipy.stats.binomtest(7, 8).pvalue > 0.05
    assert scipy.stats.binomtest(FEWEST - 1, FEWEST).pvalue < 0.05


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [
        (change(0.591, 0.713, 53), ""),
        (share_of([1.0] * 40 + [0.0] * 10).as_dict(), ""),
        ({"mean": 0.33, "ci95_low": None, "ci95_high": None, "n": 2}, "2 prompts: too few"),
        (share_of([1.0]).as_dict(), "1 prompt: too few"),
        (change(0.4, 0.7, 20), "no better than chance"),
        (change(0.1, 0.3, 20), "worse than chance"),
        ({"mean": 0.9, "n": 60}, ""),  # an older manifest, without interval
        ({"mean": 0.55, "n": 60}, "no better than chance"),
        ({"mean": 0.9}, "unknown number of prompts"),
        (0.33, "unknown number of prompts"),
        (share_of([]).as_dict(), "no held-out prompt says"),
        (None, ""),  # no figures at all: nothing is claimed
    ],
)
def test_a_model_is_doubted_unless_it_is_surely_better_than_a_coin(accuracy, says):
    said = doubt(accuracy)
    assert says in said and bool(said) == bool(says)
