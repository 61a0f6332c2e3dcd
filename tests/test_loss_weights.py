"""The gradient is what the formula says: autograd against the closed form, a typed table, and finite differences."""

import itertools
import math

import pytest
import torch

import lossmith.losses as L
from batches import (
    NAMES,
    double,
    evaluate,
    gradients,
    make,
    no_trap_warnings,
    normal,
    quiet_loss,
    random_fields,
    single_tokens,
)
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.axes.kl import ESTIMATORS
from lossmith.losses.axes.mismatch import MISMATCH
from lossmith.losses.axes.ratio import RATIO
from lossmith.losses.axes.trust import TRUST, Clip

# drift .3 puts tokens on both sides of PPO's clip, .001 does so for clips of a few ten-thousandths
DRIFTS = (0.3, 0.001)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# -- closed form ----------------------------------------------------------------------------------------------------


def check_closed_form(loss: L.PolicyLoss, fields: dict) -> None:
    leaves, batch = make(fields)
    out = loss(batch)
    grads = gradients(out.loss, leaves)
    assert torch.isfinite(out.loss)
    closed = loss.closed_form_gradient(batch).detach()
    scale = max(1.0, float(closed.abs().max()))
    assert gap(grads["logp"], closed) <= 1e-12 * scale, loss


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("name", NAMES)
def test_catalogue_gradient_is_the_closed_form(name, drift):
    loss = quiet_loss(name)
    for seed in range(5):
        check_closed_form(loss, random_fields(seed, drift))


@pytest.mark.parametrize("level", RATIO)
def test_closed_form_gradient_where_the_log_ratio_clamp_of_20_acts(level):
    """The clamp has zero gradient outside: for the ratio of a token, of a completion, and for the KL by the ratio."""
    fields = random_fields(3, drift=15.0)
    fields["old_logp"] = fields["logp"] + 15 * normal(0, *fields["logp"].shape)
    fields["ref_logp"] = fields["logp"] + 15 * normal(1, *fields["logp"].shape)
    far = (fields["logp"] - fields["old_logp"]).abs() > 20
    assert 0 < int(far.sum()) < far.numel() // 2
    for kl in kl_choices():
        check_closed_form(quiet_loss("reinforce", trust="none", ratio_level=level, **kl), fields)


def kl_choices() -> list[dict]:
    """No KL; every estimator plainly in the loss, by the ratio, straight through; and in the reward."""
    sampled = [e for e in ESTIMATORS if e != "full"]
    choices = [{}]
    for e in sampled:
        choices += [{"beta": 0.3, "kl_estimator": e}, {"beta": 0.3, "kl_estimator": e, "kl_ratio_weight": True}]
        choices += [{"beta": 0.3, "kl_estimator": e, "kl_straight_through": True}]
        choices += [{"beta": 0.3, "kl_estimator": e, "kl_place": "reward"}]
    return choices


def shares(count: int) -> pytest.MarkDecorator:
    """A product cut into this many shares, of which the first is tried always."""
    return pytest.mark.parametrize("share", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, count))])


@shares(len(AGGREGATE))
@pytest.mark.parametrize("level", RATIO)
@pytest.mark.parametrize("trust", TRUST)
def test_every_composition_has_its_closed_form_gradient(trust, level, share):
    """trust x ratio level x aggregation x KL: what is legal agrees, and what is illegal is refused.

    A share has one aggregation for each trust region, level and KL, and every pair of an aggregation and one of these.
    """
    fields, legal = random_fields(1), 0
    turn = [*TRUST].index(trust) + [*RATIO].index(level) + share
    pairs = [
        (a, kl)
        for i, a in enumerate(AGGREGATE)
        for j, kl in enumerate(kl_choices())
        if (i + j + turn) % len(AGGREGATE) == 0
    ]
    for aggregate, kl in pairs:
        settings = {"trust": trust, "ratio_level": level, "aggregate": aggregate, **kl}
        # without a ratio anywhere, its level would be a parameter without effect
        if not TRUST[trust].uses_ratio and level != "token" and not kl.get("kl_ratio_weight"):
            with pytest.raises(L.LossError, match="no effect"):
                quiet_loss("reinforce", **settings)
            continue
        if TRUST[trust].token_only and level != "token":
            with pytest.raises(L.LossError, match="ratio of each token"):
                quiet_loss("reinforce", **settings)
            continue
        check_closed_form(quiet_loss("reinforce", **settings), fields)
        legal += 1
    sampled = len(ESTIMATORS) - 1  # each of them, in the KL by the ratio, is legal where anything is
    assert legal >= (0 if TRUST[trust].token_only and level != "token" else sampled)


MISMATCHES = [
    {},
    *(
        {"mismatch": m, "mismatch_level": v}
        for m in MISMATCH
        if m != "none"
        for v in ("token", "sequence", "geometric")
    ),
    *(
        {"mismatch": "gate", "mismatch_stat": s, "mismatch_high": 0.05, "mismatch_weighted": w, "mismatch_level": v}
        for s in ("tv", "binary_kl", "k1", "k2", "k3")
        for w in (True, False)
        for v in ("token", "geometric")
    ),
]


DENOMINATORS = ["old", "behavior", "self", "ref"]


@shares(len(DENOMINATORS))
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_every_denominator_and_mismatch_has_its_closed_form_gradient(denominator, share):
    """A share has every pair of a mismatch and a trust region with one denominator, and every other pair."""
    fields, turn = random_fields(2), DENOMINATORS.index(denominator) + share
    trusts = [t for t in TRUST if TRUST[t].uses_ratio]
    for (i, mismatch), (j, trust) in itertools.product(enumerate(MISMATCHES), enumerate(trusts)):
        if (i + j + turn) % len(DENOMINATORS):
            continue
        settings = {"trust": trust, "denominator": denominator, "beta": 0.1, **mismatch}
        check_closed_form(quiet_loss("grpo", **settings), fields)


def test_the_given_token_advantage_at_sequence_level_acts_by_its_masked_mean():
    fields = random_fields(3)
    fields["advantage"] = normal(0, *fields["logp"].shape)
    loss = quiet_loss("gspo", clip_low=0.2, clip_high=0.2)
    check_closed_form(loss, fields)
    mask = fields["mask"]
    mean = (fields["advantage"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    by_mean, by_token = evaluate(loss, fields | {"advantage": mean}), evaluate(loss, fields)
    torch.testing.assert_close(by_mean[0].loss, by_token[0].loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(by_mean[1]["logp"], by_token[1]["logp"], rtol=1e-12, atol=1e-15)


# -- the typed table (losses.md, section 6) -------------------------------------------------------------------------

R = [0.1, 0.5, 0.9, 1.0, 1.15, 1.5, 2.5, 10.0]
SAME = None
TABLE = {  # label: (loss, changes, w for A > 0, w for A < 0 or SAME)
    "reinforce": ("reinforce", {}, [1, 1, 1, 1, 1, 1, 1, 1], SAME),
    "importance_sampling": ("importance_sampling", {}, [0.1, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 10], SAME),
    "ppo": (
        "ppo",
        {"clip_low": 0.2, "clip_high": 0.2},
        [0.1, 0.5, 0.9, 1, 1.15, 0, 0, 0],
        [0, 0, 0.9, 1, 1.15, 1.5, 2.5, 10],
    ),
    "ppo_dual_clip": (
        "ppo",
        {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3},
        [0.1, 0.5, 0.9, 1, 1.15, 0, 0, 0],
        [0, 0, 0.9, 1, 1.15, 1.5, 2.5, 0],
    ),
    "book_clip": ("book_clip", {"clip_high": 0.2}, [0.1, 0.5, 0.9, 1, 1.15, 0, 0, 0], SAME),
    "cispo": ("cispo", {"clip_low": 1, "cap": 5}, [0.1, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 5], SAME),
    "cispo@trl": ("cispo", {"clip_low": 1, "cap": 0.2}, [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], SAME),
    "cispo@verl": ("cispo", {"clip_low": 0.2, "cap": 1.2}, [0.8, 0.8, 0.9, 1, 1.15, 1.2, 1.2, 1.2], SAME),
    "cispo@roll": ("cispo", {"clip_low": 0.1, "cap": 1.1}, [0.9, 0.9, 0.9, 1, 1.1, 1.1, 1.1, 1.1], SAME),
    "cispo@skyrl wheel": ("cispo", {"clip_low": 0, "cap": 6}, [1, 1, 1, 1, 1.15, 1.5, 2.5, 6], SAME),
    "cispo@open_instruct": ("cispo", {"cap": 1.272}, [0.1, 0.5, 0.9, 1, 1.15, 1.272, 1.272, 1.272], SAME),
    "cispo@tinker": ("cispo", {"cap": 4}, [0.1, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 4], SAME),
    "cispo@skyrl main": ("cispo", {"clip_low": 1, "cap": 5}, [0.1, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 5], SAME),
    "tis_pg": ("tis_pg", {}, [0.1, 0.5, 0.9, 1, 1, 1, 1, 1], SAME),
    "topr": ("topr", {}, [1, 1, 1, 1, 1, 1, 1, 1], [0.1, 0.5, 0.9, 1, 1, 1, 1, 1]),
    "rollout_is": ("rollout_is", {}, [0, 0, 0.9, 1, 1.15, 0, 0, 0], SAME),
    "gppo": ("gppo", {}, [0.1, 0.5, 0.9, 1, 1.15, 1.28, 1.28, 1.28], [0.8, 0.8, 0.9, 1, 1.15, 1.5, 2.5, 10]),
    "opmd": ("opmd", {"tau": 1.0}, [0.5] * 8, SAME),
    "grpo@torchforge": ("grpo@torchforge", {}, [1, 1, 1, 1, 1, 1, 1, 1], SAME),
    **{
        f"preset {name}": (name, {}, weights, SAME)
        for name, weights in {
            "cispo@trl": [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
            "cispo@verl": [0.8, 0.8, 0.9, 1, 1.15, 1.2, 1.2, 1.2],
            "cispo@roll": [0.9, 0.9, 0.9, 1, 1.1, 1.1, 1.1, 1.1],
            "cispo@skyrl": [1, 1, 1, 1, 1.15, 1.5, 2.5, 6],
            "cispo@open_instruct": [0.1, 0.5, 0.9, 1, 1.15, 1.272, 1.272, 1.272],
            "cispo@tinker": [0.1, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 4],
        }.items()
    },
}
# What each catalogue entry is by default, so that a changed default is noticed here.
DEFAULT_ROW = {
    "reinforce": "reinforce",
    "a2c": "reinforce",
    "ppo": "ppo",
    "grpo": "ppo",
    "dr_grpo": "ppo",
    "rloo": "ppo",
    "reinforce_pp": "ppo",
    "cispo": "cispo",
    "book_clip": "book_clip",
    "book_ppo_clip": "book_clip",
    "importance_sampling": "importance_sampling",
    "tis_pg": "tis_pg",
    "ppo_dual_clip": "ppo_dual_clip",
    "rloo_token": "ppo",
    "gpg": "reinforce",
    "opo": "reinforce",
    "remax": "reinforce",
    "maxrl": "reinforce",
    "reward_only": "reinforce",
    "book_reinforce": "reinforce",
    "reinforce_pp_baseline": "ppo",
    "decoupled_ppo": "ppo",
    "pass_at_k": "ppo",
}


# Rows that the table prints with three digits, and the one that looks at the token's old probability (.3).
ROUNDED = {
    "sapo": (
        [0.082, 0.470, 0.898, 1, 1.144, 1.410, 1.491, 0.005],
        [0.081, 0.467, 0.898, 1, 1.143, 1.401, 1.421, 0.003],
    ),
    "dro": (
        [1.115, 1.035, 1.005, 1, 0.993, 0.980, 0.954, 0.885],
        [0.885, 0.965, 0.995, 1, 1.007, 1.020, 1.046, 1.115],
    ),
    "vespo": ([0.149, 1.120, 1.093, 1, 0.843, 0.502, 0.069, 0], [0.006, 0.340, 0.890, 1, 1.127, 1.242, 0.778, 0]),
    "dppo_tv@verl": ([0.1, 0.5, 0.9, 1, 1.15, 1.5, 0, 0], [0, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 3]),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_weight_table_of_the_smooth_losses(name):
    loss = quiet_loss(name)
    for sign, typed in zip((1.0, -1.0), ROUNDED[name], strict=True):
        torch.testing.assert_close(loss.weight(double(R), sign), double(typed), rtol=0, atol=6e-4)


def row(label: str, sign: int) -> torch.Tensor:
    _, _, positive, negative = TABLE[label]
    return double(positive if sign > 0 or negative is SAME else negative)


def autograd_weights(loss: L.PolicyLoss, sign: int, size: float = 1.0) -> torch.Tensor:
    """w(r, A) on the grid, from the gradient of single tokens."""
    fields = single_tokens(R, sign * size)
    leaves, batch = make(fields)
    return -torch.autograd.grad(loss(batch).loss, leaves["logp"])[0][:, 0] / (sign * size)


def check_row(loss: L.PolicyLoss, label: str) -> None:
    """Autograd and the closed form both give the typed row, for either sign and any size of A."""
    for sign, size in itertools.product((1, -1), (1.0, 0.01, 30.0)):
        got, closed = autograd_weights(loss, sign, size), loss.weight(double(R), sign * size)
        torch.testing.assert_close(got, row(label, sign), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(closed, row(label, sign), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label", TABLE)
def test_weight_table(label):
    name, changes, *_ = TABLE[label]
    # the policy term alone, each token counted once
    check_row(quiet_loss(name, **changes, aggregate="token_sum", beta=0), label)


@pytest.mark.parametrize("name", [n for n in NAMES if n in DEFAULT_ROW])
def test_weight_table_of_the_defaults(name):
    loss = quiet_loss(name, beta=0)
    with no_trap_warnings():
        loss = loss.replace(aggregate=L.TokenSum())
    check_row(loss, DEFAULT_ROW[name])


@pytest.mark.parametrize(
    ("name", "inside", "outside_up", "outside_down"),
    [("gspo", [0.9998, 1.0003], 1.0005, 0.9996), ("dapo", [0.81, 1.27], 1.29, 0.79)],
)
def test_bounds_that_the_common_table_does_not_resolve(name, inside, outside_up, outside_down):
    loss = quiet_loss(name, beta=0)
    for advantage in (1.0, -1.0):
        torch.testing.assert_close(loss.weight(double(inside), advantage), double(inside))
    assert (loss.weight(outside_up, 1.0), loss.weight(outside_down, -1.0)) == (0, 0)
    assert (float(loss.weight(outside_up, -1.0)), float(loss.weight(outside_down, 1.0))) == (outside_up, outside_down)


def test_a_documented_cap_is_the_cap_in_force():
    loss = quiet_loss("cispo", cap=20)
    assert [float(loss.weight(r, 1.0)) for r in (10.0, 19.0, 21.0)] == [10, 19, 20]


def test_grpo_does_not_ignore_the_old_policy():
    """A "grpo" with weight 1 at every ratio is REINFORCE."""
    weights = autograd_weights(quiet_loss("grpo", beta=0), 1)
    assert gap(weights, torch.ones_like(weights)) > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_weight_at_zero_advantage_is_the_limit_from_above(name):
    loss = quiet_loss(name)
    ratio = double(R)
    if isinstance(loss.trust, L.Quadratic):  # the pull to the old policy does not vanish with A: w grows without bound
        assert torch.equal(loss.weight(ratio, 0.0), double([torch.inf] * 3 + [1] + [-torch.inf] * 4))
    else:
        assert torch.equal(loss.weight(ratio, 0.0), loss.weight(ratio, 1e-9))
    assert loss.weight(1.0, 1.0).shape == ()
    assert loss.weight(ratio[:, None], double([1.0, -1.0])).shape == (len(R), 2)


# -- planted bugs: the table must see them --------------------------------------------------------------------------


class SwappedBounds(Clip):
    def value(self, at):
        return Clip(self.high, self.low, self.dual).value(at)

    def weight(self, at):
        return Clip(self.high, self.low, self.dual).weight(at)


class MaxInsteadOfMin(Clip):
    def value(self, at):
        r, a = at.ratio, at.advantage
        return -torch.max(r * a, r.clamp(1 - self.low, 1 + self.high) * a)


class FlippedSign(Clip):
    def value(self, at):
        return -super().value(at)


class ClipBeforeTheProduct(Clip):
    def value(self, at):
        return -at.advantage * at.ratio.clamp(max=1 + self.high)


class Detached(Clip):
    def value(self, at):
        return super().value(at.detach()) + 0 * at.logp


class NoDual(Clip):
    def value(self, at):
        return Clip(self.low, self.high).value(at)


@pytest.mark.parametrize(
    "planted", [SwappedBounds, MaxInsteadOfMin, FlippedSign, ClipBeforeTheProduct, Detached, NoDual]
)
def test_planted_bugs_are_caught_by_the_weight_comparison(planted):
    """Each wrong clip must differ from the typed row, and from the right closed form on a random batch."""
    # asymmetric, so that swapped bounds show
    right = L.PolicyLoss(trust=Clip(0.6, 0.2, 3.0), aggregate=L.TokenSum(), name="right")
    wrong = right.replace(trust=planted(0.6, 0.2, 3.0))
    typed = {1: [0.1, 0.5, 0.9, 1, 1.15, 0, 0, 0], -1: [0, 0.5, 0.9, 1, 1.15, 1.5, 2.5, 0]}

    def agrees(loss: L.PolicyLoss) -> bool:
        return all(gap(autograd_weights(loss, s), double(typed[s])) < 1e-9 for s in (1, -1))

    assert agrees(right)
    assert not agrees(wrong)
    fields = random_fields(0, drift=0.8)
    assert gap(evaluate(wrong, fields)[1]["logp"], right.closed_form_gradient(L.Batch(**fields))) > 1e-3


# -- an independent reference, in plain Python ----------------------------------------------------------------------


def token_share(aggregate: str, mask: torch.Tensor, group: torch.Tensor, row: int, max_length: int) -> float:
    """1/Z of a valid token of this row, typed from losses.md section 2.9."""
    lengths = [int(x) for x in mask.sum(1)]
    live = [i for i, length in enumerate(lengths) if length]
    together = [i for i in live if group[i] == group[row]]
    return {
        "token_mean": 1 / sum(lengths),
        "seq_mean_token_mean": 1 / (len(live) * max(lengths[row], 1)),
        "seq_mean_token_sum": 1 / len(live),
        "seq_mean_token_sum_norm": 1 / (len(live) * max_length),
        "token_sum": 1.0,
        "prompt_mean": 1 / (len({int(group[i]) for i in live}) * max(sum(lengths[i] for i in together), 1)),
    }[aggregate]


@pytest.mark.parametrize("aggregate", AGGREGATE)
def test_ppo_by_hand(aggregate):
    """Value and gradient of clip with ratio, mismatch and k3, token by token with math.exp."""
    fields = random_fields(4)
    fields["advantage"] = normal(0, len(fields["mask"]))
    settings = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "beta": 0.7, "mismatch": "tis"}
    loss = quiet_loss("grpo", aggregate=aggregate, mismatch_high=1.2, **settings)
    total, grad = 0.0, torch.zeros_like(fields["logp"])
    for i, t in fields["mask"].nonzero().tolist():
        lp, old, mu, ref = (float(fields[k][i, t]) for k in ("logp", "old_logp", "behavior_logp", "ref_logp"))
        a, r, u, kappa = float(fields["advantage"][i]), math.exp(lp - old), min(math.exp(old - mu), 1.2), lp - ref
        gain = min(r * a, min(max(r, 0.9), 1.3) * a)
        gain = max(gain, 1.5 * a) if a < 0 else gain
        stopped = (r > 1.3) if a > 0 else (r < 0.9 or r > 1.5)
        share = token_share(aggregate, fields["mask"], fields["group"], i, 8)
        total += share * (-u * gain + 0.7 * (math.exp(-kappa) - 1 + kappa))
        grad[i, t] = share * (-u * (0 if stopped else r * a) + 0.7 * (1 - math.exp(-kappa)))
    out, grads = evaluate(loss, fields)
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-12)
    assert gap(grads["logp"], grad) < 1e-13


# -- finite differences ---------------------------------------------------------------------------------------------

# Losses whose value holds a stop-gradient: their gradient is by design not the derivative of their value.
STOP_GRADIENT = {
    *("cispo", "tis_pg", "topr", "vespo", "dppo_tv", "dppo_kl", "rollout_is", "gppo", "ce_gppo", "fipo"),
    "gspo_token",
    *("rec_one_side", "rec_two_side", "rec_ring"),
    *("sdar", "up_grpo", "aspo"),
}


def test_losses_say_whether_they_stop_gradients():
    assert {name for name in NAMES if quiet_loss(name).stops_gradient} == STOP_GRADIENT


def finite_difference(loss: L.PolicyLoss, fields: dict, leaf: str, h: float = 1e-6) -> torch.Tensor:
    """Central differences in each valid slot, everything that is credit held fixed."""
    batch = L.Batch(**fields)
    credit = loss.credit(batch)
    slopes = torch.zeros_like(fields[leaf])
    for i, t in fields["mask"].nonzero().tolist():
        ends = []
        for step in (h, -h):
            moved = fields[leaf].clone()
            moved[i, t] += step
            ends.append(float(loss.objective(batch.replace(**{leaf: moved}), credit).loss))
        slopes[i, t] = (ends[0] - ends[1]) / (2 * h)
    return slopes


# the conformance suite (test_proofs.py) asks at both
@pytest.mark.parametrize("drift", [DRIFTS[0], pytest.param(DRIFTS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative_of_the_value_unless_gradients_are_stopped(name, drift):
    fields = random_fields(5, drift)
    loss = quiet_loss(name)
    numeric, grad = finite_difference(loss, fields, "logp"), evaluate(loss, fields)[1]["logp"]
    assert float(numeric.abs().max()) > 0
    smooth = steady(loss, fields)
    if name not in STOP_GRADIENT:
        assert gap(numeric[smooth], grad[smooth]) < 1e-7
    # with one advantage a completion, gspo_token's gradient is a derivative
    elif drift == 0.3 and name != "gspo_token":
        assert gap(numeric, grad) > 1e-4


def steady(loss: L.PolicyLoss, fields: dict, h: float = 1e-5) -> torch.Tensor:
    """Tokens whose closed-form gradient does not jump within h: no bound of a clip is near."""
    far = torch.stack([loss.closed_form_gradient(L.Batch(**fields | {"logp": fields["logp"] + s})) for s in (h, -h)])
    return ((far[0] - far[1]).abs() < 1e-3 * far.abs().max()) & fields["mask"]


def test_critic_entropy_and_full_kl_gradients_are_derivatives():
    fields = random_fields(6)
    loss = quiet_loss("ppo", value_coef=0.7, value_clip=0.4, entropy_coef=0.2, beta=0.3, kl_estimator="full")
    grads = evaluate(loss, fields)[1]
    for leaf in ("logp", "value", "entropy", "full_kl"):
        assert gap(finite_difference(loss, fields, leaf), grads[leaf]) < 1e-7
        assert float(grads[leaf].abs().max()) > 0


def test_the_ratio_of_a_sequence_token_has_the_gradient_of_the_token_only():
    """value s, gradient s at its own token: with A per token a stop-gradient, so finite differences disagree."""
    fields = random_fields(7)
    fields["advantage"] = normal(0, *fields["logp"].shape)
    loss = quiet_loss("gspo", ratio_level="sequence_token", clip_low=0.2, clip_high=0.2)
    assert gap(finite_difference(loss, fields, "logp"), evaluate(loss, fields)[1]["logp"]) > 1e-3
