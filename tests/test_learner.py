"""The learner through a real model: exact gradients in every form, identities at step 0, the frozen left alone."""

import copy
import dataclasses
import itertools
import warnings

import pytest
import torch

import tiny
from lossmith.errors import PolicyError, RunError, TrapWarning
from lossmith.losses import CATALOGUE, example_loss, parse_loss
from lossmith.policy import Teacher, sample
from lossmith.rollouts import Distribution, LogProbs, Score
from lossmith.training import Learner, Recipe
from lossmith.training.can_learn import TAUGHT
from lossmith.training.passes import rows_of_updates
from lossmith.training.recipe import PROVIDED

# Everything that training can provide for, with values where there is no agreed default.
SPECS = {
    name: f"{name}({', '.join(f'{k}={v!r}' for k, v in entry.example.items())})" if entry.example else name
    for name, entry in CATALOGUE.items()
    if "@" not in name and example_loss(name).needs <= PROVIDED
}
NAMES = sorted(SPECS.values())


def asked(name):
    """What of a loss decides the learner's way: what it reads, and of which rows it needs all."""
    loss = example_loss(name)
    return loss.needs, loss.coupling, loss.separable, loss.uses_old


# One loss of each way, the first by name; the slow tests have them all.
ONE_OF_EACH = [SPECS[name] for name in {asked(name): name for name in sorted(SPECS, reverse=True)}.values()]
AT_REST = {"kl_only"}
MEASURE = Distribution(0, temperature=0.8, dtype="float64")
VARIANTS = [
    "grpo(kl_estimator='full')",
    "grpo(entropy_coef=0.1)",
    "dapo(truncated='mask', max_length=9, buffer=4)",
    "grpo(kl_ratio_weight=True)",
    "ppo(value_clip=0.2, dual_clip=3.0)",
    "reinforce(mismatch='tis', advantage='loo')",
]


def quiet_loss(spec, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)
        loss = parse_loss(spec)
        return loss.replace(max_length=9) if "max_length" in loss.needs else loss


def recipe(**fields):
    return Recipe.make(**dict(temperature=0.8, max_tokens=9, learning_rate=1e-3, allow_traps=True) | fields)


def scored(rollouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(rollouts), generator=generator).tolist()
    return [dataclasses.replace(r, score=Score(value=v)) for r, v in zip(rollouts, values, strict=True)]


def learner(spec, dtype=torch.float64, seed=0, **fields):
    policy = tiny.policy(tiny.llama(seed=seed), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)
        loss = quiet_loss(spec)
        teacher = Teacher(tiny.policy(tiny.llama(seed=7), dtype)) if loss.needs & TAUGHT else None
        made = Learner(policy, loss, recipe(**fields), teacher=teacher)
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return made


def moved(made, amount=0.02):
    """Take the policy off the old policy, so that ratios differ from 1 and clips bite."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in made.policy.parameters():
            p.add_(amount * torch.randn(p.shape, dtype=p.dtype, generator=generator))


def gradients(made):
    heads = [] if made.policy.value_head is None else list(made.policy.value_head.parameters())
    return [p.grad.clone() for p in [*made.policy.parameters(), *heads] if p.grad is not None]


def rounds(spec, forms):
    """(loss and gradients by hand, [metrics, gradients] of each form) of one round, off-policy.

    A form: layout, micro_batch_tokens, order of the rollouts. By hand: every rollout alone through the model, one loss
    over the whole batch, one backward pass.
    """
    made = learner(spec, epochs=2)
    rollouts = scored(tiny.rollouts(measure=MEASURE))
    prepared = []
    for layout, budget, order in forms:
        made.layout, made.recipe = layout, recipe(micro_batch_tokens=budget, epochs=2)
        mine = [rollouts[i] for i in order] if order else rollouts
        batch = made.make_batch(mine)
        prepared.append((layout, made.recipe, mine, batch, made.loss.credit(batch)))
    moved(made)
    batch, credit = prepared[0][-2:]
    output = made.loss.objective(batch.replace(**by_hand(made, rollouts, batch)), credit)
    output.loss.backward()
    expected, found = (output, gradients(made)), []
    for layout, settings, mine, batch, credit in prepared:
        made.optimizer.zero_grad()
        made.layout, made.recipe = layout, settings
        found.append((made.accumulate(mine, batch, credit), gradients(made)))
    return expected, found


def by_hand(made, rollouts, batch):
    """What the loss needs of a forward pass, one rollout after the other."""
    wanted = {"logp"} | ({"entropy", "full_kl", "value"} & made.loss.needs)
    wanted |= {"divergence"} if made.loss.divergence is not None else set()
    fields = {name: torch.zeros(batch.valid.shape, dtype=torch.float64) for name in wanted}
    for row, r in enumerate(rollouts):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        at = slice(len(r.prompt_ids) - 1, -1)
        hidden = made.policy.model.base_model(input_ids=ids).last_hidden_state[0, at]
        logps = (made.policy.model.lm_head(hidden) / 0.8).log_softmax(-1)
        span = (row, slice(len(r.completion_ids)))
        fields["logp"][span] = logps.gather(1, ids[0, len(r.prompt_ids) :, None])[:, 0]
        if "entropy" in wanted:
            fields["entropy"][span] = -(logps.exp() * logps).sum(-1)
        if "full_kl" in wanted:
            theirs = (made.reference.model(input_ids=ids).logits[0, at] / 0.8).log_softmax(-1).detach()
            fields["full_kl"][span] = (logps.exp() * (logps - theirs)).sum(-1)
        if "divergence" in wanted:
            [seen] = made.teacher.sees([r])
            theirs = made.teacher.policy.model(input_ids=torch.tensor([seen.prompt_ids + r.completion_ids])).logits
            theirs = (theirs[0, len(seen.prompt_ids) - 1 : -1] / 0.8).log_softmax(-1).detach()
            fields["divergence"][span] = made.loss.divergence(logps, theirs)
        if "value" in wanted:
            fields["value"][span] = made.policy.value_head(hidden.detach())[:, 0]
    return fields


WHOLE = ("shared", 4096, None)
LAYOUTS = [("right", 4096, None), ("left", 4096, None), ("packed", 4096, None), ("single", 4096, None)]
SPLITS = [("shared", 1, None), ("shared", 20, None), ("packed", 35, None)]
ORDER = ("shared", 4096, [4, 8, 1, 0, 6, 3, 7, 2, 5])


def forms_of(spec):
    """Every form where a loss reads more of the forward pass than logp; of the others, two by turns."""
    every = [*LAYOUTS, *SPLITS, ORDER]
    turn = 0 if spec in VARIANTS else NAMES.index(spec)
    return [WHOLE, *(every if spec in VARIANTS else (every[turn % 8], every[(turn + 3) % 8]))]


def check_forms(spec, forms):
    (expected, wanted), found = rounds(spec, forms)
    # the made-up sampler of these rollouts lies outside every band, and the old policy is the reference
    silent = spec.split("(")[0] in ("m2po", "rollout_is")
    assert silent or any(g.abs().max() > 1e-6 for g in wanted)
    for metrics, gradient in found:
        assert abs(metrics["loss"] - float(expected.loss.detach())) < 1e-10
        for a, b in zip(gradient, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", sorted(ONE_OF_EACH) + VARIANTS)
def test_loss_and_gradient_are_the_same_in_every_form(spec):
    """Shared, padded, packed and one-by-one; any split; any order; against a plain evaluation of the whole batch."""
    check_forms(spec, forms_of(spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", NAMES)
def test_loss_and_gradient_are_the_same_in_all_forms_at_once(spec):
    check_forms(spec, [WHOLE, *LAYOUTS, *SPLITS, ORDER])


def test_metrics_add_up_over_micro_batches():
    _, ((whole, _), (parts, _)) = rounds("grpo(entropy_coef=0.1)", [WHOLE, SPLITS[0]])
    assert whole.keys() == parts.keys()
    for key in whole:
        assert abs(whole[key] - parts[key]) < 1e-6, key


# -- identities on a real round ---------------------------------------------------------------------------------------


def sampled(made, n=4):
    rollouts = sample(made.policy, tiny.prompts(), n, made.recipe.sampling, seed=0, step=0)
    return scored(rollouts)


def test_step_0_identities():
    """Ratio 1, KL to the reference 0, group advantages that sum to 0, no token clipped; sampler and learner agree."""
    made = learner("grpo", torch.float32, epochs=2)  # two epochs, so that old log-probabilities are measured
    rollouts = sampled(made)
    batch = made.make_batch(rollouts)
    credit = made.loss.credit(batch)
    metrics = made.accumulate(rollouts, batch, credit)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_ref"] == pytest.approx(0, abs=1e-9)
    assert metrics["kl_old"] == pytest.approx(0, abs=1e-9)
    assert tiny.update(made, rollouts)[0].metrics["sampler_gap"] < 1e-5
    for prompt in {r.prompt.id for r in rollouts}:
        rows = [i for i, r in enumerate(rollouts) if r.prompt.id == prompt]
        assert abs(float(credit.advantage[rows, 0].sum())) < 1e-5


@pytest.mark.parametrize(
    "spec", ["grpo(mismatch='tis')", "reinforce(mismatch='gate', mismatch_high=1.5)", "cispo(mismatch='icepop')"]
)
def test_a_mismatch_correction_takes_the_old_policy_from_the_updates_own_pass(spec):
    """One update: what it learns and what is written down are those of a pass that measures the old policy first."""
    rollouts = scored(tiny.rollouts(measure=MEASURE))  # log-probabilities of no sampler: most weights are not 1
    found = []
    for early in (True, False):
        made = learner(spec, micro_batch_tokens=60)
        batch = made.make_batch(rollouts)
        assert batch.old_logp is None
        old = made.outputs(made.policy, rollouts, frozenset()).logp
        given = batch.replace(old_logp=old) if early else batch
        credit = made.loss.credit(given)
        assert (credit.mismatch is None) == (not early)
        update = made.update(rollouts, given, credit, 0)
        assert (update.old_logp is None) == early
        if not early:
            assert torch.equal(update.old_logp, old)
            credit = made.loss.completed(credit, batch.replace(old_logp=update.old_logp))
        found.append((update.metrics, credit.mismatch, [p.detach().clone() for p in made.policy.parameters()]))
    (metrics, u, weights), (late_metrics, late_u, late_weights) = found
    assert torch.equal(u, late_u) and bool((u != 1)[batch.valid].any())
    assert all(torch.equal(a, b) for a, b in zip(weights, late_weights, strict=True))
    assert {k: v for k, v in metrics.items() if k != "kl_old"} == late_metrics


def test_a_correction_over_the_batch_and_several_updates_measure_the_old_policy_first():
    rollouts = scored(tiny.rollouts(measure=MEASURE))
    for made in (
        learner("grpo(mismatch='tis', mismatch_batch_normalize=True)"),
        learner("grpo(mismatch='tis')", epochs=2),
    ):
        batch = made.make_batch(rollouts)
        credit = made.loss.credit(batch)
        assert batch.old_logp is not None and credit.mismatch is not None
        assert made.update(rollouts, batch, credit, 0).old_logp is None


# kl_only pulls to the reference, which is where the first step starts
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(SPECS[n], marks=() if SPECS[n] in ONE_OF_EACH else pytest.mark.slow)
        for n in sorted(SPECS)
        if not CATALOGUE[n].demonstration | (n in AT_REST)
    ],
)
def test_after_one_step_the_trained_moved_and_the_frozen_did_not(spec):
    made = learner(spec, torch.float32)
    reference = None if made.reference is None else made.reference.checksum()
    before = copy.deepcopy(dict(made.policy.model.named_parameters()))
    head = None if made.policy.value_head is None else made.policy.value_head.weight.clone()
    update, rollouts = tiny.update(made, sampled(made))
    after = dict(made.policy.model.named_parameters())
    changed = [float((after[n] != before[n]).float().mean()) for n in after if n != "model.embed_tokens.weight"]
    assert min(changed) > 0.5
    assert made.policy.version == 1 and update.skipped == 0
    if made.reference is not None:
        assert made.reference.checksum() == reference
    if head is not None:
        assert not torch.equal(head, made.policy.value_head.weight)
    assert all(r.advantage is not None for r in rollouts)


def test_rewards_that_are_all_equal_teach_nothing():
    made = learner("dr_grpo", torch.float32)
    rollouts = [dataclasses.replace(r, score=Score(value=0.7)) for r in sampled(made)]
    batch = made.make_batch(rollouts)
    metrics = made.accumulate(rollouts, batch, made.loss.credit(batch))
    assert metrics["loss"] == 0
    assert all((g == 0).all() for g in gradients(made))
    assert made.loss.credit(batch).metrics["constant_groups"] == 3


@pytest.mark.parametrize("flip", [False, True])
def test_the_sign_of_the_whole_path(flip):
    """Reward = share of even token ids. Ten rounds raise it; with the advantages negated they lower it."""
    made = learner("reinforce(advantage='loo')", torch.float32, learning_rate=3e-3)
    if flip:
        negated = lambda batch, credit: dataclasses.replace(credit, advantage=-credit.advantage)  # noqa: E731
        honest = type(made.loss).credit
        flipped = lambda batch, normalizer=None: negated(batch, honest(made.loss, batch, normalizer))  # noqa: E731
        object.__setattr__(made.loss, "credit", flipped)

    def reward(rollouts):
        return [sum(i % 2 == 0 for i in r.completion_ids) / len(r.completion_ids) for r in rollouts]

    means = []
    for step in range(10):
        rollouts = sample(made.policy, tiny.prompts(), 16, made.recipe.sampling, seed=0, step=step)
        values = reward(rollouts)
        means.append(sum(values) / len(values))
        scored = [dataclasses.replace(r, score=Score(value=v)) for r, v in zip(rollouts, values, strict=True)]
        tiny.update(made, scored, step)
    assert (means[-1] < means[0] - 0.1) if flip else (means[-1] > means[0] + 0.1)


# -- several updates, dropped rollouts, bad gradients -----------------------------------------------------------------


def test_each_part_of_a_round_is_normalized_by_itself_and_seen_once_an_epoch(monkeypatch):
    made = learner("dapo(group_filter='none')", torch.float32, updates_per_step=3, epochs=2)
    rollouts = sampled(made)
    batch = made.make_batch(rollouts)
    parts = list(rows_of_updates(batch, made.recipe, 0))
    assert len(parts) == 6
    assert sorted(torch.cat(parts[:3]).tolist()) == sorted(torch.cat(parts[3:]).tolist()) == list(range(12))
    for rows in parts:
        assert len(set(batch.group[rows].tolist())) == 1  # whole groups
        weights = made.loss.token_weights(batch.rows(rows))
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *of: norms.append(clip(*of)) or norms[-1])
    update, _ = tiny.update(made, rollouts)
    assert made.policy.version == 6
    assert update.metrics["ratio"] != 1
    assert update.metrics["grad_norm"] == pytest.approx(float(sum(norms)) / 6)


def test_a_rollout_without_a_score_leaves_no_trace():
    """Its group's statistics, the gradient and the normalizer are those of a round that never had it."""
    spec = "grpo"
    with_hole, without = learner(spec), learner(spec)
    rollouts = scored(tiny.rollouts(measure=MEASURE))
    hole = list(rollouts)
    hole[4] = dataclasses.replace(hole[4], score=Score(error="raised: boom"))
    _, first = tiny.update(with_hole, hole)
    _, second = tiny.update(without, rollouts[:4] + rollouts[5:])
    advantages = [r.advantage for r in first]
    assert advantages.pop(4) is None and advantages == [r.advantage for r in second]
    assert with_hole.policy.checksum() == without.policy.checksum()
    with pytest.raises(RunError, match="none of 1 completions has a score"):
        tiny.update(with_hole, [hole[4]], 1)


def test_a_gradient_that_is_not_finite_moves_nothing_and_three_stop_the_run():
    made = learner("reinforce", torch.float32)
    rollouts = sampled(made)
    before = made.policy.checksum()
    hook = made.policy.parameters()[0].register_hook(lambda g: g * float("nan"))
    for _ in range(2):
        assert tiny.update(made, rollouts)[0].skipped == 1
    assert made.policy.checksum() == before and made.policy.version == 0
    with pytest.raises(RunError, match="not finite three times"):
        tiny.update(made, rollouts)
    hook.remove()


def test_a_critic_that_nothing_trains_is_refused():
    with pytest.raises(RunError, match="value_coef"):
        learner("ppo(value_coef=0.0)")


def test_the_adaptive_coefficient_moves_towards_its_target():
    made = learner("grpo(beta=0.1, kl_control='adaptive', kl_control_target=0.01, kl_horizon=100.0)", torch.float32)
    rollouts = sampled(made)
    moved(made, 0.05)
    tiny.update(made, rollouts)
    assert made.loss.kl.beta == pytest.approx(0.1 * (1 + 0.2 * 12 / 100))


def test_micro_batches_keep_to_the_budget_and_hold_every_row_once():
    made = learner("grpo", micro_batch_tokens=30)
    rollouts = tiny.rollouts(measure=MEASURE)
    batches = list(made.micro_batches(rollouts))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(rollouts)))
    for rows in batches:
        prompts = {rollouts[i].prompt.id: len(rollouts[i].prompt_ids) for i in rows}
        used = sum(prompts.values()) + sum(len(rollouts[i].completion_ids) for i in rows)
        assert used <= 1.25 * 30 or len(rows) == 1


def test_junk_in_masked_slots_of_a_real_batch_changes_no_gradient():
    """What pads the stored log-probabilities is invisible all the way to the model's parameters."""
    for junk, field in itertools.product((float("nan"), float("inf"), 1e30, -200.0), ("old_logp", "ref_logp")):
        results = []
        for poison in (False, True):
            made = learner("grpo", epochs=2)
            rollouts = scored(tiny.rollouts(measure=MEASURE))
            batch = made.make_batch(rollouts)
            if poison:
                value = torch.where(batch.valid, getattr(batch, field), junk)
                batch = batch.replace(**{field: value})
            made.accumulate(rollouts, batch, made.loss.credit(batch))
            results.append(gradients(made))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_the_measure_of_stored_log_probs_is_checked():
    """Rollouts sampled at another temperature than the learner measures at are refused."""
    made = learner("grpo", torch.float32)
    rollouts = sampled(made)
    other = dataclasses.replace(rollouts[0].behavior_logp.distribution, temperature=0.3)
    wrong = dataclasses.replace(rollouts[0], behavior_logp=LogProbs(rollouts[0].behavior_logp.values, other))
    with pytest.raises(PolicyError, match="different distributions and cannot be subtracted"):
        made.make_batch([wrong, *rollouts[1:]])
