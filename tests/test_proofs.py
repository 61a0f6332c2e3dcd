"""The conformance suite: every loss of the catalogue passes it, and every check sees the fault it is there for."""

import types
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import lossmith.losses as L
from batches import EVERY, no_trap_warnings, quiet_loss
from lossmith.errors import ProofError
from lossmith.losses.batch import FIELDS
from lossmith.proofs import CHECKS, check_loss, prove
from lossmith.proofs.finding import Finding, gap, worst
from lossmith.proofs.random_batches import LEAVES, random_fields


@pytest.mark.parametrize("name", [n if "@" not in n else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_every_loss_of_the_catalogue_passes(name):
    check_loss(quiet_loss(name), seeds=(0,))


VARIANTS = {
    "everything in the loss": ("ppo", {"entropy_coef": 0.1, "beta": 0.2, "kl_estimator": "full", "value_clip": 0.3}),
    "ratio in the KL": ("gspo", {"beta": 0.2, "kl_ratio_weight": True, "clip_low": 0.2, "clip_high": 0.2}),
    "straight through": ("ppo", {"beta": 0.2, "kl_straight_through": True}),
    "mismatch": ("grpo", {"mismatch": "gate", "mismatch_level": "geometric"}),
    "value of the sequence, slope of the token": ("gspo", {"ratio_level": "sequence_token"}),
    "prompt mean": ("dapo", {"aggregate": "prompt_mean", "truncated": "mask"}),
}


@pytest.mark.parametrize("label", VARIANTS)
def test_other_compositions_pass(label):
    name, changes = VARIANTS[label]
    check_loss(quiet_loss(name, **changes), seeds=(3,))


# -- a check that cannot fail is a defect ----------------------------------------------------------------------------


class Broken:
    """A loss with one fault: `call` replaces its evaluation, everything else is the inner loss's."""

    def __init__(self, inner, call=None, **other):
        self.inner, self.call = inner, call or (lambda inner, batch, normalizer: inner(batch, normalizer))
        vars(self).update(other)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, batch, normalizer=None):
        return self.call(self.inner, batch, normalizer)


def changed(how, inner="reinforce", **settings):
    """The loss with its value replaced by how(value, batch)."""

    def call(inner, batch, normalizer):
        out = inner(batch, normalizer)
        return replace(out, loss=how(out.loss, batch))

    return Broken(quiet_loss(inner, **settings), call)


def absolute(inner, batch, normalizer):
    return inner(batch if batch.advantage is None else batch.replace(advantage=batch.advantage.abs()), normalizer)


def a_label_too(inner, batch, normalizer):
    out = inner(batch, normalizer)
    policy = out.terms["policy"] - batch.logp.sum()
    return replace(out, loss=policy, terms={"policy": policy})


def policy_flipped(inner, batch, normalizer):
    out = inner(batch, normalizer)
    terms = out.terms | {"policy": -out.terms["policy"]}
    return replace(out, loss=torch.stack(list(terms.values())).sum(), terms=terms)


def reward_spoiled(inner, batch, normalizer):
    out = inner(batch, normalizer)
    batch.reward.add_(1)
    return out


class WrittenWrongly(Broken):
    @staticmethod
    def from_dict(flat):
        return L.PolicyLoss.from_dict(flat | {"clip_low": 0.5})


class LocalMean(Broken):
    """Every micro-batch divides by its own counts."""

    def objective(self, batch, credit):
        return self.inner(batch)


def promise(**what):
    return types.SimpleNamespace(**what)


def brokens():
    grpo = quiet_loss("grpo")
    flipped_form = Broken(grpo, closed_form_gradient=lambda batch: -grpo.closed_form_gradient(batch))
    token_mean = quiet_loss("dapo", group_filter="none")
    return {
        "closed_form": flipped_form,
        "given_advantages": Broken(grpo, absolute),
        "finite_differences": Broken(quiet_loss("ppo"), stops_gradient=True),
        "far_ratios": changed(lambda x, b: x + 0 * (30 * (b.logp - b.old_logp)).exp().sum()),
        "zero_advantage": Broken(quiet_loss("reinforce"), a_label_too),
        "homogeneous": Broken(quiet_loss("dro"), homogeneous=True),
        "reads": Broken(quiet_loss("topr"), objective_reads=frozenset({"old_logp"})),
        "masked_positions": changed(lambda x, b: x + (b.mask * (-b.logp).log()).sum() * 0.1),
        "padding": changed(lambda x, b: x / b.mask.shape[1]),
        "row_order": changed(lambda x, b: x + (torch.arange(len(b.mask))[:, None] * b.logp).sum()),
        "group_labels": changed(lambda x, b: x * b.group.double().mean(), "grpo"),
        "micro_batches": LocalMean(token_mean),
        "ranks": Broken(token_mean, lambda inner, batch, normalizer: inner(batch)),
        "single_precision": changed(lambda x, b: (x + 1e8) - 1e8),
        "all_masked": changed(lambda x, b: x + 0.1),
        "empty_rows": changed(lambda x, b: x / len(b.mask)),
        "deterministic": changed(lambda x, b: x * torch.rand(())),
        "inputs_untouched": Broken(grpo, reward_spoiled),
        "formula": Broken(grpo, formula=lambda style: r"\frac{1}{N"),
        "round_trip": WrittenWrongly(grpo),
        "listing": Broken(grpo, code=lambda: grpo.code().replace("1 + 0.2", "1 + 0.3")),
        "reward_shift": Broken(quiet_loss("reinforce"), advantage=promise(shift_invariant=True)),
        "reward_scale": Broken(quiet_loss("dr_grpo"), advantage_scale=promise(scale_invariant=True)),
        "raises_reward": Broken(grpo, policy_flipped),
    }


def status(check, loss, seed=0):
    return CHECKS[check](loss, seed).status


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_fails_on_the_loss_that_has_its_fault(check):
    loss = brokens()[check]
    assert status(check, loss) == "failed", CHECKS[check](loss, 0)
    if check not in ("reward_shift", "reward_scale", "round_trip"):  # of the inner loss these are not promised
        assert status(check, loss.inner) == "passed"


def test_a_loss_that_is_homogeneous_in_the_advantage_must_say_so():
    assert status("homogeneous", Broken(quiet_loss("grpo"), homogeneous=False)) == "failed"
    for name in ("clip_cov", "kl_cov"):
        for seed in range(3):
            assert status("homogeneous", quiet_loss(name), seed) == "passed"
    assert quiet_loss("dro", tau=0).homogeneous and quiet_loss("kl_cov", coef=0).homogeneous


def test_a_sign_that_is_wrong_everywhere_is_seen_only_where_the_reward_rises():
    inner = quiet_loss("grpo", beta=0)
    loss = Broken(inner, policy_flipped, closed_form_gradient=lambda b: -inner.closed_form_gradient(b), separable=False)
    loss.code = None  # the listing would tell
    failed = [f.check for f in prove(loss, (0,)) if f.status == "failed"]
    assert failed == ["raises_reward"]


def test_a_stop_gradient_is_found_or_believed_or_refuted():
    capped, plain = quiet_loss("cispo"), quiet_loss("grpo")
    found = CHECKS["finite_differences"](capped, 0)
    assert found.status == "passed" and "stops a gradient" in found.detail and found.number > 0.1
    assert CHECKS["finite_differences"](plain, 0).number < 1e-6
    assert status("finite_differences", Broken(capped, stops_gradient=True)) == "passed"
    assert status("finite_differences", Broken(capped, stops_gradient=False)) == "failed"
    assert status("finite_differences", Broken(plain, stops_gradient=True)) == "failed"
    # the slope of the token, the value of the sequence: it shows only where the advantage differs between tokens
    by_token = quiet_loss("gspo", ratio_level="sequence_token", clip_low=0.2, clip_high=0.2)
    assert status("finite_differences", Broken(by_token, stops_gradient=True)) == "passed"

    def opaque(batch):
        raise NotImplementedError

    # without a closed form nothing tells a stop-gradient from a mistake: the loss has to say so
    assert status("finite_differences", Broken(capped, closed_form_gradient=opaque, stops_gradient=None)) == "failed"
    assert status("closed_form", Broken(capped, closed_form_gradient=opaque)) == "not applicable"


def test_mask_dropped_and_wrong_normalizer():
    unmasked = changed(lambda x, b: x + (-b.logp.where(b.mask, -torch.ones(()).double())).mean(), "reinforce")
    assert {"padding", "all_masked", "empty_rows"} <= {f.check for f in prove(unmasked, (0,)) if f.status == "failed"}


def test_a_check_that_raises_has_failed():
    def call(inner, batch, normalizer):
        raise ZeroDivisionError("by zero")

    findings = prove(Broken(quiet_loss("grpo"), call), (0,))
    by_halves = {"homogeneous", "reads"}  # they ask the two halves, not the whole that raises
    assert {f.check for f in findings if f.status == "passed"} == {"formula", *by_halves}
    assert "ZeroDivisionError: by zero" in findings[0].detail


# -- the interface ---------------------------------------------------------------------------------------------------


def test_check_loss_lists_what_fails_and_knows_waivers():
    broken = changed(lambda x, b: x / b.mask.shape[1])
    with pytest.raises(ProofError) as caught:
        check_loss(broken, seeds=(0,))
    text = str(caught.value)
    assert "reinforce fails" in text and "padding: with 5 more masked columns" in text and "row_order" not in text
    failing = {f.check: "broken on purpose" for f in prove(broken, (0,)) if f.status == "failed"}
    check_loss(broken, seeds=(0,), waived=failing)
    with pytest.raises(ProofError, match="drop the waiver"):
        check_loss(quiet_loss("reinforce"), seeds=(0,), waived={"padding": "no reason"})
    with pytest.raises(ProofError, match="Did you mean 'padding'"):
        check_loss(quiet_loss("reinforce"), seeds=(0,), waived={"paddin": "typo"})


@dataclass
class Output:
    loss: torch.Tensor
    advantage: object
    terms: dict
    metrics: dict


class Pairs:
    """A loss of someone else: the best and the worst completion of each group, no advantage, no closed form."""

    name, coupling, traps = "pairs", "group", ()
    needs = frozenset({"reward", "group"})
    separable = stops_gradient = False

    def __call__(self, batch):
        total = batch.logp.sum() * 0
        for g in batch.group.unique():
            rows = ((batch.group == g) & batch.mask.any(1)).nonzero()[:, 0]
            if len(rows) < 2:
                continue
            best, worst_ = rows[batch.reward[rows].argmax()], rows[batch.reward[rows].argmin()]
            total = total - torch.nn.functional.logsigmoid(0.1 * (batch.logp[best].sum() - batch.logp[worst_].sum()))
        return Output(total, None, {"pairs": total}, {})

    def closed_form_gradient(self, batch):
        raise NotImplementedError("pairs of completions")

    def formula(self, style="text"):
        return r"-\log\sigma(\beta d)" if style == "latex" else "-log sigmoid(beta (a - b))"

    __str__ = formula


def test_a_loss_from_outside_is_held_to_the_same_suite():
    check_loss(Pairs())
    by = {f.check: f for f in prove(Pairs(), (0,))}
    for check in (
        "closed_form",
        "given_advantages",
        "zero_advantage",
        "micro_batches",
        "ranks",
        "round_trip",
        "homogeneous",
        "reads",
    ):
        assert by[check].status == "not applicable", check
    assert by["finite_differences"].status == by["raises_reward"].status == "passed"


def test_a_field_that_nobody_can_make_is_an_error_that_names_it():
    class Wants(Pairs):
        needs = frozenset({"reward", "mood"})

    with pytest.raises(ProofError, match="pairs needs mood, which no proof knows how to make"):
        prove(Wants())
    with no_trap_warnings(), pytest.raises(ProofError, match="needs max_length, which has no default"):
        prove(L.get_loss("dr_grpo"))


def test_random_batches_hold_what_is_needed_and_the_shapes_that_matter():
    every = SimpleNamespace(name="x", needs=frozenset(FIELDS))
    assert set(L.Batch(**random_fields(every, 0)).given) | set(LEAVES) == set(FIELDS)
    fields = random_fields(quiet_loss("ppo"), 0)
    assert {"value", "old_value", "reward", "group", "old_logp"} <= set(fields) and "ref_logp" not in fields
    lengths, sizes = fields["mask"].sum(1), fields["group"].unique(return_counts=True)[1]
    assert 0 in lengths and int(lengths.max()) < 8 and 1 in sizes and len(set(sizes.tolist())) > 1
    near, far = (random_fields(quiet_loss("grpo"), 0, drift) for drift in (0.01, 1.5))
    assert torch.equal(near["reward"], far["reward"])
    spread = [(f["ref_logp"] - f["logp"]).abs().mean() for f in (near, far)]
    assert spread[0] < 0.02 and spread[1] > 0.5
    assert set(LEAVES) <= set(FIELDS)


def test_findings():
    a, b, c = (Finding("x", s, n, "") for s, n in (("passed", 0.5), ("failed", 0.1), ("not applicable", 9.0)))
    assert worst([a, b, c]) is b and worst([a, c]) is a
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert gap(one, one) == 0 and gap(one, 2 * one) == 0.5
    assert gap(one, nan) != gap(one, nan) and gap(one, torch.ones(3)) != 0
