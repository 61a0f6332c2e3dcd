"""The policy: a causal language model of transformers, its tokenizer, and how it computes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import PolicyError, nearest
from lossmith.policy.embedded import embedded_model
from lossmith.policy.memory import keep_freed_memory
from lossmith.prompts import Prompt

__all__ = ["Policy", "check_model", "find_device", "find_dtype", "load_policy"]

# Chat templates close a turn with one of these, which a base model's configuration does not always list.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>")
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(eq=False)
class Policy:
    """A model with its tokenizer. Master weights are float32; `compute_dtype` is what matrix products run in.

    `version` counts the optimiser steps taken. The model stays in eval mode: dropout would make the ratio differ from
    1 without any update. No pad token is needed anywhere.
    """

    model: Any  # a transformers causal language model
    tokenizer: Any
    compute_dtype: torch.dtype
    version: int = 0
    value_head: nn.Linear | None = None
    _encoded: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    shares: bool | None = None  # whether completions may share their prompt; found out when it is first asked

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a completion: the generation configuration's, the model's, tokenizer's, template's."""
        found: set[int] = set()
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found |= set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}
        template = self.tokenizer.chat_template
        if isinstance(template, str):
            added = self.tokenizer.get_added_vocab()
            found |= {added[mark] for mark in _TURN_ENDS if mark in added and mark in template}
        return frozenset(found)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion together."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        return 1 << 30

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: the chat template applied once, special tokens never doubled. Kept for the next time.

        PolicyError: the template refuses the prompt, or its ids are none, or not the model's.
        """
        if prompt.id not in self._encoded:
            self._encoded[prompt.id] = self._ids(prompt)
        return self._encoded[prompt.id]

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if self.tokenizer.chat_template:
            ids = self.tokenizer(self._chat_text(prompt), add_special_tokens=False)["input_ids"]
        elif isinstance(prompt.content, str):
            ids = self.tokenizer(prompt.content)["input_ids"]
        else:
            raise PolicyError(f"{prompt.source}: the prompt holds chat messages, but the model has no chat template.")
        if not ids:
            raise PolicyError(f"{prompt.source}: the tokenizer makes no token of the prompt {prompt.content!r}.")
        known = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= known:
            raise PolicyError(
                f"{prompt.source}: the tokenizer makes the id {max(ids)}, but the model knows ids below {known}: "
                "the tokenizer in the model's folder belongs to another model."
            )
        return tuple(ids)

    def _chat_text(self, prompt: Prompt) -> str:
        from jinja2 import TemplateError

        try:
            messages = [dict(m) for m in prompt.messages]
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise PolicyError(f"{prompt.source}: the model's chat template refuses the prompt: {error}") from None

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        """Text of token ids without special tokens: a view for people and scorers, never encoded again for training."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in compute_dtype, where it is narrower than the weights."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            yield

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of the model (the value head apart)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def add_value_head(self) -> None:
        """A critic: a linear layer on the last hidden states, detached so that it does not disturb the policy."""
        hidden = self.model.get_output_embeddings().weight.shape[1]
        head = nn.Linear(hidden, 1, device=self.device, dtype=next(self.model.parameters()).dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.value_head = head

    def frozen(self) -> Policy:
        """A copy that nothing trains: the reference policy."""
        model = copy.deepcopy(self.model).requires_grad_(False).eval()
        return Policy(model, self.tokenizer, self.compute_dtype, self.version, shares=self.shares)

    def checksum(self) -> str:
        """sha256 over names and bytes of all weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder: float32 safetensors, configuration, tokenizer with its chat template."""
        from transformers import GenerationConfig

        generation = self.model.generation_config
        try:
            generation.validate(strict=True)
        except ValueError:  # as published, and save_pretrained would refuse it: keep what says where text ends
            ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            self.model.generation_config = GenerationConfig(**ids)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V], float32 or wider, from last hidden states [..., H], as the model itself makes them."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        config = self.model.config.get_text_config()
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return logits if not cap else cap * torch.tanh(logits / cap)


def load_policy(
    model: str | Path = "default", *, device: str = "auto", compute_dtype: str = "auto", trainable: bool = True
) -> Policy:
    """Load a policy: "default" (SmolLM2-135M-Instruct), a folder, or a hub name. Remote code is never run.

    PolicyError: what check_model finds, weights that are missing or damaged, or a model that computes in a way that
    is not known here (its logits are not its head applied to its last hidden states, or it keeps a recurrent state).
    """
    check_model(model)
    where = find_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    tokenizer, network = _read(str(model))
    network = network.to(where).eval().requires_grad_(trainable)
    policy = Policy(network, tokenizer, find_dtype(compute_dtype, where))
    _check_head(policy)
    _check_cache(policy)
    return policy


def _read(model: str) -> tuple[Any, Any]:
    """(tokenizer, model in float32) as transformers reads them, refused where a weight would be made up."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for half a second of loading hides what the run itself has to say
    folder = Path(model).expanduser()
    place = str(embedded_model() if model == "default" else folder if folder.exists() else model)
    try:
        # False, not absent: transformers would ask on the terminal whether to run a model's own code
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        found: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PolicyError(f"cannot load the model {model!r}: {error}") from None
    network, report = found
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise PolicyError(
            f"{model!r} lacks {len(names)} weights of {type(network).__name__} ({', '.join(names[:3])}, ...), which "
            "would be filled with random numbers. Give a complete model with a language-model head."
        )
    return tokenizer, network


def check_model(model: str | Path) -> None:
    """What can be known of a model before its weights are read. PolicyError names what is missing and where."""
    if str(model) == "default":
        return
    folder = Path(model).expanduser()
    if not folder.exists():
        if _HUB_NAME.fullmatch(str(model)) and not str(model).startswith("."):
            return
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, near) if near else ""
        raise PolicyError(f"there is no model folder {str(model)!r}, and it is no hub name (owner/name).{hint}")
    if not folder.is_dir():
        raise PolicyError(f"{str(model)!r} is a file; a model is a folder with config.json, weights and tokenizer.")
    if not (folder / "config.json").exists():
        raise PolicyError(f"{str(model)!r} holds no config.json, so it is not a model folder.")
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"only pickled ones ({', '.join(pickled)}), which can run code" if pickled else "no *.safetensors file"
        raise PolicyError(f"{str(model)!r} has no weights to load: {why}. Save the model with save_pretrained.")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise PolicyError(f"{str(model)!r} holds no tokenizer: save it there with tokenizer.save_pretrained.")


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


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Log-probabilities are computed from hidden states: make sure that this is what the model itself does."""
    ids = torch.arange(1, 6, device=policy.device)[None]
    hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours, own = policy.logits(hidden), policy.model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours.float(), own, rtol=1e-3, atol=1e-3):
        raise PolicyError(
            f"{type(policy.model).__name__} makes its logits in a way that is not known here: its head applied to its "
            f"hidden states differs by up to {float((ours - own).abs().max()):.3g}."
        )


@torch.no_grad()
def _check_cache(policy: Policy) -> None:
    """Completions continue from the cached keys and values of padded prompts: make sure that this is exact.

    Probed as it is used: a prompt 1 2 3 with two padded slots after it, continued by 4 5.
    """
    from transformers import DynamicCache

    ids, mask, positions = torch.tensor(
        [[1, 2, 3, 0, 0, 4, 5], [1, 1, 1, 0, 0, 1, 1], [0, 1, 2, 2, 2, 3, 4]], device=policy.device
    )[:, None].unbind()
    run = policy.model.base_model
    first = {"input_ids": ids[:, :5], "attention_mask": mask[:, :5], "position_ids": positions[:, :5]}
    then = {"input_ids": ids[:, 5:], "attention_mask": mask, "position_ids": positions[:, 5:]}
    try:
        whole = run(input_ids=ids[mask.bool()][None], use_cache=False).last_hidden_state[:, 3:]
        cache = run(**first, past_key_values=DynamicCache(), use_cache=True).past_key_values
        rest = run(**then, past_key_values=cache, use_cache=True).last_hidden_state
        exact = torch.allclose(rest, whole, rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        exact = False
    if not exact:
        raise PolicyError(
            f"{type(policy.model).__name__} cannot be continued from the cached keys and values of a padded "
            "prompt (it keeps a recurrent state, say). Models with attention in every layer are supported."
        )
