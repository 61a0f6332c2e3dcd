"""Talking to a policy, or to two of them with the same words: before and after a run, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from lossmith.errors import PolicyError
from lossmith.files import at_home
from lossmith.policy import Policy, SamplingSettings, load_policy
from lossmith.prompts import Prompt
from lossmith.training.recipe import Recipe

__all__ = ["Side", "open_sides"]


@dataclass
class Side:
    """One policy in a conversation, with what was said so far."""

    name: str
    policy: Policy
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(
        self, text: str, settings: SamplingSettings, *, seed: int = 0, on_text: Callable[[str], None] = lambda _: None
    ) -> str:
        """The answer to this message after all before; `on_text` is given the answer so far as it grows.

        PolicyError: the conversation no longer fits the model's context, or its chat template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.policy.encode(Prompt(tuple(asked)))
        if len(ids) + settings.max_tokens > self.policy.context_length:
            raise PolicyError(
                f"{self.name}: {len(ids)} tokens of conversation and {settings.max_tokens} of answer do not fit the "
                f"{self.policy.context_length} tokens of its context. Begin a new one."
            )
        heard = _Heard(self.policy, ids, on_text)
        drawn: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
            drawn["top_k"] = settings.top_k
        given = torch.tensor([ids], device=self.policy.device)
        with torch.random.fork_rng(), torch.no_grad(), self.policy.computing():
            torch.manual_seed(seed)
            self.policy.model.generate(
                given, attention_mask=torch.ones_like(given), streamer=heard, max_new_tokens=settings.max_tokens,
                eos_token_id=sorted(self.policy.eos_ids), pad_token_id=min(self.policy.eos_ids), **drawn,
            )  # fmt: skip
        self.messages = [*asked, {"role": "assistant", "content": heard.text}]
        return heard.text


class _Heard(BaseStreamer):
    """Told each token as it is drawn, the prompt's first."""

    def __init__(self, policy: Policy, prompt: Sequence[int], on_text: Callable[[str], None]) -> None:
        self.policy, self.prompt, self.on_text = policy, prompt, on_text
        self.ids: list[int] | None = None
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.policy.decode(self.ids, self.prompt)
        if not text.endswith("\ufffd"):  # half of a character: the rest comes with the next token
            self.text = text
            self.on_text(text)

    def end(self) -> None:
        self.text = self.policy.decode(self.ids or [], self.prompt)
        self.on_text(self.text)


def open_sides(places: Sequence[str], *, device: str = "auto", dtype: str = "auto") -> list[Side]:
    """The policies to talk to: folders, hub names or "default"; a run's folder is its model before and after.

    PolicyError: there are more than two, or a run has no policy yet.
    """
    named: list[tuple[str, str]] = []
    quantize: str | None = None
    for place in places or ("default",):
        folder = at_home(place, PolicyError)
        if (folder / "recipe.toml").is_file():
            if not (folder / "policy").is_dir():
                raise PolicyError(f"the run {place!r} has no policy/ yet: it is not finished.")
            recipe = Recipe.read(folder / "recipe.toml")
            quantize = recipe.get("quantize")  # both are of the same weights then
            named += [("before", str(recipe["model"])), ("after", str(folder / "policy"))]
        else:
            named.append((Path(place).name or place, place))
    if len(named) > 2:
        raise PolicyError(f"{len(named)} policies at a time are too many to read side by side: name two, or one run.")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        named = [(place, place) for _, place in named]
    more: Any = {"device": device, "dtype": dtype, "quantize": quantize, "trainable": False}
    return [Side(name, load_policy(place, **more)) for name, place in named]
