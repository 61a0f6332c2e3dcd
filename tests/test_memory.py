"""Memory: estimated from the longest prompt, refused where there is less, and layers run again where that suffices."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from lossmith.errors import RecipeError
from lossmith.report.run.opening import memory_estimate
from lossmith.training import Learner, Recipe
from lossmith.training.memory import MemoryEstimate, check_memory, estimate_memory
from lossmith.training.prepare import open_run, plan


def test_a_long_prompt_counts_in_the_estimate_of_memory():
    """8 prompts of 100,000 tokens on a model of 2 layers: once said to be 1.3 GB, and killed at 20.9."""
    policy = tiny.policy(tiny.llama(max_position_embeddings=1 << 18))
    recipe = Recipe.make(prompts_per_step=8, samples_per_prompt=4, max_tokens=16)
    needs = [estimate_memory(policy, recipe, policy, longest=longest) for longest in (10, 1000, 100_000)]
    assert needs[0].sampling < needs[1].sampling < needs[2].sampling
    row = 100_000 + 16  # keys and values of every prompt, and a backward pass over one of them
    assert needs[2].sampling > 8 * 100_000 * 2 * 2 * 16 * 4
    assert needs[2].activations > row * 2 * 32 * 4 * 10 > needs[1].activations
    plain = tiny.policy(tiny.llama(max_position_embeddings=1 << 18))
    plain.shares = False  # a copy of its prompt for each completion
    assert estimate_memory(plain, recipe, plain, longest=100_000).sampling > 2 * needs[2].sampling


def test_a_run_that_takes_more_memory_than_there_is_is_refused():
    need = MemoryEstimate(fixed=1e9, sampling=30e9, activations=2e9, recomputed=1e9, budget=8e9, longest=100_019)
    said = r"about 31\.0 GB .* 8\.0 GB are free.*p\.txt:3\) has 100,019 tokens.*memory_gb = 31"
    with pytest.raises(RecipeError, match=said):
        check_memory(need, False, Recipe.make(), "p.txt:3")
    check_memory(need, False, Recipe.make(memory_gb=31), "p.txt:3")  # the user knows better
    check_memory(dataclasses.replace(need, budget=40e9), False, Recipe.make(), "p.txt:3")
    check_memory(dataclasses.replace(need, budget=None), False, Recipe.make(), "p.txt:3")  # nobody knows


@pytest.mark.parametrize(("memory_gb", "again"), [(1000.0, False), (0.001, True)])
def test_a_memory_budget_decides_whether_layers_are_run_again(memory_gb, again):
    recipe = Recipe.make(memory_gb=memory_gb)
    learner = Learner(tiny.policy(), recipe.policy_loss(), recipe)
    assert learner.recompute is again
    text = memory_estimate(learner)
    assert ("activation checkpointing" in text) is again and ("more than there is" in text) is again


def test_models_that_are_loaded_already_count_as_room_for_them(monkeypatch):
    policy, recipe = tiny.policy(), Recipe.make()
    weights = 4 * sum(p.numel() for p in policy.model.parameters())
    monkeypatch.setattr("lossmith.training.memory.available_bytes", lambda: 1_000)
    assert estimate_memory(policy, recipe, policy).budget == 1_000 + weights
    assert estimate_memory(policy, recipe, policy.frozen()).budget == 1_000 + 2 * weights
    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (5_000, 80_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 70_000)
    assert estimate_memory(policy, recipe, policy.frozen()).budget == 75_000


def recipe_of(folder, tokens, **changes):
    """A run on prompts of so many tokens, byte by byte."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "initializer_range": 0.05}
    tiny.llama(max_position_embeddings=1 << 18, **sizes).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    lines = [f"{i} " + "a" * (tokens - 25) for i in range(6)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    settings = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 16, "held_out": 2}
    places = {"model": str(folder / "model"), "prompts": str(folder / "prompts.txt"), "runs": str(folder / "runs")}
    return Recipe.make(scorer="length", device="cpu", dtype="float32", **settings | places | changes)


def test_the_refusal_comes_before_the_first_sample_and_names_the_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("lossmith.training.memory.available_bytes", lambda: 1_000_000)
    with pytest.raises(RecipeError, match=r"this run needs about .* GB .*prompts\.txt:\d\) has 29\d tokens"):
        open_run(plan(recipe_of(tmp_path, 300)))
    run = open_run(plan(recipe_of(tmp_path, 300, memory_gb=50.0)))
    assert "longest prompt: 29" in memory_estimate(run.learner)


MEASURE = """
import resource, sys
from pathlib import Path
from test_memory import recipe_of
from lossmith.training.loop import learn
from lossmith.training.prepare import open_run, plan
run = open_run(plan(recipe_of(Path(sys.argv[1]), int(sys.argv[2]))))
estimate = run.learner.memory.total(run.learner.recompute)
list(learn(run))
print(estimate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux alone")
def test_the_estimate_is_within_a_factor_of_two_of_what_is_taken(tmp_path):
    where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    shown = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), "4000"], **where).stdout
    estimate, taken = map(float, shown.split()[-2:])
    assert taken / 2 < estimate < 2 * taken
