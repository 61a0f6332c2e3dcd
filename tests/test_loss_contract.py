"""What a user meets: errors that name the cause, warnings for traps, round trips, printing, and what gets imported."""

import ast
import dataclasses
import itertools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossmith.losses as L
from batches import EVERY, LEAVES, NAMES, evaluate, make, no_trap_warnings, normal, quiet_loss, random_fields
from lossmith.errors import LossError
from lossmith.losses.batch import FIELDS
from lossmith.losses.composition.flat import AXES, pieces_of

TRAPS_BY_DEFAULT = {"book_clip", "book_ppo_clip", "bnpo"}


# -- asking for a loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grop", {}, r"no loss 'grop'.*'grpo'"),
        ("nothing_like_it", {}, r"no loss 'nothing_like_it'.*Known: .*grpo"),
        ("ppo", {"clip_hihg": 0.3}, r"ppo has no parameter 'clip_hihg'.*'clip_high'"),
        ("ppo", {"trust": "clpi"}, r"trust is 'clpi'.*'clip'"),
        ("ppo", {"advantage": "gea"}, r"advantage is 'gea'.*'gae'"),
        ("ppo", {"aggregate": "token_means"}, r"aggregate is 'token_means'.*'token_mean'"),
        ("ppo", {"shaping": ["overlnog"]}, r"shaping is 'overlnog'.*'overlong'"),
        ("grpo", {"kl_estimator": "k4"}, r"kl_estimator.*'k4'.*k1, k2, k3"),
        ("grpo", {"truncated": "maks"}, r"truncated is 'maks'.*'mask'"),
        ("grpo", {"group_filter": "zero"}, r"group_filter is 'zero'.*zero_variance"),
        # of another option of the axis: it would have no effect, and the message says where it would
        ("grpo", {"lam": 0.9}, r"lam has no effect on grpo.*advantage='gae'"),
        ("grpo", {"cap": 3}, r"cap has no effect on grpo.*trust='sg_clip' or trust='truncate'"),
        ("reinforce", {"clip_high": 0.3}, r"clip_high has no effect.*trust='clip'"),
        ("grpo", {"max_length": 9}, r"max_length has no effect.*seq_mean_token_sum_norm.*overlong"),
        ("grpo", {"mismatch_high": 3}, r"mismatch_high has no effect.*mismatch='tis'"),
        ("ppo", {"singleton": "raw"}, r"singleton has no effect.*advantage='group'"),
        # out of range
        ("ppo", {"clip_low": -0.1}, r"clip_low.*-0.1.*at least 0"),
        ("ppo", {"clip_high": "wide"}, r"clip_high.*number.*'wide'"),
        ("ppo", {"clip_high": float("nan")}, r"clip_high.*number.*nan"),
        ("ppo", {"clip_high": True}, r"clip_high.*number.*True"),
        ("ppo", {"dual_clip": 1.0}, r"dual_clip.*greater than 1"),
        ("ppo", {"lam": -1}, r"lam.*at least 0"),
        ("ppo", {"value_coef": -1}, r"value_coef.*at least 0"),
        ("ppo", {"value_clip": 0}, r"value_clip.*greater than 0"),
        ("ppo", {"entropy_coef": -1}, r"entropy_coef.*at least 0"),
        ("ppo", {"advantage_clip": -1}, r"advantage_clip.*at least 0"),
        ("grpo", {"beta": -0.1}, r"beta.*at least 0"),
        ("grpo", {"beta": None}, r"beta.*number.*None"),
        ("grpo", {"eps": 0}, r"eps.*greater than 0"),
        ("grpo", {"kl_ratio_weight": 1}, r"kl_ratio_weight.*true or false"),
        ("cispo", {"cap": 0}, r"cap.*greater than 0"),
        ("cispo", {"clip_low": 0.1, "cap": 0.5}, r"cap=0.5 lies below"),
        ("dr_grpo", {"max_length": 0}, r"max_length.*greater than 0"),
        # pieces on the wrong axis
        ("ppo", {"trust": L.Group()}, r"trust must be a Trust, not Group"),
        ("ppo", {"aggregate": L.Clip()}, r"aggregate must be a Aggregate, not Clip"),
    ],
)
def test_what_is_refused_when_a_loss_is_asked_for(name, changes, message):
    with pytest.raises(L.LossError, match=re.compile(message, re.DOTALL)):
        L.get_loss(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gspo", {"advantage": "return", "advantage_scale": "none"}, "differs between tokens"),
        ("rloo", {"advantage": "return"}, "one number a completion"),
        ("reinforce", {"ratio_level": "sequence"}, "does not use a ratio"),
        ("reinforce", {"denominator": "behavior"}, "does not use a ratio"),
        ("reinforce", {"ratio_level": "sequence", "kl_ratio_weight": True}, "does not use a ratio"),  # beta is 0
        ("grpo", {"advantage": "return"}, "per token"),
        ("ppo", {"advantage_scale": "batch_std"}, "whole completions"),
        ("grpo", {"value_coef": 0.5}, "critic"),
        ("rloo", {"kl_ratio_weight": True}, "no gradient"),
        ("rloo", {"kl_straight_through": True}, "no gradient"),
        ("rloo", {"kl_estimator": "full"}, "sampled tokens"),
        ("grpo", {"kl_estimator": "full", "kl_ratio_weight": True}, "exact"),
        ("grpo", {"kl_straight_through": True, "kl_ratio_weight": True}, "one of"),
        ("ppo", {"kl_control": "adaptive"}, "beta is 0"),
    ],
)
def test_compositions_that_mean_nothing_are_refused_with_the_reason(name, changes, reason):
    with pytest.raises(L.LossError, match=reason):
        L.get_loss(name, **changes)


@pytest.mark.parametrize("name", [n for n in NAMES if L.CATALOGUE[n].fixed])
def test_fixed_choices_are_refused_loudly_and_never_ignored(name):
    flat = quiet_loss(name).to_dict()
    for key in L.CATALOGUE[name].fixed:
        assert quiet_loss(name, **{key: flat[key]}) == quiet_loss(name)
        others = [option for option in AXES[key] if option != flat[key]]
        for other in others:
            with pytest.raises(L.LossError, match=f"{name} is defined with {key}"):
                quiet_loss(name, **{key: other})


def test_rloo_has_a_fixed_aggregate():
    assert "aggregate" in L.CATALOGUE["rloo"].fixed


def test_attribute_style_and_pieces_are_accepted():
    assert L.grpo(beta=0.1) == L.get_loss("grpo", beta=0.1)
    assert L.get_loss("ppo", trust=L.Clip(0.2, 0.28)) == L.get_loss("ppo", clip_high=0.28)
    with pytest.raises(AttributeError):
        _ = L.grop
    assert [entry.name for entry in L.list_losses()] == EVERY


def test_errors_are_value_errors_of_the_package():
    from lossmith.errors import LossmithError

    assert issubclass(L.LossError, ValueError) and issubclass(L.LossError, LossmithError)


# -- traps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grpo", {"kl_estimator": "k1"}, "k1 in the loss regularizes nothing"),
        ("reinforce", {"beta": 0.1, "kl_estimator": "k1"}, "k1 in the loss"),
        ("cispo", {"cap": 0.2}, "cap of 0.2 < 1"),
        ("reinforce", {"trust": "truncate", "cap": 0.9}, "cap of 0.9 < 1"),
        ("cispo", {"clip_low": 0}, "raises every ratio below 1"),
        ("book_clip", {}, "demonstration"),
        ("book_ppo_clip", {}, "demonstration"),
        ("ppo", {"trust": "book_clip"}, "demonstration"),
    ],
)
@pytest.mark.filterwarnings("ignore::lossmith.errors.TrapWarning")  # where there are two, the other one
def test_traps_warn_when_built(name, changes, message):
    with pytest.warns(L.TrapWarning, match=message):
        loss = L.get_loss(name, **changes)
    assert any(message in trap for trap in loss.traps)


def test_both_traps_of_the_books_objective_are_named():
    with pytest.warns(L.TrapWarning) as caught:
        L.get_loss("book_ppo_clip")
    assert len(caught) == 2
    with pytest.warns(L.TrapWarning) as caught:
        L.get_loss("book_ppo_clip", trust="clip", kl_estimator="k1")
    assert len(caught) == 1


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TRAPS_BY_DEFAULT])
def test_defaults_do_not_warn(name):
    assert L.get_loss(name).traps == ()  # a warning would be an error here


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k1", "kl_ratio_weight": True},
        {"kl_estimator": "k1", "kl_straight_through": True},
        {"kl_estimator": "k1", "kl_place": "reward"},
        {"kl_estimator": "k1", "beta": 0},
        {"trust": "sg_clip", "cap": 1},
        {"trust": "sg_clip", "cap": float("inf")},
        {"trust": "truncate"},
    ],
)
def test_what_regularizes_does_not_warn(changes):
    assert L.get_loss("grpo", **changes).traps == ()


def test_changing_a_trap_away_silences_it():
    with no_trap_warnings():
        loss = L.get_loss("book_clip")
    assert loss.replace(trust=L.Clip()).traps == ()


# -- the batch ------------------------------------------------------------------------------------------------------

LP = [[-1.0, -2.0], [-0.5, -0.1]]
MASK = [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logp": LP}, r"mask is missing.*sampler"),
        ({"logp": LP, "mask": torch.ones(2, 2)}, r"mask must be bool.*float32.*\.bool\(\)"),
        (
            {"logp": LP, "mask": torch.tensor([[1, 1], [1, -1]])},
            r"mask must hold .* but is -1 at row 1, token 1",
        ),
        ({"logp": LP, "mask": MASK, "truncated": torch.tensor([0, 2])}, r"truncated must hold .* but is 2 at row 1\."),
        ({"logp": LP, "mask": [1, 1]}, r"mask must be \[N, T\].*\[2\]"),
        ({"logp": [[-1.0]], "mask": MASK}, r"logp has shape \[1, 1\].*\[2, 2\]"),
        ({"logp": LP, "mask": MASK, "old_logp": [[-1.0, -1.0, -1.0]] * 2}, r"old_logp has shape \[2, 3\]"),
        ({"logp": LP, "mask": MASK, "reward": [1.0]}, r"reward has shape \[1\].*\[2\] or \[2, 2\]"),
        ({"logp": LP, "mask": MASK, "group": [[0, 1]]}, r"group has shape \[1, 2\].*\[2\]"),
        ({"logp": LP, "mask": MASK, "value": [1.0, 2.0]}, r"value has shape \[2\].*\[2, 2\]"),
        ({"logp": LP, "mask": MASK, "group": torch.zeros(2)}, r"group must hold whole numbers.*float32"),
        ({"logp": LP, "mask": MASK, "truncated": torch.zeros(2)}, r"truncated must be bool"),
        ({"logp": torch.zeros(2, 2, dtype=torch.bfloat16), "mask": MASK}, r"logp is torch.bfloat16.*float32 or wider"),
        ({"logp": torch.zeros(2, 2, dtype=torch.float16), "mask": MASK}, r"logp is torch.float16"),
        ({"logp": LP, "mask": MASK, "old_logp": torch.zeros(2, 2).bfloat16()}, r"old_logp is torch.bfloat16"),
        ({"logp": LP, "mask": MASK, "value": torch.ones(2, 2).long()}, r"value is torch.int64.*\.float\(\)"),
        (
            {"logp": LP, "mask": MASK, "reward": torch.tensor([2**53 + 1, 0])},
            r"reward holds whole numbers beyond 2\^53",
        ),
        ({"logp": LP, "mask": MASK, "reward": [2**53 + 1, 0]}, r"reward holds whole numbers beyond 2\^53"),
        ({"logp": LP, "mask": MASK, "reward": torch.zeros(2, device="meta")}, r"reward is on the meta device"),
        ({"logp": LP, "mask": MASK, "reward": torch.zeros(2).to_sparse()}, r"reward is sparse"),
        ({"logp": LP, "mask": MASK, "reward": torch.zeros(2, dtype=torch.complex64)}, r"reward is complex"),
        ({"logp": LP, "mask": MASK, "reward": "high"}, r"reward must be a tensor, or nested lists.*'high'"),
        ({"logp": LP, "mask": MASK, "reward": [1.0, None]}, r"reward must be a tensor, or nested lists"),
        ({"logp": [[-1.0, -2.0], [-0.5]], "mask": MASK}, r"logp must be.*rows are equally long"),
        ({"logp": [torch.zeros(2), torch.zeros(2)], "mask": MASK}, r"logp must be a tensor"),
        ({"logp": LP, "mask": [[0.5, 1], [1, 0]]}, r"mask must hold true and false, or 1 and 0"),
        ({"logp": LP, "mask": [[2, 1], [1, 0]]}, r"mask must hold true and false, or 1 and 0"),
        ({"logp": LP, "mask": MASK, "group": [0.5, 1.5]}, r"group must hold whole numbers"),
        ({"logp": LP, "mask": MASK, "group": torch.tensor([True, False])}, r"group must hold whole numbers.*bool"),
        ({"logp": LP, "mask": MASK, "group": ["a", "b"]}, r"group must be a tensor, or nested lists"),
        ({"logp": LP, "mask": MASK, "reward_parts": [1.0, 2.0]}, r"reward_parts has shape \[2\].*\[2, K\]"),
        ({"logp": LP, "mask": MASK, "pair_probability": [0.5, 1.5]}, r"pair_probability is 1.5 at row 1"),
        ({"logp": LP, "mask": MASK, "pair_weight": [0.5, -1.0]}, r"pair_weight is -1 at row 1"),
        ({"logp": LP, "mask": MASK, "rewards": [1.0, 0.0]}, r"no field 'rewards'.*'reward'"),
        ({"logp": [[-1.0, float("nan")], [-1.0, -1.0]], "mask": MASK}, r"logp is nan at row 0, token 1"),
        ({"logp": [[-1.0, -1.0], [float("-inf"), 0.0]], "mask": MASK}, r"logp is -inf at row 1, token 0"),
        ({"logp": LP, "mask": MASK, "reward": [0.5, float("nan")]}, r"reward is nan at row 1"),
        ({"logp": LP, "mask": MASK, "reward": [float("inf"), 0.0]}, r"reward is inf at row 0"),
        ({"logp": LP, "mask": MASK, "reward": [[0.0, float("nan")], [0.0, 0.0]]}, r"reward is nan at row 0, token 1"),
        ({"logp": LP, "mask": MASK, "advantage": [0.0, float("nan")]}, r"advantage is nan at row 1"),
        (
            {"logp": LP, "mask": MASK, "ref_logp": [[0.0, 0.0], [float("nan")] * 2]},
            r"ref_logp is nan at row 1, token 0",
        ),
        ({"logp": LP, "mask": MASK, "entropy": [[0.0, float("inf")], [0.0, 0.0]]}, r"entropy is inf at row 0, token 1"),
    ],
)
def test_what_a_batch_refuses(fields, message):
    with pytest.raises(L.LossError, match=re.compile(message, re.DOTALL)):
        L.Batch(**fields)


def test_a_number_alone_is_no_choice_of_rows():
    batch = L.Batch(LP, MASK, reward=[1.0, 0.0])
    credit = L.get_loss("reinforce").credit(batch)
    for whole, index in itertools.product((batch, credit), (torch.tensor(1), 1)):
        with pytest.raises(L.LossError, match=r"For row 1 alone: rows\(torch\.tensor\(\[1\]\)\)"):
            whole.rows(index)


def test_whole_numbers_0_and_1_are_a_mask():
    for kind in (torch.int64, torch.uint8, torch.int32):
        assert torch.equal(L.Batch(LP, torch.tensor(MASK, dtype=kind)).mask, torch.tensor(MASK).bool())


def test_non_finite_numbers_at_masked_positions_are_no_error():
    nan = float("nan")
    batch = L.Batch([[-1.0, -1.0], [-1.0, nan]], MASK, old_logp=[[-1.0, -1.0], [-1.0, float("inf")]], reward=[1.0, 0.0])
    assert batch.logp.tolist() == [[-1, -1], [-1, 0]]


def test_only_what_a_forward_pass_of_the_policy_makes_carries_gradient():
    fields = random_fields(0) | {"advantage": normal(0, 9), "returns": normal(1, 9, 8)}
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in fields.items()}
    batch = L.Batch(**leaves)
    present = {f.name: x for f in dataclasses.fields(batch) if (x := getattr(batch, f.name)) is not None}
    carries = {name for name, x in present.items() if x.requires_grad}
    assert carries == set(LEAVES)


def needed(loss: L.PolicyLoss) -> set[str]:
    return set(loss.needs) - {"max_length"}


EXTRA = {
    **{name: (name, {}) for name in NAMES},
    "entropy": ("grpo", {"entropy_coef": 0.1}),
    "full": ("grpo", {"kl_estimator": "full"}),
    "mismatch": ("grpo", {"mismatch": "tis"}),
    "behavior": ("grpo", {"denominator": "behavior"}),
    "ref": ("grpo", {"denominator": "ref", "beta": 0}),
    "self": ("grpo", {"denominator": "self"}),
    "truncated": ("grpo", {"truncated": "mask"}),
    "truncated zero": ("reinforce", {"truncated": "zero"}),
    "filter": ("reinforce", {"group_filter": "zero_variance"}),
    "prompt mean": ("reinforce", {"aggregate": "prompt_mean"}),
    "kl by ratio": ("reinforce", {"beta": 0.1, "kl_ratio_weight": True}),
    "no critic": ("ppo", {"value_coef": 0}),
    "loo std": ("reinforce", {"advantage_scale": "loo_std"}),
}


@pytest.mark.parametrize("label", EXTRA)
def test_needs_is_exact(label):
    """What it needs is enough, each thing it needs is asked for by name, and nothing else changes the result."""
    name, changes = EXTRA[label]
    loss = quiet_loss(name, **changes)
    everything = random_fields(0)
    enough = {k: v for k, v in everything.items() if k in {"logp", "mask", "old_logp"} | needed(loss)}
    if loss.sequence_mask.option == "opsm":  # used where it is there, the old policy's else
        enough["behavior_logp"] = everything["behavior_logp"]
    if "value" in enough:
        enough["old_value"] = everything["old_value"]
    full, less = evaluate(loss, everything), evaluate(loss, enough)
    assert torch.equal(full[0].loss, less[0].loss) and torch.equal(full[1]["logp"], less[1]["logp"])
    for field in needed(loss):
        gone = {k: v for k, v in enough.items() if k not in {field, "old_value"}}
        with pytest.raises(L.LossError, match=rf"needs Batch\.{field}, which is missing; it comes from "):
            evaluate(loss, gone)
    with pytest.raises(L.LossError, match=r"needs Batch\.logp, which is missing"):
        _ = loss(L.Batch(**{k: v for k, v in enough.items() if k != "logp"})).loss


@pytest.mark.parametrize("label", EXTRA)
def test_uses_old_is_exact(label):
    """Whether the old log-probabilities change anything."""
    name, changes = EXTRA[label]
    loss = quiet_loss(name, **changes)
    fields = random_fields(0)
    with_old = evaluate(loss, fields)
    without = evaluate(loss, {k: v for k, v in fields.items() if k != "old_logp"})
    changed = not torch.equal(with_old[0].loss, without[0].loss)
    changed |= not torch.equal(with_old[1]["logp"], without[1]["logp"])
    assert loss.uses_old == changed


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_old_policy_is_the_current_one(name):
    loss, fields = quiet_loss(name), random_fields(0)
    same = evaluate(loss, fields | {"old_logp": fields["logp"]})
    none = evaluate(loss, {k: v for k, v in fields.items() if k != "old_logp"})
    assert torch.equal(same[0].loss, none[0].loss) and torch.equal(same[1]["logp"], none[1]["logp"])
    plain = loss.ratio_level.denominator == "old" and loss.token_mask.option == loss.sequence_mask.option == "none"
    plain &= not loss.trust.whole_batch
    if plain and "ratio" in none[0].metrics and isinstance(loss.aggregate, L.TokenMean | L.SeqMeanTokenMean):
        counted = float(loss.credit(L.Batch(**fields)).weight.sum())
        assert none[0].metrics["ratio"] == pytest.approx(counted) and none[0].metrics["clip_fraction"] == 0


def test_coupling_of_known_losses():
    known = {"reinforce": "batch", "reinforce_pp": "batch", "grpo": "group", "rloo": "group", "gspo": "group"}
    known |= {"ppo": "sequence", "a2c": "sequence", "book_clip": "sequence", "dapo": "group"}
    assert {name: quiet_loss(name).coupling for name in known} == known


def test_a_token_limit_is_asked_for_and_then_no_longer_needed():
    for name in ("dr_grpo", "dapo"):
        loss = L.get_loss(name)
        assert "max_length" in loss.needs
        with pytest.raises(L.LossError, match="max_length"):
            loss(L.Batch(**random_fields(0)))
        assert "max_length" not in L.get_loss(name, max_length=9).needs
    assert all("max_length" not in quiet_loss(name).needs for name in NAMES)


def test_kl_in_the_reward_and_a_given_advantage_exclude_each_other():
    fields = random_fields(0) | {"advantage": normal(0, 9)}
    with pytest.raises(L.LossError, match="bypasses"):
        quiet_loss("rloo")(L.Batch(**fields))


@pytest.mark.parametrize("name", NAMES)
def test_the_output(name):
    """A scalar that backpropagates to the policy only; its parts add up; nothing is written to the batch."""
    loss, fields = quiet_loss(name), random_fields(0)
    leaves, batch = make(fields)
    before = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    copies = {k: None if v is None else v.detach().clone() for k, v in before.items()}
    out = loss(batch)
    out.loss.backward()
    assert out.loss.shape == () and out.advantage.shape == batch.mask.shape and not out.advantage.requires_grad
    assert leaves["logp"].grad is not None and leaves["logp"].grad.abs().sum() > 0
    assert float(sum(out.terms.values()).detach()) == pytest.approx(float(out.loss.detach()), rel=1e-12)
    assert all(isinstance(v, float) for v in out.metrics.values())
    for key, value in before.items():
        assert value is None or torch.equal(value.detach(), copies[key])


# -- a value: equality, copies, round trips -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_value(name):
    loss, again = quiet_loss(name), quiet_loss(name)
    assert loss == again and hash(loss) == hash(again) and loss is not again
    with no_trap_warnings():
        assert pickle.loads(pickle.dumps(loss)) == loss
        changed = loss.replace(entropy_coef=0.5)
    assert changed != loss and loss == again
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.entropy_coef = 1.0


def test_replace_changes_one_axis():
    loss = L.get_loss("ppo").replace(trust=L.Clip(low=0.2, high=0.28))
    assert loss == L.get_loss("ppo", clip_low=0.2, clip_high=0.28)
    with pytest.raises(L.LossError, match="trust must be a Trust"):
        loss.replace(trust=L.TokenMean())
    with pytest.raises(L.LossError, match="per token"):
        loss.replace(advantage_scale=L.GroupStd())


def test_one_way_to_change_a_loss_takes_parameters_options_and_pieces():
    asked = L.get_loss("grpo", clip_high=0.28, advantage_scale="none", beta=0.1)
    assert asked == L.get_loss("grpo(clip_high=0.28, advantage_scale='none', beta=0.1)")
    assert asked == L.get_loss("grpo").replace(clip_high=0.28, advantage_scale="none", beta=0.1)
    pieces = dict(trust=L.Clip(0.2, 0.28), advantage_scale=asked.advantage_scale, kl=asked.kl)
    assert asked == L.get_loss("grpo", **pieces) == L.get_loss("grpo").replace(**pieces)
    flat = set(asked.to_dict())
    assert set(AXES) <= flat and set(AXES) <= {f.name for f in dataclasses.fields(asked)}
    for wrong, near in (("scale", "advantage_scale"), ("ratio", "ratio_level"), ("clip_hgh", "clip_high")):
        with pytest.raises(L.LossError, match=near):
            asked.replace(**{wrong: "none"})


def check_round_trip(loss: L.PolicyLoss) -> None:
    with no_trap_warnings():
        flat = loss.to_dict()
        assert L.PolicyLoss.from_dict(flat) == loss
        assert L.PolicyLoss.from_dict(json.loads(json.dumps(flat))) == loss
        assert L.get_loss(**flat) == loss
        words = {k: "none" if v is None else v for k, v in flat.items()}  # TOML has no null
        assert L.get_loss(**words) == loss


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_the_defaults(name):
    check_round_trip(quiet_loss(name))
    with no_trap_warnings():
        check_round_trip(L.get_loss(name))  # with the token limit not filled in


def other_value(draw: st.DrawFn, field: dataclasses.Field, value: object) -> object:
    """Another legal value of a parameter."""
    meta = field.metadata
    if meta["choices"]:
        return draw(st.sampled_from(meta["choices"]))
    if isinstance(field.default, bool):
        return not value
    floor = max(meta["low"] or 0.0, meta["above"] or 0.0)
    if str(field.type).startswith("int"):
        return draw(st.integers(max(1, int(floor)), 500))
    if meta["high"] is not None:
        return draw(st.floats(0.01, meta["high"]).map(lambda x: round(x, 4)))
    return draw(st.floats(floor + 0.01, floor + 3).map(lambda x: round(x, 4)))


@st.composite
def compositions(draw: st.DrawFn) -> L.PolicyLoss | None:
    """A catalogue loss with random choices and parameters; None where that means nothing."""
    name = draw(st.sampled_from(NAMES))
    changes = {axis: draw(st.sampled_from(list(AXES[axis]))) for axis in draw(st.sets(st.sampled_from(list(AXES))))}
    if draw(st.booleans()):
        changes["shaping"] = draw(st.permutations(["clip", "scale", "overlong"]))[: draw(st.integers(0, 3))]
    if draw(st.booleans()):
        changes["truncated"] = draw(st.sampled_from(["keep", "mask", "zero"]))
    try:
        loss = quiet_loss(name, **changes)
        for piece in pieces_of(loss).values():
            for field in dataclasses.fields(piece):
                if draw(st.integers(0, 3)) == 0:
                    changes[field.metadata["flat"]] = other_value(draw, field, getattr(piece, field.name))
        return quiet_loss(name, **changes)
    except L.LossError:
        return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(loss=compositions())
def test_round_trip_of_any_composition(loss):
    if loss is not None:
        check_round_trip(loss)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(loss=compositions(), seed=st.integers(0, 20))
def test_any_legal_composition_is_finite_and_has_its_closed_form(loss, seed):
    if loss is None:
        return
    fields = random_fields(seed)
    fields |= {k: normal(seed + 1, *fields["logp"].shape) for k in loss.needs & {"advantage", "returns"}}
    out, grads = evaluate(loss, fields)
    assert torch.isfinite(out.loss) and all(torch.isfinite(g).all() for g in grads.values())
    if loss.kl.in_loss and loss.kl.estimator == "full":  # acts through the whole distribution, not the sampled token
        with pytest.raises(NotImplementedError, match="full"):
            loss.closed_form_gradient(L.Batch(**fields))
        return
    closed = loss.closed_form_gradient(L.Batch(**fields))
    scale = max(1.0, float(closed.abs().max()))
    assert float((grads["logp"] - closed).abs().max()) <= 1e-11 * scale, loss


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_every_axis_is_accepted_as_an_override(name):
    """get_loss takes each key that its own dictionary shows, one at a time."""
    flat = quiet_loss(name).to_dict()
    assert set(flat) - {"name"} <= set(L.all_parameters())
    for key, value in flat.items():
        if key not in ("name",):
            assert quiet_loss(name, **{key: value}).to_dict().keys() == flat.keys()


def test_every_parameter_is_documented():
    docs = L.all_parameters()
    assert all(isinstance(text, str) and len(text) > 5 for text in docs.values())
    assert {"clip_low", "beta", "lam", "max_length", "value_coef", "advantage", "trust", "shaping"} <= set(docs)


@pytest.mark.parametrize("name", NAMES)
def test_entries_say_what_they_are(name):
    entry = L.CATALOGUE[name]
    assert entry.name == name and entry.paper and entry.summary.endswith(".") and 1990 < entry.year < 2100
    assert quiet_loss(name).name == name


# -- printing -------------------------------------------------------------------------------------------------------


def test_the_formula_shows_the_numbers_in_force():
    text = str(L.get_loss("ppo", clip_high=0.31, clip_low=0.15))
    assert "1.31" in text and "0.85" in text and "1.2" not in text
    text = str(L.get_loss("gspo"))
    assert "0.9997" in text and "1.0004" in text
    assert "0.04" in str(L.get_loss("grpo")) and "0.07" in str(L.get_loss("grpo", beta=0.07))
    assert "1.31" in L.get_loss("ppo", clip_high=0.31).formula("latex")


@pytest.mark.parametrize("name", EVERY)
def test_no_formula_holds_a_control_character(name):
    """A backslash that Python ate shows as a tab or a form feed."""
    loss = quiet_loss(name)
    assert not any(ord(c) < 32 and c != "\n" for style in ("text", "latex") for c in loss.formula(style))


# What the equation does not show: how the coefficient moves over time.
NOT_IN_THE_FORMULA = {"kl_control", "kl_control_target", "kl_horizon"}
SHOWN = {
    **{name: (name, {}) for name in NAMES},
    **{f"{axis} {option}": None for axis, known in AXES.items() for option in known if option != "zero"},
    "shaping": ("grpo", {"shaping": ["clip", "scale", "overlong"], "max_length": 40}),
    "critic": ("ppo", {"value_clip": 0.3, "value_coef": 0.4}),
    "gae": ("ppo", {"lam": 0.9, "gamma": 0.8}),
    "kl": ("grpo", {"beta": 0.2}),
    "dual": ("ppo", {"dual_clip": 3}),
}


def showing(label: str) -> L.PolicyLoss:
    if SHOWN[label] is not None:
        name, changes = SHOWN[label]
        return quiet_loss(name, **changes)
    axis, option = label.split()
    base = "reinforce" if axis in ("advantage", "trust", "aggregate") else "grpo"
    return quiet_loss(base, **{axis: option})


@pytest.mark.parametrize("style", ["text", "latex"])
@pytest.mark.parametrize("label", SHOWN)
def test_every_parameter_in_force_changes_the_formula(label, style):
    """The text is generated: no number that acts is missing from it."""
    loss = showing(label)
    before = loss.formula(style)
    for where, piece in pieces_of(loss).items():
        if (where == "kl" and not loss.kl.active) or (where == "value" and not loss.value.active):
            continue
        if where == "ratio_level" and not loss.trust.uses_ratio:
            continue
        for field in dataclasses.fields(piece):
            flat, value = field.metadata["flat"], getattr(piece, field.name)
            if flat in NOT_IN_THE_FORMULA or (flat == "eps" and where == "advantage_scale" and piece.option == "none"):
                continue
            if flat == "mask_kl" and not any(x.acts for x in (loss.token_mask, loss.sequence_mask, loss.mismatch)):
                continue  # there is nothing to multiply with
            if flat == "cap" and getattr(piece, "surrogate", "logp") == "ratio":
                continue  # belongs to the other surrogate
            if field.metadata["choices"]:
                values = [c for c in field.metadata["choices"] if c != value]
            elif isinstance(value, bool):
                values = [not value]
            elif isinstance(value, tuple):
                values = [[0.3, 0.7]]
            else:
                values = [
                    3.7 if value is None or value == float("inf") else value + 1 if flat == "max_length" else 3.25
                ]
                values = [0.35] if flat == "clip_low" or field.metadata["high"] else values  # from 1 on, no lower bound
                values = [7] if flat == "buffer" else [0.77] if value == float("-inf") else values
            for other in values:
                try:
                    changed = from_flat({**loss.to_dict(), flat: other})
                except L.LossError:
                    continue  # means nothing together with the rest
                assert changed.formula(style) != before, (flat, other)


def from_flat(flat: dict) -> L.PolicyLoss:
    with no_trap_warnings():
        return L.PolicyLoss.from_dict(flat)


ALL_FORMULAS = sorted(SHOWN)


def balanced(tex: str) -> bool:
    depth = 0
    for char in re.sub(r"\\[{}]", "", tex):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("label", ALL_FORMULAS)
def test_latex_is_well_formed(label):
    tex = showing(label).formula("latex")
    assert tex.startswith("\\begin{aligned}") and tex.endswith("\\end{aligned}")
    assert balanced(tex)
    assert len(re.findall(r"\\left\b", tex)) == len(re.findall(r"\\right\b", tex))
    begins, ends = re.findall(r"\\begin\{(\w+)\}", tex), re.findall(r"\\end\{(\w+)\}", tex)
    assert sorted(begins) == sorted(ends)
    for line in re.split(r"\\\\\n", tex):  # \left and \right may not be parted by a line break
        assert len(re.findall(r"\\left\b", line)) == len(re.findall(r"\\right\b", line)), line


@pytest.mark.parametrize("label", ALL_FORMULAS)
def test_text_is_readable(label):
    text = showing(label).formula()
    assert text.startswith("L(θ) = ") and text == str(showing(label))
    assert "\\" not in text and "None" not in text and "  \n" not in text


def test_an_unknown_style_is_refused():
    with pytest.raises(L.LossError, match="style"):
        L.get_loss("ppo").formula("html")


# -- imports --------------------------------------------------------------------------------------------------------

SOURCE = Path(L.__file__).parent
BESIDE = {"lossmith.errors", "lossmith.files", "lossmith.lazy", "lossmith.user_code"}  # the standard library alone


def test_importing_the_losses_loads_torch_and_nothing_more():
    code = "import sys, json, lossmith.losses; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout))
    assert "torch" in loaded
    assert not loaded & {"transformers", "pydantic", "datasets", "pyarrow", "rich", "cyclopts", "gguf", "safetensors"}
    ours = {m for m in loaded if m.startswith("lossmith.")}
    strangers = {m for m in ours if m not in BESIDE and not m.startswith("lossmith.losses")}
    assert not strangers


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_import_torch_the_standard_library_and_each_other(path):
    for module in imported(ast.parse(path.read_text())):
        root = module.partition(".")[0]
        if root == "lossmith":
            assert module in BESIDE or module.startswith("lossmith.losses"), module
        else:
            assert root == "torch" or root in sys.stdlib_module_names, module


def test_all_lists_are_true():
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE.parent.parent).with_suffix("").parts
        name = ".".join(relative).removesuffix(".__init__")
        module = __import__(name, fromlist=["*"])
        for exported in getattr(module, "__all__", []):
            assert hasattr(module, exported), f"{name}.{exported}"


def test_names_of_axes_do_not_collide():
    """One flat namespace: a parameter name may be shared by options of one axis, not by two pieces in force at once."""
    for name, other in itertools.combinations(AXES, 2):
        a, b = ({flat for piece in AXES[axis].values() for flat in piece.flat_names()} for axis in (name, other))
        # two axes read the token limit's, the bounds' or eps's name: legality asks that they agree
        assert a & b <= {"eps", "gamma", "threshold", "coef"}, (name, other, a & b)


def test_every_field_says_what_it_holds_and_that_is_the_only_list():
    """A field added to Batch is drawn, cleaned and sliced without another line."""
    for name, field in FIELDS.items():
        assert field.provider and set(field.shapes) <= {"N", "NT", "NK", "NTV"}, name
        assert f"{name}" in (L.Batch.__doc__ or ""), name
    source = Path(L.__file__).parent
    rare = ("mismatched_log_ratio", "reference_reward", "pair_probability")
    lists = [p.name for p in source.rglob("*.py") if all(f'"{name}"' in p.read_text() for name in rare)]
    assert lists == []


def test_a_batch_moves_counts_and_keeps_the_gradient():
    leaf = torch.tensor([[-1.0, -2.0], [-0.5, -0.7]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    batch = L.Batch(leaf, mask, reward=[1.0, 0.0], group=[0, 0])
    assert len(batch) == 2 and batch.to("cpu").logp is batch.logp and batch.to("meta").reward.device.type == "meta"
    L.get_loss("reinforce")(batch).loss.backward()
    assert leaf.grad is not None and leaf.grad[0].abs().min() > 0
    assert torch.equal(batch.logp.grad, leaf.grad)

    again = leaf.detach().clone().requires_grad_()
    batch = L.Batch(again, mask, reward=[1.0, 0.0], group=[0, 0])
    L.get_loss("rloo", beta=0)(batch).loss.backward()  # a sequence's sum reaches every slot, the masked one included
    assert float(again.grad[1, 1]) == 0 and torch.equal(batch.logp.grad, again.grad)


def test_rows_and_replace_check_what_is_new_alone():
    batch = L.Batch(-torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool), reward=[1.0, 0.0, 2.0])
    with mock.patch.object(L.Batch, "_clean") as clean:
        assert batch.rows(slice(1, 3)).reward.tolist() == [0.0, 2.0]
        batch.replace(reward=[3.0, 4.0, 5.0])
    assert [call.args for call in clean.call_args_list] == [("reward",)]
    with pytest.raises(LossError, match=r"Batch\.reward"):
        batch.replace(reward=[3.0, 4.0])
    with pytest.raises(LossError, match=r"no field 'rewards'"):
        batch.replace(rewards=[3.0, 4.0, 5.0])
