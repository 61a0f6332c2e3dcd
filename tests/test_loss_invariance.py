"""The same number however the batch is laid out, and nothing from slots that do not count."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossmith.losses as L
from batches import LEAVES, NAMES, evaluate, gradients, make, no_trap_warnings, normal, quiet_loss, random_fields
from lossmith.losses.axes.advantage import ADVANTAGE, SCALE
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.axes.extra import EXTRA
from lossmith.losses.axes.masks import GROUP_FILTER, SEQUENCE_MASK
from lossmith.losses.axes.trust import TRUST

# Settings that together touch every piece. The named losses go through the conformance suite (test_proofs.py), whose
# checks of the layout ask the same; what it does not ask is asked of them here, too.
COMPOSITIONS = {
    **{f"aggregate {a}": ("grpo", {"aggregate": a, "entropy_coef": 0.1}) for a in AGGREGATE},
    **{f"advantage {a}": ("reinforce", {"advantage": a}) for a in ADVANTAGE if a not in ("zero", "given")},
    **{f"scale {s}": ("grpo", {"advantage_scale": s}) for s in SCALE},
    **{f"kl {e}": ("grpo", {"beta": 0.2, "kl_estimator": e}) for e in ("k1", "k2", "k3", "abs", "full")},
    **{f"kl {e} in reward": ("rloo", {"beta": 0.2, "kl_estimator": e}) for e in ("k2", "k3", "abs")},
    "kl by ratio": ("gspo", {"beta": 0.2, "kl_ratio_weight": True}),
    "kl straight through": ("ppo", {"beta": 0.2, "kl_straight_through": True}),
    **{
        f"mismatch {m} {v}": ("grpo", {"mismatch": m, "mismatch_level": v})
        for m in ("tis", "icepop", "gate")
        for v in ("token", "sequence", "geometric")
    },
    "gate tv": ("grpo", {"mismatch": "gate", "mismatch_stat": "tv", "mismatch_high": 0.1, "mismatch_level": "token"}),
    "gate kl": ("gspo", {"mismatch": "gate", "mismatch_stat": "binary_kl", "mismatch_high": 0.1}),
    **{f"ratio {r}": ("grpo", {"ratio_level": r}) for r in ("sequence", "sequence_token", "sequence_sum")},
    **{f"denominator {d}": ("grpo", {"denominator": d}) for d in ("behavior", "self", "ref")},
    "truncated mask": ("grpo", {"truncated": "mask"}),
    "truncated zero": ("grpo", {"truncated": "zero"}),
    "group filter": ("grpo", {"group_filter": "zero_variance", "aggregate": "prompt_mean"}),
    "group filter alone": ("reinforce", {"advantage": "raw", "group_filter": "zero_variance"}),
    "prompt mean alone": ("reinforce", {"advantage": "raw", "aggregate": "prompt_mean"}),
    "shaping alone": ("reinforce", {"advantage": "raw", "shaping": ["clip", "scale"], "reward_low": 0.1, "b": 0.7}),
    "critic clip": ("ppo", {"value_clip": 0.3, "advantage_scale": "whiten", "advantage_clip": 1.0}),
    "shaping": ("grpo", {"shaping": ["clip", "scale", "overlong"], "reward_low": -1, "a": 2, "b": 0.7}),
    "shaping per token": ("reinforce_pp", {"shaping": ["clip", "scale"], "reward_low": 0.1, "a": 2, "b": 0.7}),
}
COMPOSITIONS |= {
    **{f"trust {t}": ("dr_grpo", {"trust": t}) for t in TRUST},
    **{f"extra {x}": ("dr_grpo", {"extra": x}) for x in EXTRA},
    **{f"filter {f}": ("grpo", {"group_filter": f}) for f in GROUP_FILTER},
    **{f"sequence mask {m}": ("grpo", {"sequence_mask": m}) for m in SEQUENCE_MASK},
    "normalized weights": ("grpo", {"mismatch": "tis", "mismatch_batch_normalize": True}),
    "kl to the sampler": ("grpo", {"kl_target": "behavior", "kl_estimator": "square"}),
    "kl capped": ("grpo", {"kl_straight_through": True, "kl_is_cap": 1.1}),
    "kl masked": ("grpo", {"mask_kl": True, "mismatch": "icepop", "sequence_mask": "opsm"}),
    "kl aggregated otherwise": ("gspo", {"beta": 0.1, "kl_aggregate": "token_mean"}),
    "entropy aggregated otherwise": ("gspo", {"entropy_coef": 0.1, "entropy_aggregate": "seq_mean_token_sum"}),
    "advantage factor": ("grpo", {"advantage_mul": -0.5}),
    "several scores": ("grpo", {"shaping": ["weighted_sum"], "score_weights": [0.3, 2.0]}),
    "potential": ("reinforce_pp", {"shaping": ["potential"]}),
}
CATALOGUE = {name: (name, {}) for name in NAMES}
every_composition = pytest.mark.parametrize("label", COMPOSITIONS)
with_the_catalogue = pytest.mark.parametrize("label", [*CATALOGUE, *COMPOSITIONS])


@cache
def build(label: str) -> L.PolicyLoss:
    name, changes = (CATALOGUE | COMPOSITIONS)[label]
    return quiet_loss(name, **changes)


SEPARABLE = [n for n in COMPOSITIONS if build(n).separable]


def token_reward(loss: L.PolicyLoss) -> bool:
    """Whether to try it with a reward for each token as well: everything but a filter on completions' scores."""
    return isinstance(loss.group_filter, L.NoFilter)


def variants(loss: L.PolicyLoss, seed: int = 0) -> list[dict]:
    """Fields with a reward per completion, per token, and with the advantage given."""
    base = random_fields(seed)
    shape = base["logp"].shape
    found = [base]
    if token_reward(loss):
        found.append(base | {"reward": normal(seed + 100, *shape)})
    if not (loss.kl.active and loss.kl.place == "reward"):
        found.append(base | {"advantage": normal(seed + 200, *shape), "returns": normal(seed + 300, *shape)})
        found.append(base | {"advantage": normal(seed + 400, shape[0])})
    return found


def check_same(a: tuple, b: tuple) -> None:
    """(loss value, {leaf: gradient}) of two evaluations agree to float64 rounding."""
    torch.testing.assert_close(a[0], b[0], rtol=1e-11, atol=1e-12)
    for leaf in a[1]:
        torch.testing.assert_close(a[1][leaf], b[1][leaf], rtol=1e-11, atol=1e-12, msg=lambda m, leaf=leaf: leaf + m)


def whole(loss: L.PolicyLoss, fields: dict) -> tuple:
    out, grads = evaluate(loss, fields)
    return out.loss.detach(), grads


# -- M1: partition ---------------------------------------------------------------------------------------------------


def chunked(loss: L.PolicyLoss, fields: dict, chunks: list[list[int]]) -> tuple[tuple, dict, dict]:
    """((loss, gradients), terms, metrics) summed over micro-batches under one credit of the whole batch."""
    leaves, batch = make(fields)
    credit = loss.credit(batch)
    total, terms, metrics = torch.zeros((), dtype=batch.logp.dtype), {}, {}
    for chunk in chunks:
        index = torch.tensor(chunk)
        out = loss.objective(batch.rows(index), credit.rows(index))
        total = total + out.loss
        for key, value in out.terms.items():
            terms[key] = terms.get(key, 0) + value.detach()
        for key, value in out.metrics.items():
            metrics[key] = metrics.get(key, 0) + value
    return (total.detach(), gradients(total, leaves)), terms, metrics


@pytest.mark.parametrize("label", SEPARABLE)
def test_micro_batches_add_up_to_the_whole(label):
    loss = build(label)
    partitions = [
        [[8, 0, 3], [1], [2, 7, 6, 5, 4]],
        [[i] for i in range(9)],
        [[4], list(range(4)), [5, 6, 7, 8]],
    ]
    for i, fields in enumerate(variants(loss)):
        out, grads = evaluate(loss, fields)
        for chunks in partitions[i - 1 : i] or partitions:  # all of them, then one by turns
            parts, terms, metrics = chunked(loss, fields, chunks)
            check_same((out.loss.detach(), grads), parts)
            assert terms.keys() == out.terms.keys()
            for key, value in terms.items():
                torch.testing.assert_close(value, out.terms[key].detach(), rtol=1e-11, atol=1e-12)
            for key, value in metrics.items():
                assert value == pytest.approx(out.metrics[key], rel=1e-10, abs=1e-12), key
            # the terms are the loss
            torch.testing.assert_close(sum(terms.values()), out.loss.detach(), rtol=1e-11, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_partition_of_any_batch_adds_up(data):
    label = data.draw(st.sampled_from(sorted(SEPARABLE)))
    loss, fields = build(label), random_fields(data.draw(st.integers(0, 50)), data.draw(st.sampled_from([0.01, 0.5])))
    order = data.draw(st.permutations(range(9)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 8))))
    chunks = [order[a:b] for a, b in itertools.pairwise([0, *cuts, 9])]
    check_same(whole(loss, fields), chunked(loss, fields, chunks)[0])


def live_normalizer(loss: L.PolicyLoss, fields: dict) -> L.Normalizer:
    """Counts of a rank's share; groups that the filter leaves out are not counted."""
    mask, group = fields["mask"], fields["group"]
    taking_part = loss.group_filter.keep(L.Batch(**fields))
    mask = mask if taking_part is None else mask & taking_part[:, None]
    return L.Normalizer.of(mask, group)


@every_composition
def test_ranks_with_a_shared_normalizer_add_up(label):
    """Each rank has whole prompts and makes its own credit; only the counts are shared."""
    loss = build(label)
    fields = random_fields(1)
    if loss.coupling == "batch":
        whole_batch = not loss.separable or loss.mismatch.coupling == "batch" or loss.local_normalizer
        if whole_batch or (loss.kl.active and loss.kl.place == "reward"):
            pytest.skip("statistics of the whole batch, which one rank cannot see")
        fields["advantage"] = normal(0, 9, 8)
    group = fields["group"]
    ranks = [(group == 5) | (group == 9), (group == 2) | (group == 7)]
    shares = [{k: v[rank] for k, v in fields.items()} for rank in ranks]
    norm = live_normalizer(loss, shares[0]) + live_normalizer(loss, shares[1])
    assert norm == live_normalizer(loss, fields)
    total, grads = 0.0, {leaf: torch.zeros_like(fields[leaf]) for leaf in LEAVES}
    for rank, share in zip(ranks, shares, strict=True):
        leaves, batch = make(share)
        out = loss(batch, norm)
        total = total + out.loss.detach()
        for leaf, grad in gradients(out.loss, leaves).items():
            grads[leaf][rank] = grad
    check_same(whole(loss, fields), (total, grads))


@every_composition
def test_order_of_rows_does_not_matter(label):
    loss = build(label)
    order = torch.tensor([3, 8, 0, 5, 4, 7, 1, 6, 2])
    for fields in variants(loss):
        value, grads = whole(loss, fields)
        moved = whole(loss, {k: v[order] for k, v in fields.items()})
        check_same((value, {k: g[order] for k, g in grads.items()}), moved)


def repacked(fields: dict, width: int, seed: int) -> dict:
    """The same tokens at other positions of wider rows, in order; padding holds garbage."""
    mask = fields["mask"]
    n = len(mask)
    draw = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.rand(width, generator=draw).argsort().argsort() for _ in range(n)])
    wide = places < mask.sum(1)[:, None]
    moved = {"mask": wide}
    for key, x in fields.items():
        if key == "mask":
            continue
        moved[key] = x
        if x.shape[:2] == mask.shape:
            moved[key] = torch.full((n, width, *x.shape[2:]), -777.0, dtype=x.dtype)
            moved[key][wide] = x[mask]
    return moved


# A step of the discount is a position, so that gaps between tokens matter (padding at the ends does not).
BY_POSITION = [n for n in COMPOSITIONS if isinstance(build(n).trust, L.Influence)]


@pytest.mark.parametrize("label", BY_POSITION)
def test_padding_at_the_ends_does_not_matter_where_positions_count(label):
    loss, fields = build(label), random_fields(0)
    value, grads = whole(loss, fields)
    for left, right in ((3, 0), (0, 3), (2, 5)):
        ends = {2: (left, right), 3: (0, 0, left, right)}  # the last dimension first
        pad = torch.nn.functional.pad
        wide = {k: pad(x, ends[x.ndim]) if x.shape[:2] == (9, 8) else x for k, x in fields.items()}
        wide_value, wide_grads = whole(loss, wide)
        check_same((value, grads), (wide_value, {k: g[:, left : left + 8] for k, g in wide_grads.items()}))


@pytest.mark.parametrize("label", [n for n in COMPOSITIONS if n not in BY_POSITION])
def test_padding_does_not_matter(label):
    """Left, right, in between, wider: the k-th token of a row has the same gradient wherever it stands."""
    loss = build(label)
    for fields in variants(loss):
        value, grads = whole(loss, fields)
        for width in (8, 13):
            wide = repacked(fields, width, seed=width)
            wide_value, wide_grads = whole(loss, wide)
            check_same(
                (value, {k: g[fields["mask"]] for k, g in grads.items()}),
                (wide_value, {k: g[wide["mask"]] for k, g in wide_grads.items()}),
            )


@every_composition
def test_rows_without_a_token_change_nothing(label):
    loss = build(label)
    live = torch.tensor([i for i in range(9) if i != 4])
    for fields in variants(loss):
        value, grads = whole(loss, fields)
        without = whole(loss, {k: v[live] for k, v in fields.items()})
        check_same((value, {k: g[live] for k, g in grads.items()}), without)


@every_composition
def test_float32_agrees_with_float64(label):
    loss = build(label)
    exact, exact_grads = whole(loss, random_fields(2))
    value, grads = whole(loss, random_fields(2, dtype=torch.float32))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-4, atol=2e-5)
    for leaf in LEAVES:
        torch.testing.assert_close(grads[leaf].double(), exact_grads[leaf], rtol=2e-3, atol=2e-5)


@with_the_catalogue
def test_coupling_is_true(label):
    """Credit of rows on their own equals their credit within the batch, as far as `coupling` says they are coupled."""
    loss = build(label)
    if loss.coupling == "batch":
        pytest.skip("coupled over the whole batch")
    fields = random_fields(3)
    norm = live_normalizer(loss, fields)
    together = loss.credit(L.Batch(**fields), norm)
    group = fields["group"]
    units = [group == g for g in group.unique()] if loss.coupling == "group" else list(torch.eye(9, dtype=torch.bool))
    for unit in units:
        alone, of_unit = loss.credit(L.Batch(**{k: v[unit] for k, v in fields.items()}), norm), together.rows(unit)
        for part in ("advantage", "weight", "mismatch"):
            torch.testing.assert_close(getattr(alone, part), getattr(of_unit, part), rtol=1e-11, atol=1e-12)


# -- M2: poison ------------------------------------------------------------------------------------------------------


POISON = (float("nan"), float("inf"), -float("inf"), 1e30, -200.0)


def poisoned(fields: dict, *values: float) -> dict:
    """These numbers by turns in every slot that must not count: masked tokens, all of rows without a token."""
    mask = fields["mask"]
    sick = {}
    for key, x in fields.items():
        if key == "mask" or not x.is_floating_point():
            sick[key] = x
        else:
            counts = mask.any(1, keepdim=x.ndim == 2)
            if x.shape[:2] == mask.shape:
                counts = mask if x.ndim == 2 else mask[..., None]
            by_turns = torch.tensor(values, dtype=x.dtype).repeat(-(-x.numel() // len(values)))[: x.numel()]
            sick[key] = torch.where(counts, x, by_turns.view_as(x))
    return sick


@every_composition
def test_what_stands_at_masked_positions_never_matters(label):
    """Loss, terms, metrics and every gradient, bit for bit; gradients at masked positions are exactly 0."""
    loss = build(label)
    for fields in variants(loss):
        out, grads = evaluate(loss, poisoned(fields, 0.0))
        assert torch.isfinite(out.loss)
        for values in (POISON, POISON[2:] + POISON[:2]):  # in one slot this and that
            sick_out, sick_grads = evaluate(loss, poisoned(fields, *values))
            assert torch.equal(out.loss, sick_out.loss)
            assert torch.equal(out.advantage, sick_out.advantage)
            assert out.metrics == sick_out.metrics
            assert all(torch.equal(out.terms[k], sick_out.terms[k]) for k in out.terms)
            for leaf in LEAVES:
                assert torch.equal(grads[leaf], sick_grads[leaf]), leaf
                assert not sick_grads[leaf][~fields["mask"]].any(), leaf


@pytest.mark.parametrize("label", [n for n in COMPOSITIONS if n != "kl full"])
def test_poison_does_not_reach_the_closed_form(label):
    loss = build(label)
    fields = random_fields(0)
    clean = loss.closed_form_gradient(L.Batch(**poisoned(fields, 0.0)))
    assert torch.equal(clean, loss.closed_form_gradient(L.Batch(**poisoned(fields, *POISON))))


# -- M4: empty and constant ------------------------------------------------------------------------------------------


@every_composition
def test_all_masked_is_zero_and_says_so(label):
    loss = build(label)
    for fields in variants(loss):
        empty = fields | {"mask": torch.zeros_like(fields["mask"])}
        for sick in (empty, poisoned(empty, float("nan"))):
            out, grads = evaluate(loss, sick)
            assert float(out.loss.detach()) == 0 and out.metrics["tokens"] == 0 and out.metrics["completions"] == 0
            assert not any(g.any() for g in grads.values())
            assert not out.advantage.any()


def policy_term_only(label: str) -> L.PolicyLoss:
    """Without KL, entropy bonus, critic and extra terms, whose gradients do not vanish with the advantage."""
    name, changes = (CATALOGUE | COMPOSITIONS)[label]
    kept = {k: v for k, v in changes.items() if not (k.startswith("kl_") or k in ("beta", "value_clip"))}
    with no_trap_warnings():
        return quiet_loss(name, **kept).replace(kl=L.KL(), value=L.ValueLoss(), extra=L.NoExtra(), entropy_coef=0.0)


PULLED = [n for n in COMPOSITIONS if isinstance(build(n).trust, L.Quadratic | L.CovKL)]  # to the old policy, whatever A


@pytest.mark.parametrize("label", [n for n in COMPOSITIONS if n not in PULLED])
def test_zero_advantage_gives_exactly_zero_gradient(label):
    """The sampled completion is a trial to be scored, not a label."""
    loss = policy_term_only(label)
    fields = random_fields(0) | {"advantage": torch.zeros(9, dtype=torch.float64)}
    out, grads = evaluate(loss, fields)
    assert float(out.loss.detach()) == 0 and not grads["logp"].any()


GROUP_BASELINES = [n for n in COMPOSITIONS if build(n).coupling == "group"]
GROUP_BASELINES = [n for n in GROUP_BASELINES if isinstance(build(n).advantage, (L.Group, L.LOO, L.MaxRL))]
GROUP_BASELINES = [n for n in GROUP_BASELINES if n not in (*PULLED, "several scores")]


@pytest.mark.parametrize("label", GROUP_BASELINES)
@pytest.mark.parametrize("reward", [0.1, -3.3, 1e-9, 12345.678, 1 / 3])
def test_constant_groups_give_exactly_zero(label, reward):
    """Whatever rounding makes of mean and deviation: advantage and gradient are 0, not 1e-11."""
    loss = policy_term_only(label)
    fields = random_fields(0)
    shifted = torch.where(fields["group"] == 5, 7 * reward, reward)  # constant within, different between groups
    if "overlong" in [s.option for s in loss.shaping]:
        fields["mask"] = torch.arange(8) < torch.ones(9, 1)  # equal lengths, else the punishment differs
    if loss.truncated == "zero":
        fields["truncated"] = torch.zeros(9, dtype=torch.bool)
    out, grads = evaluate(loss, fields | {"reward": shifted.double()})
    assert not out.advantage.any() and not grads["logp"].any() and float(out.loss.detach()) == 0
    assert out.metrics["constant_groups"] == out.metrics["groups"]


def test_an_empty_row_does_not_shift_its_siblings():
    """A completion without a token is no completion: neither mean, deviation, batch statistics nor counts see it."""
    fields = random_fields(0)
    assert not fields["mask"][4].any() and int(fields["group"][4]) == 2
    for label in COMPOSITIONS:
        loss = build(label)
        before = loss(L.Batch(**fields))
        after = loss(L.Batch(**(fields | {"reward": fields["reward"].index_fill(0, torch.tensor([4]), 1e6)})))
        assert torch.equal(before.advantage, after.advantage), label
        assert before.metrics == after.metrics, label


@pytest.mark.parametrize("name", NAMES)
def test_one_row_and_one_token(name):
    """A batch of a single one-token completion: finite, whatever statistics are undefined."""
    loss = quiet_loss(name)
    fields = {k: v[1:2] for k, v in random_fields(0).items()}
    assert int(fields["mask"].sum()) == 1
    out, grads = evaluate(loss, fields)
    assert torch.isfinite(out.loss) and all(torch.isfinite(g).all() for g in grads.values())


# -- numbers far out -------------------------------------------------------------------------------------------------


SHIFTS = list(itertools.product((-40.0, 0.0, 40.0), repeat=3))


def far_out(base: dict, shifts: list[tuple]) -> dict:
    """The batch once for each triple of shifts (of the old policy, the sampler, the reference), groups kept apart."""
    n = len(shifts)
    fields = {k: x.repeat(n, *[1] * (x.ndim - 1)) for k, x in base.items()}
    rows = len(base["mask"])
    fields["group"] = fields["group"] + 100 * torch.arange(n).repeat_interleave(rows)
    fields["logp"] = fields["logp"] - 50
    for name, shift in zip(("old_logp", "behavior_logp", "ref_logp"), zip(*shifts, strict=True), strict=True):
        by_row = torch.tensor(shift, dtype=fields["logp"].dtype).repeat_interleave(rows)
        fields[name] = fields["logp"] + by_row[:, None]
    return fields


@with_the_catalogue
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_log_ratios_of_forty_stay_finite(label, dtype):
    """Every combination in every group; for losses that look at the whole batch, each combination alone too."""
    loss = build(label)
    base = random_fields(0, dtype=dtype)
    batches = [far_out(base, [shifts]) for shifts in SHIFTS] if loss.coupling == "batch" else []
    for fields in (far_out(base, SHIFTS), *batches):
        out, grads = evaluate(loss, fields)
        assert torch.isfinite(out.loss)
        assert all(torch.isfinite(g).all() for g in grads.values())
        assert all(torch.isfinite(torch.tensor(list(out.metrics.values()))))
