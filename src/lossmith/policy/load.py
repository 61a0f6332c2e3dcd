"""The policy: a causal language model of transformers, its tokenizer, and how it computes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import PolicyError, nearest
from lossmith.policy.embedded import embedded_model
from lossmith.prompts import Prompt

__all__ = ["Policy", "check_model", "load_policy"]

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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a completion: the generation configuration's, the model's and the tokenizer's."""
        found: set[int] = set()
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found |= set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}
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
        """Token ids of a prompt: the chat template applied once, special tokens never doubled."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in prompt.messages], add_generation_prompt=True, tokenize=False
            )
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not isinstance(prompt.content, str):
            raise PolicyError(f"{prompt.source}: the prompt holds chat messages, but the model has no chat template.")
        ids = tuple(self.tokenizer(prompt.content)["input_ids"])
        if not ids:
            raise PolicyError(f"{prompt.source}: the tokenizer makes no token of the prompt {prompt.content!r}.")
        return ids

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
        return Policy(model, self.tokenizer, self.compute_dtype, self.version)

    def checksum(self) -> str:
        """sha256 over names and bytes of all weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder: float32 safetensors, configuration, tokenizer with its chat template."""
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

    PolicyError: what check_model finds, or a model whose logits are not its head applied to its last hidden states.
    """
    check_model(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for half a second of loading hides what the run itself has to say
    place = str(embedded_model() if str(model) == "default" else model)
    try:
        # False, not absent: transformers would ask on the terminal whether to run a model's own code
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        network: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise PolicyError(f"cannot load the model {str(model)!r}: {error}") from None
    where = torch.device(_best_device() if device == "auto" else device)
    network = network.to(where).eval().requires_grad_(trainable)
    policy = Policy(network, tokenizer, _compute_dtype(compute_dtype, where))
    _check_head(policy)
    return policy


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


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
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
