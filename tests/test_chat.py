"""Talking to policies: against transformers' own generation, and as a person would by pipe."""

from __future__ import annotations

import io
from unittest import mock

import pytest
import torch

import lossmith as ls
import shell
import tiny
from lossmith.chat import Side, open_sides
from lossmith.prompts import Prompt

GREEDY = ls.SamplingSettings(temperature=0, max_tokens=6)


def by_transformers(policy, messages, max_tokens=6):
    """The greedy answer of `generate` to these messages."""
    ids = policy.encode(Prompt(tuple(messages)))
    given = torch.tensor([ids])
    made = policy.model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=max_tokens,
        eos_token_id=sorted(policy.eos_ids), pad_token_id=256,
    )  # fmt: skip
    return policy.decode(made[0, len(ids) :].tolist(), ids)


def test_a_reply_is_what_the_model_generates_after_all_that_was_said():
    side = Side("tiny", tiny.policy())
    seen: list[str] = []
    first = side.reply("Hello", GREEDY, on_text=seen.append)
    said = [{"role": "user", "content": "Hello"}]
    assert first == by_transformers(side.policy, said) == seen[-1]
    assert all(first.startswith(part) for part in seen)
    second = side.reply("And now?", GREEDY)
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert second == by_transformers(side.policy, said)


def test_the_seed_decides_what_is_sampled_and_nothing_else():
    drawn = ls.SamplingSettings(temperature=1.0, max_tokens=8)
    policy = tiny.policy()
    torch.manual_seed(1)
    first = Side("a", policy).reply("Hi", drawn, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert Side("a", policy).reply("Hi", drawn, seed=3) == first
    assert torch.equal(state, torch.get_rng_state())  # a person's talk draws nothing that others would miss
    assert Side("a", policy).reply("Hi", drawn, seed=4) != first


def test_a_conversation_beyond_the_context_is_refused_and_forgotten():
    side = Side("tiny", tiny.policy())
    with pytest.raises(ls.PolicyError, match="do not fit the 256 tokens of its context"):
        side.reply("x" * 250, GREEDY)
    assert side.messages == []


def test_a_run_is_its_model_before_and_after(tmp_path):
    run = ls.train(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Question {i}?" for i in range(6)],
        held_out=2, scorer="length", steps=1, prompts_per_step=2, samples_per_prompt=4, max_tokens=6,
        runs=str(tmp_path), name="r", quiet=True,
    )  # fmt: skip
    before, after = open_sides([str(run.folder.path)], device="cpu", dtype="float32")
    assert (before.name, after.name) == ("before", "after")
    assert after.policy.checksum() == run.summary["policy_checksum"] != before.policy.checksum()


def test_too_many_and_unfinished_are_refused(tmp_path):
    with pytest.raises(ls.PolicyError, match="3 policies at a time are too many"):
        open_sides(["a", "b", "c"])
    (tmp_path / "recipe.toml").write_text("steps = 1\n")
    with pytest.raises(ls.PolicyError, match="has no policy/ yet"):
        open_sides([str(tmp_path)])


def test_the_command_answers_every_line_of_a_pipe():
    with mock.patch("sys.stdin", io.StringIO("Hello\n/new\nAgain\n\nnever read\n")):
        shown = shell.lossmith("chat", tiny.folder(), "--max-tokens", 4, "--temperature", 0)
    lines = shown.stdout.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> Hello", "> /new", "> Again"]
    assert sum(line.startswith("llama: ") for line in lines) == 2


def test_a_prompt_may_be_given_as_text(tmp_path):
    shown = shell.lossmith(
        "sample", "--prompt", "Why?", "--prompt", "How?", "--n", 2, "--model", tiny.folder(), "--max-tokens", 4
    )
    assert len(shown.stdout.splitlines()) == 2 and '"Why?"' in shown.stdout
    both = shell.lossmith("sample", "questions.jsonl", "--prompt", "Why?", code=2)
    assert "prompts come from a file or as text, not both" in both.stderr
