"""A reward model from any causal language model: its body, and one number read at the last token of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import PolicyError
from lossmith.policy import check_model, check_weights, embedded_model, read_pretrained
from lossmith.policy.load import find_device, find_dtype
from lossmith.reward_model.scored_texts import ScoredTexts
from lossmith.scorers.reward_model import score_rows, separator_of

__all__ = ["Scoring", "load_scoring"]


class Scoring:
    """A sequence classifier with one output, being trained. Weights are float32; `dtype` is what products run in."""

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.separator = separator_of(tokenizer, model)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(min(positions or 1 << 30, self.tokenizer.model_max_length))

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """r(x, y) [N], float32, of ragged token ids, at each row's true last token."""
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return score_rows(self.model, rows, self.separator).float()

    @torch.no_grad()
    def all_scores(self, examples: Sequence[ScoredTexts], budget: int) -> list[Tensor]:
        """Scores of each example's rows, without gradient, `budget` tokens at a time."""
        found: list[Tensor] = []
        for part in token_parts(examples, budget):
            flat = self.scores([row for e in part for row in e.rows]).cpu()
            found += flat.split([len(e.rows) for e in part])
        return found

    def freeze_below(self, layers: int | None) -> int:
        """Train the head, the final norm and the last `layers` layers only (None: all); returns how many numbers."""
        if layers is not None:
            self.model.requires_grad_(False)
            body = self.model.base_model
            stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
            if not stacks or not 0 <= layers <= len(max(stacks, key=len)):
                raise PolicyError(
                    f"train_layers = {layers}, but the model has {len(max(stacks, key=len, default=[]))}."
                )
            blocks = max(stacks, key=len)
            inside = {id(p) for block in blocks for p in block.parameters()}
            embeddings = {id(p) for p in body.get_input_embeddings().parameters()}
            trained = [p for block in list(blocks)[len(blocks) - layers :] for p in block.parameters()]
            rest = [p for p in self.model.parameters() if id(p) not in inside | embeddings]  # norm and head
            for p in trained + rest:
                p.requires_grad_(True)
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """A Hugging Face folder for sequence classification."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def token_parts(examples: Sequence[ScoredTexts], budget: int) -> Iterator[list[ScoredTexts]]:
    """Examples in order, in parts of at most `budget` tokens; an example is never torn apart."""
    part: list[ScoredTexts] = []
    used = 0
    for example in examples:
        cost = sum(len(row) for row in example.rows)
        if part and used + cost > budget:
            yield part
            part, used = [], 0
        part.append(example)
        used += cost
    if part:
        yield part


def load_scoring(model: str, seed: int, *, device: str = "auto", dtype: str = "auto") -> Scoring:
    """The body of a causal language model under a new one-output head, drawn small from `seed`.

    model: "default", a folder, or a hub name. PolicyError: what check_model finds, or a model without such a form.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    check_model(model, PolicyError, "body")
    folder = Path(model).expanduser()
    place = str(embedded_model() if model == "default" else folder if folder.is_dir() else model)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no news
    try:
        tokenizer, network, missing = read_pretrained(
            AutoModelForSequenceClassification, place, model, PolicyError, "body", num_labels=1
        )
    finally:
        logging.set_verbosity(before)
    check_weights(network, model, PolicyError)
    head = [name for name in missing if name.startswith(("score", "classifier"))]
    strange = sorted(set(missing) - set(head))
    if strange:
        raise PolicyError(f"{model!r} lacks weights of its body ({', '.join(strange[:3])}): give a complete model.")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name in head:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 / parameter.shape[-1] ** 0.5)
    network.config.problem_type = None
    where = find_device(device)
    return Scoring(network.to(where).eval(), tokenizer, find_dtype(dtype, where))
