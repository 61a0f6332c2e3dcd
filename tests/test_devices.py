"""The same on any device: here, on a GPU that is none (`pretended.py`), and with `-m gpu` on a real one.

The pretended GPU refuses and counts as a real one does, and computes on the processor: it finds what is on the wrong
device and what is waited for, not what a GPU's kernels would do otherwise.
"""

import dataclasses

import pytest
import torch

import tiny
from devices import REAL, entered, placed, waits
from lossmith.errors import LossError
from lossmith.losses import Batch, get_loss
from lossmith.policy import SamplingSettings, sample, token_outputs
from lossmith.policy import head as head_module
from lossmith.policy.attention import PrefixTree, TreeAttention
from lossmith.policy.head import chosen_log_probs
from lossmith.rollouts import Distribution, Score
from lossmith.training import Learner, Recipe

PLAIN = SamplingSettings()
SHORT = SamplingSettings(max_tokens=5)


@pytest.fixture(params=["cpu", "pretended", REAL])
def device(request):
    with entered(request.param) as found:
        yield found


@pytest.fixture(params=["pretended", REAL])
def accelerator(request):
    with entered(request.param) as found:
        yield request.param, found


# -- the policy --------------------------------------------------------------------------------------------------------


def plain_forward(policy, rollout):
    """One row through the model as transformers has it: no padding, no cache."""
    ids, start = torch.tensor([rollout.prompt_ids + rollout.completion_ids]), len(rollout.prompt_ids)
    logps = policy.model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logps[start + t - 1, token] for t, token in enumerate(rollout.completion_ids)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["shared", "right"])
def test_log_probabilities_and_gradients_are_those_of_a_plain_forward_pass_on_the_processor(device, kind, layout):
    rollouts = tiny.rollouts(prompt_count=2, samples=2)
    here, there = tiny.policy(getattr(tiny, kind)(), torch.float64), tiny.policy(getattr(tiny, kind)(), torch.float64)
    expected = [plain_forward(here, r) for r in rollouts]
    torch.cat(expected).square().sum().backward()
    there.shares = True
    out = token_outputs(placed(there, device), rollouts, PLAIN, layout=layout, chunk=4, activation_checkpointing=True)
    assert out.logp.device == device
    out.logp.square().sum().backward()
    torch.testing.assert_close(out.logp.detach().cpu()[out.mask.cpu()], torch.cat(expected), rtol=0, atol=1e-10)
    for (name, a), b in zip(here.model.named_parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=0, atol=1e-9, msg=name)


def test_the_way_that_fits_the_model_is_found(device):
    policy = placed(tiny.policy(), device)
    drawn = sample(policy, tiny.prompts("Why?"), 2, SHORT, seed=0, step=0)
    assert policy.shares and len(drawn) == 2


@pytest.mark.parametrize("stored", [0, 1 << 30])
def test_the_head_in_chunks_is_the_whole_softmax(device, stored, monkeypatch):
    monkeypatch.setattr(head_module, "STORED_BYTES", stored)
    policy = tiny.policy(dtype=torch.float64)
    weight = policy.model.get_output_embeddings().weight.detach().clone().requires_grad_()
    torch.manual_seed(0)
    hidden, push = (torch.randn(*shape, dtype=torch.float64) for shape in ((40, weight.shape[1]), (40,)))
    ids = torch.randint(0, 264, (40,))
    theirs = torch.log_softmax(hidden.requires_grad_() @ weight.T / 0.6, -1).gather(1, ids[:, None])[:, 0]
    expected = torch.autograd.grad(theirs, (hidden, weight), push)
    placed(policy, device)
    own = policy.model.get_output_embeddings().weight
    moved = hidden.detach().to(device).requires_grad_()
    ours = chosen_log_probs(policy, moved, ids.to(device), SamplingSettings(temperature=0.6), 7)
    found = torch.autograd.grad(ours, (moved, own), push.to(device))
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close([x.cpu() for x in found], list(expected), rtol=0, atol=1e-11)


def test_attention_over_a_tree_is_that_of_the_processor(device):
    groups = [((1,) * 5, [(2,) * 3, (2,) * 6, ()]), ((1,) * 2, [(2,) * 4])]
    torch.manual_seed(0)
    wide = [torch.randn(1, h, 20, 8, dtype=torch.float64) for h in (4, 2, 2)]
    results = []
    for place in (torch.device("cpu"), device):
        tree = PrefixTree.of(groups, place)
        given = [x.to(place).requires_grad_() for x in wide]
        out = TreeAttention(tree).attend(*given, 0.3)
        grads = torch.autograd.grad(out.square().sum(), given)
        results.append([x.detach().cpu() for x in (out, *grads)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9, "temperature": 0.7}])
def test_the_same_keys_draw_the_same_tokens_and_the_learner_measures_what_was_drawn(device, shares, sampling):
    chosen = SamplingSettings(max_tokens=5, **sampling)
    drawn = []
    for place in (torch.device("cpu"), device):
        policy = tiny.policy(dtype=torch.float64)
        policy.shares = shares
        policy.model.generation_config.eos_token_id = list(range(0, 264, 3))  # rows leave at different times
        placed(policy, place)
        drawn.append(sample(policy, tiny.prompts()[:2], 3, chosen, seed=3, step=1, batch_rows=4))
    assert [r.completion_ids for r in drawn[0]] == [r.completion_ids for r in drawn[1]]
    assert [r.finish_reason for r in drawn[0]] == [r.finish_reason for r in drawn[1]]
    out = token_outputs(policy, drawn[1], chosen)
    recorded = torch.cat([r.behavior_logp.values for r in drawn[1]])
    torch.testing.assert_close(out.logp.detach().cpu()[out.mask.cpu()].float(), recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["cpu", REAL])  # the pretended GPU has no autocast
def test_bfloat16_log_probabilities_are_within_their_rounding(kind):
    model, rollouts = tiny.llama(), tiny.rollouts(prompt_count=2)
    exact = token_outputs(tiny.policy(model), rollouts, PLAIN).logp.detach()
    policy = tiny.policy(tiny.llama())
    policy.compute_dtype, policy.shares = torch.bfloat16, True
    with entered(kind) as device:
        narrow = token_outputs(placed(policy, device), rollouts, PLAIN).logp.detach().cpu()
    gap = (narrow - exact).abs()
    assert narrow.dtype == torch.float32
    assert 0 < float(gap.max()) < 0.2 and float(gap.mean()) < 0.03


# -- the loss and the learner ------------------------------------------------------------------------------------------


def scored(rollouts):
    return [dataclasses.replace(r, score=Score(value=float(i % 3))) for i, r in enumerate(rollouts)]


def a_round(loss, device):
    """(gradients of the loss after an update, the weights that it left, its metrics), on the processor."""
    policy = tiny.policy(dtype=torch.float64)
    policy.shares = True
    recipe = Recipe.make(loss=loss, micro_batch_tokens=20, temperature=1.0, max_tokens=9, learning_rate=1e-3)
    learner = Learner(placed(policy, device), recipe.policy_loss(), recipe)
    assert learner.policy.device == device
    rollouts = scored(tiny.rollouts(prompt_count=2, samples=2, measure=Distribution(0, dtype="float64")))
    batch = learner.make_batch(rollouts)
    credit = learner.credit(batch)
    update = learner.update(rollouts, batch, credit, 0)
    learner.accumulate(rollouts, batch, credit)
    trained = [p for group in learner.optimizer.param_groups for p in group["params"]]
    return [p.grad.cpu() for p in trained], [p.detach().cpu() for p in trained], update.metrics


@pytest.mark.parametrize("loss", ["grpo(beta=0.1)", "online_dpo(beta=0.1)", "ppo"])
def test_loss_gradient_and_update_are_those_of_the_processor(accelerator, loss):
    expected, found = a_round(loss, torch.device("cpu")), a_round(loss, accelerator[1])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    assert found[2].keys() == expected[2].keys()
    assert found[2] == pytest.approx(expected[2], rel=1e-8, abs=1e-8)


def fields(device, **changes):
    torch.manual_seed(0)
    logp = -torch.rand(4, 3, dtype=torch.float64) - 0.1
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    given = {
        "logp": logp, "mask": mask, "old_logp": logp - 0.05, "reward": torch.tensor([1.0, 0.0, 2.0, 0.5]),
        "group": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    return {name: x.to(device) for name, x in (given | changes).items()}


def test_a_batch_is_checked_cut_and_changed_where_it_is(device):
    loss = get_loss("grpo", beta=0.0)
    here, there = Batch(**fields("cpu")), Batch(**fields(device))
    credit, expected = loss.credit(there), loss.credit(here)
    rows = torch.tensor([2, 3])
    for index in (rows, rows.to(device)):
        part = loss.objective(there.rows(index), credit.rows(index)).loss
        torch.testing.assert_close(part.cpu(), loss.objective(here.rows(rows), expected.rows(rows)).loss)
    assert loss.objective(there.replace(logp=there.logp - 1), credit).loss.device == device
    assert torch.equal(here.to(device).reward.cpu(), here.reward)
    with pytest.raises(LossError, match="the credit is of other rows than the batch: old_logp differs"):
        loss.objective(there.rows(torch.tensor([3], device=device)), credit.rows(slice(1, 2)))
    bad = torch.tensor([1.0, torch.nan, 2.0, 0.5])
    with pytest.raises(LossError, match=r"Batch.reward is nan at row 1"):
        Batch(**fields(device, reward=bad))


def test_a_batch_on_two_devices_is_refused(accelerator):
    given = fields(accelerator[1])
    given["old_logp"] = given["old_logp"].cpu()
    with pytest.raises(LossError, match=r"Batch.old_logp is on cpu, but mask is on cuda:0. Move it there first"):
        Batch(**given)


# -- what is waited for ------------------------------------------------------------------------------------------------


def test_a_micro_batch_waits_for_the_device_six_times(accelerator):
    """Is the batch finite? Is the credit of its rows? The loss and its terms, its metrics, its distances, the sampler's
    gap: a transfer each. Not for every number, nor for the indices that go there."""
    kind, device = accelerator
    found = {}
    for budget in (30, 1000):
        policy = tiny.policy()
        policy.shares = True
        recipe = Recipe.make(loss="grpo(beta=0)", micro_batch_tokens=budget, temperature=1.0, max_tokens=9)
        learner = Learner(placed(policy, device), recipe.policy_loss(), recipe)
        rollouts = scored(tiny.rollouts(prompt_count=2, samples=4, dtype=torch.float32))
        batch = learner.make_batch(rollouts)
        credit = learner.credit(batch)
        learner.accumulate(rollouts, batch, credit)  # the first fills caches
        passes = len(list(learner.micro_batches(rollouts)))
        with waits(kind) as counted:
            learner.accumulate(rollouts, batch, credit)
        found[passes] = counted
    (few, least), (many, most) = sorted(found.items())
    assert few == 1 < many
    assert 0 < len(most) - len(least) <= 6 * (many - few), most


def test_a_token_waits_for_the_device_three_times_whatever_the_number_of_rows(accelerator):
    """Are the logits finite? The ids, and their log-probabilities."""
    kind, device = accelerator
    policy = placed(tiny.policy(), device)
    policy.shares = True
    found = []
    for tokens in (3, 8):
        chosen = SamplingSettings(max_tokens=tokens)
        sample(policy, tiny.prompts("Why?"), 40, chosen, seed=0, step=0)  # the first fills caches
        with waits(kind) as counted:
            drawn = sample(policy, tiny.prompts("Why?"), 40, chosen, seed=0, step=0)
        assert max(len(r.completion_ids) for r in drawn) == tokens
        found.append(counted)
    assert len(found[1]) - len(found[0]) <= 3 * 5, found[1]
