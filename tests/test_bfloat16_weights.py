"""weights = "bfloat16": half the memory, and steps that are smaller than the type's last bit are not lost."""

import json
import math

import pytest
import torch

import lossmith as ls
import tiny
from lossmith.durable.checkpoint import optimizer_state, restore_optimizer
from lossmith.errors import PolicyError, RecipeError, RunError
from lossmith.optimization import clip_gradients, make_optimizer, optimizer_step
from lossmith.policy import SamplingSettings, load_policy, sample, token_outputs
from lossmith.training import Learner, Recipe
from lossmith.training.checkpoint import load_checkpoint, save_checkpoint
from lossmith.training.memory import estimate_memory
from lossmith.training.prepare import plan
from lossmith.training.sharing import check_ranks

optimi = pytest.importorskip("optimi", reason="pip install lossmith[bfloat16]")


def narrow(**options):
    return load_policy(tiny.folder(), device="cpu", weights="bfloat16", **options)


# -- small steps -------------------------------------------------------------------------------------------------------


def walked(make, dtype, steps=200):
    """(how far 4096 weights of a usual size went with what is carried along, how far they are seen to, the start)."""
    draw = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(4096, generator=draw)).bfloat16().float()
    slope = torch.randn(4096, generator=draw)
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = make(p)
    for _ in range(steps):
        p.grad = (slope + torch.randn(4096, generator=draw)).to(dtype)
        optimizer.step()
    carried = optimizer.state[p].get("kahan_comp")
    seen = p.detach().float() - start
    return seen + (0 if carried is None else carried.float()), seen, start


def test_200_steps_of_1e_6_move_weights_as_in_float32_and_would_not_in_plain_bfloat16():
    """Bounds: 2% of the way with what is carried along (1.3% seen), a weight's last bit, or half of it, without."""
    recipe = Recipe.make(learning_rate=1e-6, weights="bfloat16")
    plain = dict(lr=1e-6, betas=(0.9, 0.99), weight_decay=0)
    exact, _, start = walked(lambda p: torch.optim.AdamW([p], **plain), torch.float32)
    found, seen, _ = walked(lambda p: make_optimizer([([p], 1e-6)], recipe), torch.bfloat16)
    lost, _, _ = walked(lambda p: torch.optim.AdamW([p], **plain), torch.bfloat16)
    length = float(exact.norm())
    assert float(exact.abs().mean()) > 5e-5  # they went somewhere
    assert float((found - exact).norm()) < 0.02 * length
    last_bit = torch.exp2(torch.maximum(start.abs(), (start + exact).abs()).log2().floor() - 7)
    assert float(((seen - exact).abs() / (last_bit + 1e-5)).max()) < 0.6
    assert float((lost - exact).norm()) > 0.95 * length


def test_a_checkpoint_of_the_optimizer_holds_what_is_carried_along():
    torch.manual_seed(0)
    recipe = Recipe.make(learning_rate=1e-5, weights="bfloat16")
    both = [0.02 * torch.randn(8, 8), torch.randn(8)]
    ways = []
    for stop in (False, True):
        mine = [torch.nn.Parameter(x.to(d)) for x, d in zip(both, (torch.bfloat16, torch.float32), strict=True)]
        optimizer = make_optimizer([(mine, 1e-5)], recipe)
        for step in range(6):
            if stop and step == 3:
                tensors, numbers = optimizer_state(optimizer)
                assert {"0.kahan_comp", "0.exp_avg", "1.exp_avg_sq"} <= tensors.keys()
                tensors, numbers = {k: x.clone() for k, x in tensors.items()}, json.loads(json.dumps(numbers))
                optimizer = make_optimizer([(mine, 1e-5)], recipe)
                restore_optimizer(optimizer, tensors, numbers)
            for p in mine:
                p.grad = torch.full_like(p, 0.1 + step)
            optimizer_step(optimizer, recipe, step, 6)
        ways.append([*mine, optimizer.state[mine[0]]["kahan_comp"]])
    assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))
    assert float(ways[0][2].abs().max()) > 0


def test_the_length_of_gradients_in_bfloat16_is_that_of_their_numbers():
    p = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.37)
    recipe = Recipe.make(weights="bfloat16", max_grad_norm=1e9)
    expected = float(p.grad[0]) * math.sqrt(1000)  # 11.73; in bfloat16 it would be 11.75
    assert clip_gradients(make_optimizer([([p], 1e-6)], recipe), recipe) == pytest.approx(expected, rel=1e-6)


# -- the policy --------------------------------------------------------------------------------------------------------


def test_matrices_are_held_in_bfloat16_and_vectors_and_a_float32_head_are_not():
    policy = narrow()
    assert policy.compute_dtype == torch.bfloat16
    for name, p in policy.model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() > 1 else torch.float32), name
    head = policy.model.get_output_embeddings().weight
    assert head is policy.model.get_input_embeddings().weight and head.dtype == torch.bfloat16
    assert narrow(float32_head=True).model.get_output_embeddings().weight.dtype == torch.float32
    with pytest.raises(PolicyError, match="multiplied in bfloat16"):
        narrow(dtype="float32")


@pytest.mark.parametrize("float32_head", [False, True])
def test_its_log_probabilities_are_near_those_of_float32_and_the_learners_are_the_samplers(float32_head):
    policy = narrow(float32_head=float32_head)
    rollouts = sample(policy, tiny.prompts(), 4, SamplingSettings(max_tokens=8), seed=0, step=0)
    out = token_outputs(policy, rollouts, SamplingSettings(max_tokens=8))
    exact = token_outputs(tiny.loaded(), rollouts, SamplingSettings(max_tokens=8))
    assert out.logp.dtype == torch.float32
    gap = (out.logp - exact.logp).detach().abs()[out.mask]
    assert 0 < float(gap.mean()) < 0.05
    drawn = torch.cat([r.behavior_logp.values for r in rollouts])
    assert float((out.logp.detach()[out.mask] - drawn).abs().mean()) < 0.05


def test_the_estimate_of_memory_follows():
    """Ten bytes a weight (itself, gradient, two averages, what is carried along) in the place of sixteen."""
    policies = [tiny.loaded(), narrow()]
    policies[0].compute_dtype = torch.bfloat16
    recipe = Recipe.make(loss="grpo(beta=0)")
    wide, half = (estimate_memory(p, recipe, None).fixed for p in policies)
    matrices = sum(p.numel() for p in policies[0].parameters() if p.dim() > 1)
    assert wide - half == pytest.approx(6 * matrices)


# -- a run -------------------------------------------------------------------------------------------------------------


def letters(completions):
    return [sum(ord(c) % 2 == 0 for c in text) / 10 for text in completions]


def settings(folder, **changes):
    return dict(
        model=str(tiny.folder()), device="cpu", weights="bfloat16", scorer=letters, held_out=2, steps=4, max_tokens=6,
        prompts=[f"Prompt {i}?" for i in range(8)], prompts_per_step=3, samples_per_prompt=3, checkpoint_every=1,
        runs=str(folder), learning_rate=1e-4, loss="grpo(beta=0.05)", quiet=True,
    ) | changes  # fmt: skip


def test_a_run_learns_and_a_resumed_one_ends_equal_to_the_bit(tmp_path):
    straight = ls.train(**settings(tmp_path, name="straight"))
    own = settings(tmp_path, name="stopped")
    own.pop("quiet")
    stopped = ls.open_run(plan(Recipe.make(**own)))
    for step in ls.learn(stopped):
        if step.index == 1:
            break
    resumed = ls.resume(stopped.folder.path, scorer=letters)
    assert straight.policy.checksum() == resumed.policy.checksum()
    first = [json.loads(line) for line in (straight.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["weight_step"] > 0 for r in first] == [True] * 4 and first[0]["reference_moved"] == 0
    assert first[0]["kl"] == 0 < first[-1]["kl"]
    saved = load_policy(straight.folder.path / "policy", device="cpu", weights="bfloat16")
    assert saved.checksum() == straight.policy.checksum()


@pytest.mark.parametrize("loss", ["online_dpo(beta=0.1)", "ppo"])
def test_losses_that_see_all_rows_at_once_and_critics_train_too(tmp_path, loss):
    run = ls.train(**settings(tmp_path, loss=loss, steps=1))
    assert run.learner.policy.value_head is None or run.learner.policy.value_head.weight.dtype == torch.float32
    assert run.summary["steps"] == 1


def test_what_is_missing_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs torch-optimi.*pip install lossmith\[bfloat16\]"):
        plan(Recipe.make(weights="bfloat16", model="no such model"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dtype": "float32"}, "multiplied in bfloat16"),
        ({"lora_rank": 4}, "here a LoRA adapter is"),
        ({"shard": True}, "norms stay in float32"),
        ({"engine": "trl"}, "an optimizer of its own"),
        ({"weight_decay": 0.1}, "rounded away"),
        ({"weights": "float16"}, "one of float32, bfloat16"),
    ],
)
def test_what_it_does_not_go_with_is_refused(more, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.make(**{"weights": "bfloat16"} | more)


def test_several_ranks_are_refused():
    class Two:
        size = 2

    with pytest.raises(RecipeError, match="of one process, and this run has 2 ranks"):
        check_ranks(Recipe.make(weights="bfloat16"), Two(), False)


def test_a_checkpoint_of_the_other_type_is_not_gone_on_with(tmp_path):
    made = [Learner(p, (r := Recipe.make(loss="grpo(beta=0)")).policy_loss(), r) for p in (tiny.loaded(), narrow())]
    saved = save_checkpoint(tmp_path, made[0], 1)
    with pytest.raises(RunError, match="of another type than this recipe's: put the setting weights back"):
        load_checkpoint(saved, made[1])
