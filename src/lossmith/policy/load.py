"""The policy: a causal language model of transformers, its tokenizer, and how it computes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import PolicyError, nearest
from lossmith.policy.activation_checkpointing import model_layers
from lossmith.policy.adapter import Adapter
from lossmith.policy.distribution import accumulation_dtype
from lossmith.policy.saving import Gather, save_in_files
from lossmith.policy.text import SpecialTokens, answer_text, prompt_ids
from lossmith.prompts import Prompt

__all__ = ["Policy", "find_device", "find_dtype"]

# Chat templates close a turn with one of these, which a base model's configuration does not always list.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>")
_POSITIONS = re.compile(r"(^|\.)(wpe|pos\w*_emb\w*|embed_positions|positions?_embed\w*)$")


@dataclass(eq=False)
class Policy:
    """A model with its tokenizer. Master weights are float32, or bfloat16 where asked for; `compute_dtype` is what
    matrix products run in, those of the head apart where `float32_head` says so.

    `version` counts the optimizer steps taken. The model stays in eval mode: dropout would make the ratio differ from
    1 without any update. No pad token is needed anywhere.
    """

    model: Any  # a transformers causal language model
    tokenizer: Any
    compute_dtype: torch.dtype
    version: int = 0
    value_head: nn.Linear | None = None
    _encoded: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    special_tokens: SpecialTokens = "answer"  # which of them a completion's text shows
    shares: bool | None = None  # whether completions may share their prompt; None until it was tested
    lean: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] | None = field(default=None, repr=False)  # see lean.py
    adapter: Adapter | None = None  # what learns in the place of the weights
    float32_head: bool = False  # logits without rounding: sampler and learner then agree better in bfloat16
    gather: Gather | None = None  # of its state, where ranks hold it in parts

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a completion: the generation configuration's, the model's, tokenizer's, template's."""
        end_ids: set[int] = set()
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            each = [] if ids is None else ids if isinstance(ids, (list, tuple)) else [ids]
            if not all(type(i) is int for i in each):
                where = type(owner).__name__.removesuffix("Fast")
                raise PolicyError(f"eos_token_id of the model is {ids!r} ({where}), and must be a token's number.")
            end_ids |= set(each)
        known = self.tokenizer.chat_template or ""
        added = self.tokenizer.get_added_vocab()
        for template in known.values() if isinstance(known, dict) else [known]:
            end_ids |= {added[mark] for mark in _TURN_ENDS if mark in added and mark in template}
        return frozenset(end_ids)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion together: what the configuration says, and what tables of positions hold.

        Rotary frequencies that change for the whole text once it has some length ("longrope") end the context there:
        what was cached before would be of other frequencies.
        """
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_target_positions")
        configured = [getattr(config, name, None) for name in names]
        limits = [n for n in configured if type(n) is int and n > 0][:1]
        for name, module in self.model.base_model.named_modules():
            if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
                limits.append(module.num_embeddings)
        rope = getattr(config, "rope_parameters", None) or {}
        for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):
            if part.get("rope_type") == "longrope" and part.get("original_max_position_embeddings"):
                limits.append(int(part["original_max_position_embeddings"]))
        return min(limits, default=1 << 30)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: the chat template applied once, special tokens never doubled. Kept for the next time.

        PolicyError: the template refuses the prompt, or its ids are none, or not the model's.
        """
        if prompt.id not in self._encoded:
            ids = prompt_ids(self.tokenizer, prompt, self.eos_ids)
            if not ids:
                raise PolicyError(f"{prompt.source}: the tokenizer makes no token of the prompt {prompt.content!r}.")
            known = self.model.get_input_embeddings().weight.shape[0]
            if max(ids) >= known:
                raise PolicyError(
                    f"{prompt.source}: the tokenizer makes the id {max(ids)}, but the model knows ids below {known}: "
                    "the tokenizer in the model's folder belongs to another model."
                )
            self._encoded[prompt.id] = tuple(ids)
        return self._encoded[prompt.id]

    def decode(self, ids: Sequence[int], after: Sequence[int] = (), special_tokens: SpecialTokens | None = None) -> str:
        """Text of a completion's ids after those of its prompt: a view for people and scorers, never trained on.

        special_tokens: "answer" shows those that are part of the answer, "all" every one, "none" none; the policy's
        own choice if not given.
        """
        return answer_text(self.tokenizer, ids, after, self._hidden(special_tokens or self.special_tokens))

    def _hidden(self, special_tokens: SpecialTokens) -> frozenset[int]:
        if special_tokens == "all":
            return frozenset()
        added = self.tokenizer.added_tokens_decoder
        if special_tokens == "none":
            return frozenset(i for i, token in added.items() if token.special)
        around = {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id} | self.eos_ids
        return frozenset(i for i in added if i in around)

    def use_template(self, name: str) -> None:
        """Take one of the model's named chat templates, from now on and in what `save` writes. PolicyError: no such."""
        known = self.tokenizer.chat_template
        names = sorted(known) if isinstance(known, dict) else []
        if name not in names:
            has = f"has {', '.join(names)}" if names else "has no named chat templates"
            raise PolicyError(f"chat_template = {name!r}: the model {has}.")
        self.tokenizer.chat_template = known[name]
        self._encoded.clear()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Matrix products in compute_dtype, where it has fewer bits than the weights; the adapter as it is meant."""
        narrow = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)
        with narrow, self.adapter.used() if self.adapter else contextlib.nullcontext():
            yield

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of the model (the value head apart)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def add_value_head(self) -> None:
        """A critic: a linear layer on the last hidden states, detached so that it does not disturb the policy."""
        hidden = self.model.get_output_embeddings().weight.shape[1]
        head = nn.Linear(hidden, 1, device=self.device, dtype=accumulation_dtype(next(self.model.parameters()).dtype))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.value_head = head

    def frozen(self, *, narrow: bool = False) -> Policy:
        """What the policy is now, and stays: the reference policy. A copy, or the same weights beside an adapter.

        narrow: where it computes in bfloat16, keep the weights of its layers' products in that, as autocast would round
        them for each product: the same numbers from less memory.
        """
        adapter = None if self.adapter is None else self.adapter.frozen()
        model = copy.deepcopy(self.model).requires_grad_(False).eval() if adapter is None else self.model
        if narrow and model is not self.model and self.compute_dtype == torch.bfloat16:
            linear = (m for layer in model_layers(model) for m in layer.modules() if type(m) is nn.Linear)
            for module in linear:
                module.weight.data = module.weight.data.to(torch.bfloat16)
        return Policy(
            model,
            self.tokenizer,
            self.compute_dtype,
            self.version,
            shares=self.shares,
            adapter=adapter,
            float32_head=self.float32_head,
        )

    def checksum(self, at_hand: Mapping[str, Tensor] | None = None) -> str:
        """sha256 over names and bytes of all weights.

        at_hand: {name of a parameter: all of it}, for those that have been read (or gathered) already; they are not
        read again. What is not among them must be held whole.
        """
        digest = hashlib.sha256()

        def take(name: str, tensor: Any) -> None:
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().flatten()  # a number alone has no bytes to be seen as
            digest.update(memoryview(flat.view(torch.uint8).numpy()))

        if self.gather is not None and at_hand is None:
            self.gather(take)
            return digest.hexdigest()
        read = {id(p): at_hand[name] for name, p in self.model.named_parameters() if at_hand and name in at_hand}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            take(name, read.get(id(tensor), tensor))
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder: safetensors of the weights as they are, configuration, tokenizer with chat template.

        Of a policy with an adapter, that alone, as peft writes it.
        """
        from transformers import GenerationConfig

        if self.adapter is not None:
            self.adapter.save(folder)
            self.tokenizer.save_pretrained(folder)
            return

        generation = self.model.generation_config
        try:
            generation.validate(strict=True)
        except ValueError:  # as published, and save_pretrained would refuse it: keep what says where text ends
            ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            self.model.generation_config = GenerationConfig(**ids)
        if self.gather is None:
            self.model.save_pretrained(folder)
        else:
            save_in_files(self.model, Path(folder), self.gather)
        self.tokenizer.save_pretrained(folder)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V], float32 or wider, from last hidden states [..., H], as the model itself makes them."""
        if self.float32_head:
            with torch.autocast(self.device.type, enabled=False):
                logits = self.model.get_output_embeddings()(hidden.float())
        else:
            logits = self.model.get_output_embeddings()(hidden)
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        config = self.model.config.get_text_config()
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return logits if not cap else cap * torch.tanh(logits / cap)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PolicyError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32: recent GPUs, CPUs with an instruction for it."""
    if name != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if name not in known:
            raise PolicyError(f"dtype is {name!r}.{nearest(name, [*known, 'auto'])}")
        return known[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32
