"""The credit belongs to its rows, and rewards keep their order whatever their size and type."""

import dataclasses

import pytest
import torch

import lossmith.losses as L
import tiny
from batches import COMPLETION, NAMES, double, evaluate, no_trap_warnings, quiet_loss, random_fields
from lossmith.errors import RunError
from lossmith.losses.function_loss import FunctionLoss
from lossmith.rollouts import Distribution, Score
from lossmith.training import Learner, Recipe

OTHER = "the credit is of other rows than the batch"
SEPARABLE = [name for name in NAMES if quiet_loss(name).separable]
WHOLE = [name for name in (*NAMES, *COMPLETION) if name not in SEPARABLE]


def both(name):
    """(loss, batch, credit) of nine rows."""
    loss, fields = quiet_loss(name), random_fields(0)
    fields |= dict.fromkeys(loss.needs & {"advantage", "returns"}, fields["value"])
    batch = L.Batch(**fields)
    return loss, batch, loss.credit(batch)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_credit_of_one_row_is_not_spread_over_two():
    """Once this gave a number, each row of the batch with the advantage of one row of the credit."""
    fields = {"reward": [1.0, 0.0], "group": [0, 0]}
    batch = L.Batch([[-0.5, -1.5], [-0.25, -0.75]], [[1, 1], [1, 1]], **fields)
    loss = L.get_loss("reinforce")
    credit = loss.credit(batch)
    assert float(loss.objective(batch, credit).loss) == pytest.approx((0.5 * 2 - 0.5 * 1) / 2)  # -Σ A·logp / 2
    for other in (credit.rows(slice(0, 1)), credit.rows(torch.tensor([0, 1, 1]))):
        with pytest.raises(L.LossError, match=rf"{OTHER}: its advantage has shape \[\d, 2\], the batch \[2, 2\]"):
            loss.objective(batch, other)


@pytest.mark.parametrize("name", [*SEPARABLE, *WHOLE])
def test_other_rows_tokens_or_order_are_refused_by_name(name):
    loss, batch, credit = both(name)
    calls = {
        "fewer rows": lambda: loss.objective(batch.rows(slice(0, 4)), credit),
        "more rows": lambda: loss.objective(batch, credit.rows(slice(0, 4))),
        "one row": lambda: loss.objective(batch, credit.rows(slice(0, 1))),
        "other rows": lambda: loss.objective(batch.rows(slice(0, 3)), credit.rows(slice(3, 6))),
        "another order": lambda: loss.objective(batch.rows(torch.arange(8, -1, -1)), credit),
        "closed form": lambda: loss.closed_form_gradient(batch, credit.rows(slice(0, 1))),
    }
    for what, call in calls.items():
        with pytest.raises(L.LossError, match=f"{name}: {OTHER}"):
            call()
            pytest.fail(what)
    fewer = {
        f.name: x[:, :5]
        for f in dataclasses.fields(batch)
        if (x := getattr(batch, f.name)) is not None and x.shape[:2] == (9, 8)
    }
    with pytest.raises(L.LossError, match=OTHER):
        loss.objective(batch.replace(**fewer), credit)


def test_rows_that_look_alike_are_told_apart_by_reward_and_group():
    """Row 0 and row 2: one token, reward 1 each, but the advantage is 0.5 in the one group and 0.25 in the other."""
    batch = L.Batch([[-1.0]] * 6, [[1]] * 6, reward=[1.0, 0, 1, 1, 1, 0], group=[0, 0, 1, 1, 1, 1])
    loss = L.get_loss("dr_grpo", max_length=1)
    credit = loss.credit(batch)
    assert credit.advantage[:, 0].tolist() == [0.5, -0.5, 0.25, 0.25, 0.25, -0.75]
    with pytest.raises(L.LossError, match=f"{OTHER}: group differs"):
        loss.objective(batch.rows(torch.tensor([0, 1])), credit.rows(torch.tensor([2, 1])))
    alone = batch.rows(torch.tensor([2, 1])).replace(reward=None, group=None)  # a micro-batch may know less
    assert torch.isfinite(loss.objective(alone, credit.rows(torch.tensor([2, 1]))).loss)


@pytest.mark.parametrize("name", WHOLE)
def test_a_loss_of_the_whole_batch_is_not_given_a_part_of_it(name):
    loss, batch, credit = both(name)
    rows = torch.tensor([0, 2, 5])
    with pytest.raises(L.LossError, match=f"{name} looks at all rows of a batch at once, and was given 3 of 9"):
        loss.objective(batch.rows(rows), credit.rows(rows))
    part = batch.rows(rows)
    assert torch.equal(loss.objective(part, loss.as_whole(credit.rows(rows), part)).loss.isnan(), torch.tensor(False))


def test_a_function_is_not_given_a_part_of_its_batch_either():
    loss = FunctionLoss("mine", lambda batch: batch.logp.sum())
    batch = L.Batch(**random_fields(0))
    with pytest.raises(L.LossError, match="looks at all rows"):
        loss.objective(batch.rows(slice(0, 2)), loss.credit(batch).rows(slice(0, 2)))
    with pytest.raises(L.LossError, match=OTHER):
        loss.objective(batch.rows(slice(0, 2)), loss.credit(batch))


@pytest.mark.parametrize("term", ["kl_aggregate", "entropy_aggregate"])
def test_rows_that_are_a_batch_of_their_own_have_every_normalizer_of_their_own(term):
    """An optimizer step on a part of a round: each term is the mean over that part, however it is aggregated."""
    loss = quiet_loss("grpo", entropy_coef=0.1, **{term: "seq_mean_token_sum"})
    fields = random_fields(0)
    batch, rows = L.Batch(**fields), torch.tensor([0, 2, 5])  # one whole group
    part = batch.rows(rows)
    got = loss.objective(part, loss.as_whole(loss.credit(batch).rows(rows), part))
    want = loss(part)
    for name in ("policy", "kl", "entropy"):
        torch.testing.assert_close(got.terms[name], want.terms[name], rtol=1e-12, atol=0)


# -- the size and type of rewards -------------------------------------------------------------------------------------

SCALED = [name for name in NAMES if isinstance(quiet_loss(name).advantage_scale, L.GroupStd | L.BatchStd | L.Whiten)]


@pytest.mark.parametrize("size", [1e10, 1e20, 1e30, 1e150, 1e300])
@pytest.mark.parametrize("name", SCALED)
def test_huge_rewards_give_the_gradient_of_the_same_rewards_made_small(name, size):
    loss, fields = quiet_loss(name, beta=0), random_fields(0, dtype=torch.float32)
    large = torch.float32 if size < 1e35 else torch.float64
    small = evaluate(quiet_loss(name, beta=0, eps=1e-30) if "eps" in loss.to_dict() else loss, fields)[1]["logp"]
    got = evaluate(loss, fields | {"reward": fields["reward"].to(large) * size})[1]["logp"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, small, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "kind"),
    [
        ([1e20, 0.0, -1e20, 3e19], torch.float32),
        ([2**24, 2**24 + 1, 2**24 + 2, 0], torch.int64),
        ([2**53, 2**53 - 1, 2**53 - 2, 0], torch.int64),
        ([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 0.0], torch.float64),
        ([1e300, 5e299, -1e300, 0.0], torch.float64),
        ([True, False, True, False], torch.bool),
        ([1, 0, 0, 2], torch.int8),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "reinforce", "dr_grpo", "rloo", "lite_ppo", "reinforce_pp_baseline", "opo"])
def test_advantages_stand_in_the_order_of_the_rewards(name, rewards, kind):
    loss = quiet_loss(name, beta=0)
    batch = L.Batch(double([[-1.0]] * 4), [[1]] * 4, reward=torch.tensor(rewards, dtype=kind), group=[3] * 4)
    advantage = loss.credit(batch).advantage[:, 0]
    for i, a in enumerate(rewards):
        for j, b in enumerate(rewards):
            assert (a > b) == bool(advantage[i] > advantage[j]), (i, j)


def test_the_standard_deviation_of_huge_rewards_is_that_of_the_formula():
    """Rewards 1e200·(1, 0, 0, 0): (1 - 1/4) / (1/2) = 1.5, in float64, where 1e200 squared is infinite."""
    batch = L.Batch([[-1.0]] * 4, [[1]] * 4, reward=[1e200, 0, 0, 0], group=[0] * 4)
    assert L.get_loss("grpo", beta=0).credit(batch).advantage[:, 0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    mixed = L.Batch([[-1.0]] * 4, [[1]] * 4, reward=[1e200, 0, 3.0, 1.0], group=[0, 0, 1, 1])  # sizes of each group
    got = L.get_loss("grpo", beta=0).credit(mixed).advantage[:, 0].tolist()
    assert got == pytest.approx([2**-0.5, -(2**-0.5), 2**-0.5, -(2**-0.5)], rel=1e-5)
    others = L.get_loss("grpo", advantage_scale="loo_std", beta=0).credit(batch).advantage[1:, 0].tolist()
    assert others == pytest.approx([-0.25 * 3**0.5] * 3)  # each loser over the std of 1, 0, 0


def test_the_mean_of_large_float32_rewards_is_not_rounded():
    """1e8 + (0, 8, 16, 32) are whole numbers of float32; their sum, 4e8 + 56, is not, and once the mean was 2 off."""
    reward = torch.tensor([1e8, 1e8 + 8, 1e8 + 16, 1e8 + 32], dtype=torch.float32)
    batch = L.Batch(torch.full((4, 1), -1.0), torch.ones(4, 1).bool(), reward=reward, group=torch.zeros(4).long())
    assert L.get_loss("dr_grpo", max_length=1).credit(batch).advantage[:, 0].tolist() == [-14, -6, 2, 18]


@pytest.mark.parametrize(
    ("name", "rewards", "dtype", "message"),
    [
        ("dr_grpo", [1e300, 0.0], torch.float32, r"dr_grpo: rewards of 1e\+300 are too large.*the loss.*float32"),
        ("reinforce", [1e40, 0.0], torch.float32, r"reinforce: rewards of 1e\+40 are too large.*shaping='scale'"),
        ("grpo", [1.7e308, -1.7e308], torch.float64, r"reward at row 0 is beyond ±1.8e\+302.*differences.*overflow"),
        ("sppo", [1e30, 0.0], torch.float32, r"sppo: the loss leaves what torch.float32 holds, with rewards of 1e\+30"),
        ("gvpo", [1e30, 0.0], torch.float32, r"gvpo: the loss leaves"),
        ("ppo", [1e25, 0.0], torch.float32, r"ppo: rewards of 1e\+25 are too large: with them the critic leaves"),
    ],
)
def test_rewards_that_no_gradient_can_carry_are_refused_in_one_sentence(name, rewards, dtype, message):
    logp = torch.full((2, 1), -1.0, dtype=dtype)
    more = {"value": torch.zeros(2, 1), "ref_logp": logp} if name == "ppo" else {}
    batch = L.Batch(logp, [[1]] * 2, reward=rewards, group=[0, 0], **more)
    with pytest.raises(L.LossError, match=message):
        quiet_loss(name)(batch)


# -- in training ------------------------------------------------------------------------------------------------------


def learner(loss="grpo(beta=0)", **fields):
    policy = tiny.loaded()
    recipe = Recipe.make(loss=loss, temperature=0.8, max_tokens=9, learning_rate=1e-3, **fields)
    with no_trap_warnings():
        return Learner(policy, recipe.policy_loss(), recipe)


def scored(values):
    found = tiny.rollouts(measure=Distribution(0, temperature=0.8, dtype="float32"))
    return [dataclasses.replace(r, score=Score(values[i % len(values)])) for i, r in enumerate(found)]


@pytest.mark.parametrize("values", [(1e300, 2e300, 0.0), (2.0**53, 2.0**53 - 1, 2.0**53 - 2), (1e30, 0.0, 2e30)])
def test_a_round_of_huge_scores_is_learned_from_in_their_order(values):
    made, rollouts = learner(), scored(values)
    given = pytest.approx([r.score.value for r in rollouts], rel=1e-7)
    assert made.make_batch(rollouts).reward.double().tolist() == given
    update, rollouts = tiny.update(made, rollouts)
    assert update.metrics["grad_norm"] > 1e-6 and not update.skipped
    for a in rollouts:
        for b in rollouts:
            if a.prompt.id == b.prompt.id and a.score.value > b.score.value:
                assert a.advantage > b.advantage


def test_ordinary_scores_are_in_the_type_of_the_weights():
    made = learner()
    made.policy.model.float()
    assert made.make_batch(scored((0.1, 0.25, 3.0))).reward.dtype == torch.float32
    assert made.make_batch(scored((1e300, 0.25, 3.0))).reward.dtype == torch.float64


def test_a_gradient_that_rewards_made_infinite_is_not_blamed_on_the_learning_rate():
    made = learner("reinforce")
    made.policy.model.float()
    rollouts = scored((1e30, -1e30, 0.0))
    tiny.update(made, rollouts, 0)
    tiny.update(made, rollouts, 1)
    with pytest.raises(
        RunError, match=r"advantages of .*e\+\d\d, which gradients cannot carry.*advantage_scale='group_std'"
    ):
        tiny.update(made, rollouts, 2)


def test_a_completion_masked_altogether_leaves_its_group_or_keeps_its_reward_there():
    mask, group = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    mask[0] = False
    batch = L.Batch(mask=mask, reward=torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), group=group)
    kept, left = (quiet_loss("grpo@verl", masked=word).credit(batch).advantage for word in ("keep", "leave"))
    assert torch.equal(left, torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(kept[1:], torch.full((3, 3), -0.25 / (0.5 + 1e-6), dtype=torch.float64))
    assert not kept[0].any()
    assert quiet_loss("grpo@verl").masked == quiet_loss("grpo@trl").masked == "keep"
    assert quiet_loss("grpo").masked == "leave"
    # it goes along with its row, and a reward that is not known is not counted
    again = batch.rows(torch.tensor([2, 0, 1, 3])).replace(old_logp=torch.zeros(4, 3))
    assert torch.equal(quiet_loss("grpo@verl").credit(again).advantage, kept[[2, 0, 1, 3]])
    unknown = batch.replace(reward=torch.tensor([torch.nan, 0.0, 0.0, 1.0]).double())
    assert torch.equal(
        quiet_loss("grpo@verl").credit(unknown).advantage,
        quiet_loss("grpo@verl", masked="leave").credit(unknown).advantage,
    )
