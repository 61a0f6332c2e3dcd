"""LoRA: a policy whose own weights stay as they are, beside small matrices that learn (arXiv:2106.09685), by peft.

peft puts its layers into the model, in the place of those that they adapt. So whatever runs the model runs them too:
shared prompts, sampling and log-probabilities are the same code with and without an adapter.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lossmith.errors import PolicyError, nearest
from lossmith.policy.folder import WEIGHTS_OF_ADAPTER, in_brief
from lossmith.policy.quantized import RECORD, in_full, record_of

__all__ = ["ALL_LINEAR", "Adapter", "LoraSettings", "add_adapter", "load_adapter"]

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's own name for the adapter of a model that has one


@dataclass(frozen=True)
class LoraSettings:
    """A new adapter: W x becomes W x + alpha / rank * B A x, with A [rank, in] drawn from the seed and B [out, rank] 0.

    targets: names of linear layers (q_proj, or self_attn.q_proj), or all-linear: every one but the head.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int


class Adapter:
    """The adapter of a policy. It is on at rest; `frozen` gives what the policy was before it learned."""

    def __init__(self, peft: Any, new: bool) -> None:
        """peft: its model around the policy's. new: the policy before it learned is the base model alone."""
        self.peft, self.new = peft, new
        self.trained: list[nn.Parameter] = [p for p in peft.parameters() if p.requires_grad]

    @property
    def rank(self) -> int:
        return int(self.peft.peft_config[_NAME].r)

    @property
    def layers(self) -> int:
        """How many layers of the model it adapts."""
        return sum(_NAME in getattr(module, "lora_A", ()) for module in self.peft.modules())

    @property
    def quantized(self) -> bool:
        """Whether the model's own weights are held in 4 bits."""
        return record_of(self.peft.get_base_model()) is not None

    def used(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model computes with it."""
        return contextlib.nullcontext()

    def frozen(self) -> Adapter:
        """The same model as it is now, whatever is learned later: no second copy of its weights."""
        return _Off(self.peft, self.new) if self.new else _AsItWas(self.peft, self.new)

    def save(self, folder: str | Path) -> None:
        """In peft's format: adapter_config.json, which names the base model, and adapter_model.safetensors.

        That the base model was quantized has no place in it, and stands in a file of its own.
        """
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        record = record_of(self.peft.get_base_model())
        if record is not None:
            (Path(folder) / RECORD).write_text(record, encoding="utf-8")
        (Path(folder) / "README.md").unlink(
            missing_ok=True
        )  # peft's empty form of a model card, with this machine's path

    def merged(self) -> Any:
        """The model with the adapter's products added to its weights; the adapter is gone afterwards.

        Of quantized weights it is the values that they stood for, in float32: what it computes stays the same.
        """
        if not self.quantized:
            return self.peft.merge_and_unload()
        products = {
            name: module.get_delta_weight(_NAME)
            for name, module in self.peft.get_base_model().named_modules()
            if _NAME in getattr(module, "lora_A", ())
        }
        network = self.peft.unload()
        layers = in_full(network)
        with torch.no_grad():
            for name, product in products.items():
                weight: Any = layers[name].weight
                weight += product if isinstance(layers[name], nn.Linear) else product.T
        return network

    def narrow_base(self, dtype: torch.dtype, but: nn.Module | None = None) -> None:
        """Hold what is only ever multiplied, and never trained, in the type that it is multiplied in.

        Every product would round these weights to it anyway: the numbers are the same to the bit, in half the memory.
        but: a layer that computes in float32.
        """
        learning = {id(p) for p in self.trained}
        looked_up = {id(m.weight) for m in self.peft.modules() if isinstance(m, nn.Embedding)}
        for module in self.peft.modules():
            if type(module) is nn.Linear and module is not but and id(module.weight) not in learning | looked_up:
                module.weight.data = module.weight.data.to(dtype)
                if module.bias is not None:
                    module.bias.data = module.bias.data.to(dtype)


class _Off(Adapter):
    """The base model: its adapter is switched off while it computes."""

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        tuner = self.peft.base_model
        learning = [(p, p.requires_grad) for p in tuner.parameters()]
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()
            for parameter, needed in learning:  # peft takes every adapter that is on for one that learns
                parameter.requires_grad_(needed)


class _AsItWas(Adapter):
    """An adapter that was loaded: its own tensors as they were, in the place of those that learn."""

    def __init__(self, peft: Any, new: bool) -> None:
        super().__init__(peft, new)
        self.kept = [p.detach().clone() for p in self.trained]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        now = [p.data for p in self.trained]
        _put(self.trained, self.kept)
        try:
            yield
        finally:
            _put(self.trained, now)


def _put(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor


def _peft() -> Any:
    """PolicyError: it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise PolicyError("LoRA adapters need peft, which is not installed: pip install 'lossmith[lora]'")
    return importlib.import_module("peft")


def _put_in(network: Any, config: Any, base: str, new: bool) -> Adapter:
    config.base_model_name_or_path = None  # or peft would put another name there, and warn of it
    with warnings.catch_warnings():  # what peft will have to change with the next transformers is no user's matter
        warnings.simplefilter("ignore", FutureWarning)
        adapter = Adapter(_peft().get_peft_model(network, config), new)
    config.base_model_name_or_path = base
    return adapter


def add_adapter(network: Any, lora: LoraSettings, base: str) -> Adapter:
    """A new adapter in a model, which computes what it did until the adapter has learned.

    base: what the model was loaded from, for whoever loads the adapter. PolicyError: a target that is no linear layer.
    """
    linear = _linear(network)
    config = _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        target_modules=_targets(linear, lora.targets, network),
        fan_in_fan_out=not all(isinstance(m, nn.Linear) for m in linear.values()),  # GPT-2's, which are transposed
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        return _put_in(network, config, base, new=True)


def load_adapter(network: Any, folder: Path, base: str) -> Adapter:
    """The adapter of a folder, in the model that it was made for.

    base: where that was loaded from. PolicyError: it does not fit, its weights are damaged, or some are missing.
    """
    peft = _peft()
    wrong = f"the adapter {str(folder)!r} does not fit its base model {base!r}: "
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            adapter = _put_in(network, config, base, new=False)
        tensors = load_file(folder / WEIGHTS_OF_ADAPTER)
        _check_shapes(tensors, peft.get_peft_model_state_dict(adapter.peft, save_embedding_layers=False), wrong)
        loaded = peft.set_peft_model_state_dict(adapter.peft, tensors)
    except PolicyError:
        raise
    except Exception as problem:  # peft and safetensors alone run here; of damaged files they raise anything
        raise PolicyError(wrong + (in_brief(problem) or type(problem).__name__)) from None
    names = {id(p): name for name, p in adapter.peft.named_parameters()}
    lacking = sorted({names[id(p)] for p in adapter.trained} & set(loaded.missing_keys))
    if lacking or loaded.unexpected_keys:
        what = f"lacks {lacking[0]}" if lacking else f"holds {loaded.unexpected_keys[0]}, which that model has not"
        raise PolicyError(f"{wrong}it {what}.")
    return adapter


def _check_shapes(given: dict[str, Tensor], wanted: dict[str, Tensor], wrong: str) -> None:
    for name in sorted(given.keys() & wanted.keys()):
        if given[name].shape != wanted[name].shape:
            raise PolicyError(
                f"{wrong}{name} is {list(given[name].shape)}, and would have to be {list(wanted[name].shape)}. It was "
                "trained on another model: write that one into its adapter_config.json (base_model_name_or_path)."
            )


def _linear(network: Any) -> dict[str, nn.Module]:
    """The layers that an adapter may be for, by name: those of the body that multiply by a matrix."""
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in network.base_model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _targets(linear: dict[str, nn.Module], given: Sequence[str], network: Any) -> list[str]:
    """Names as peft matches them: whole, or from a dot to the end."""
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not known:
        raise PolicyError(f"{type(network).__name__} has no linear layers that an adapter could be for.")
    if list(given) == [ALL_LINEAR]:
        return known
    for target in given:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise PolicyError(
                f"lora_targets: {type(network).__name__} has no linear layer {target!r}."
                f"{nearest(target, [*known, ALL_LINEAR])}"
            )
    return sorted(set(given))
