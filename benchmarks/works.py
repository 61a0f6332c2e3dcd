"""The works that Lossmith and others are timed on: the same prompts, sizes and model for everyone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lossmith.policy import Policy
from lossmith.prompts import Prompt, default_prompts_path, load_prompts

__all__ = ["WORKS", "Work", "described", "prompt_texts"]


@dataclass(frozen=True)
class Work:
    """One round of policy learning: how many prompts of how many tokens, and what is written for each."""

    prompts: int
    samples: int
    max_tokens: int
    prompt_tokens: tuple[int, ...]  # with the chat template; repeated over the prompts
    beta: float = 0.0  # of the KL term: above 0 there is a reference model
    trl_batch: int = 64  # completions in TRL's forward pass: the fastest that fits into 24 GB beside Lossmith


WORKS = {
    "short": Work(8, 8, 64, (40,)),
    "short-reference": Work(8, 8, 64, (40,), beta=0.04, trl_batch=32),
    "long": Work(8, 8, 64, (290,), trl_batch=16),
    "big-groups": Work(2, 32, 64, (40,)),
    "ragged": Work(8, 8, 64, (40, 90, 150, 220), trl_batch=16),
}


def prompt_texts(policy: Policy, work: Work) -> list[str]:
    """User messages whose prompts have about the asked number of tokens: a default prompt after text of others."""
    own = [p.text for p in load_prompts(default_prompts_path())]
    filler = " ".join(own)
    texts = []
    for i in range(work.prompts):
        room = work.prompt_tokens[i % len(work.prompt_tokens)] - len(policy.encode(Prompt(own[i])))
        ids = policy.tokenizer(filler[i * 500 :], add_special_tokens=False)["input_ids"][: max(room, 0)]
        texts.append(policy.tokenizer.decode(ids) + "\n" * (room > 0) + own[i])
    return texts


def described(policy: Policy, work: Work, model: str, threads: int) -> dict[str, object]:
    """The work as the workers read it."""
    texts = prompt_texts(policy, work)
    more = {"prompts_count": work.prompts, "prompts": texts, "model": model, "threads": threads}
    return {**asdict(work), **more, "dtype": str(policy.compute_dtype).removeprefix("torch.")}  # as suits this machine
