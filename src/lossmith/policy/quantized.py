"""QLoRA (arXiv:2305.14314): the weights that an adapter stands beside, held in 4 bits by bitsandbytes.

NF4 with double quantization, as the paper has it: 16 levels, of which every 64 weights share a scale, and the scales
are 8 bits themselves. What is multiplied is always the weight that the 4 bits stand for, in the type of the product:
a token's log-probability does not depend on what else is in the pass. That of LLM.int8() does, so it is not here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import LossmithError, PolicyError
from lossmith.files import at_home, read_text

__all__ = [
    "NF4",
    "as_if_quantized",
    "bytes_held",
    "check_bitsandbytes",
    "in_full",
    "is_quantized",
    "numbers",
    "quantization_of",
    "quantized_from",
    "record_of",
    "settle",
]

NF4 = "nf4"
RECORD = "quantization_config.json"  # beside an adapter; its keys are those of transformers' BitsAndBytesConfig
_SETTINGS = {"load_in_4bit": True, "bnb_4bit_quant_type": NF4, "bnb_4bit_use_double_quant": True}
_BLOCK, _SCALES = 64, 256  # weights that share a scale, and scales that share one of theirs


def check_bitsandbytes(device: torch.device | None = None, why: str = "quantize = 'nf4'") -> None:
    """PolicyError: bitsandbytes is not installed, or does not compute on that device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PolicyError(f"{why} needs bitsandbytes, which is not installed: pip install 'lossmith[qlora]'")
    if device is not None:
        bitsandbytes = importlib.import_module("bitsandbytes")
        known = sorted(bitsandbytes.supported_torch_devices)
        if device.type not in known:
            raise PolicyError(
                f"{why}: bitsandbytes {bitsandbytes.__version__} does not compute on device {device.type!r}, but on "
                f"{', '.join(known)}: choose one of those, or leave quantize out."
            )


def quantized_from(device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that it quantizes each weight as soon as it is read."""
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**_SETTINGS), "device_map": {"": device}}


def settle(network: Any) -> None:
    """Let quantized layers compute as others do: in the type of autocast, and always with a gradient.

    By itself a layer in eval mode that meets a batch without gradient, on processors with AVX512-BF16, lays its weights
    out for a kernel that rounds to bfloat16 and has no backward pass; the next update's gradient would end there.
    """
    quantized = [m for m in network.modules() if is_quantized(getattr(m, "weight", None))]
    for module in quantized:
        module.support_avx512bf16_for_cpu = False
        module.register_forward_pre_hook(_in_the_type_of_products)
    if quantized:
        _let_go_of_the_file(network)


def _let_go_of_the_file(network: Any) -> None:
    """On a CPU, what is not quantized is a view of the file, all of which stays in memory as long as one view does."""
    for p in network.parameters():
        if not is_quantized(p) and p.device.type == "cpu":
            p.data = p.data.clone()


def _in_the_type_of_products(layer: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = given[0]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    layer.compute_dtype, layer.compute_type_is_set = x.dtype, True
    return (x, *given[1:])


def is_quantized(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None


def numbers(weights: Iterable[nn.Parameter]) -> int:
    """How many these are, of quantized ones too, whose tensors hold two in a byte."""
    return sum(math.prod(_shape(w)) if is_quantized(w) else w.numel() for w in weights)


def bytes_held(weights: Iterable[nn.Parameter]) -> int:
    """What these take, with the scales of quantized ones."""
    return sum(_bytes(math.prod(_shape(w))) if is_quantized(w) else w.numel() * w.element_size() for w in weights)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.quant_state.shape)


def _bytes(count: int) -> int:
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _SCALES)


class _Shape:
    """In the place of bitsandbytes' own record of a weight, where there is only a shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def as_if_quantized(network: Any) -> None:
    """Of a model without weights: its layers' tensors as quantized ones, for those who count. bitsandbytes is not used.

    What is trained, looked up, or the head stays as it is.
    """
    other = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    other.add(id(network.get_output_embeddings().weight))
    for module in _multiplying(network):
        weight = module.weight
        if not weight.requires_grad and id(weight) not in other:
            packed: Any = nn.Parameter(weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8), False)
            packed.quant_state = _Shape(weight.shape)
            module.weight = packed


def _multiplying(network: Any) -> Iterator[Any]:
    from transformers.pytorch_utils import Conv1D

    return (m for m in network.modules() if isinstance(m, (nn.Linear, Conv1D)))


def in_full(network: Any) -> dict[str, nn.Module]:
    """Put layers of float32 weights into the place of quantized ones, which computed with the same; by name.

    The model's configuration does not say that it is quantized any more.
    """
    from transformers.pytorch_utils import Conv1D

    functional = importlib.import_module("bitsandbytes").functional
    layers: dict[str, nn.Module] = {}
    for name, module in list(network.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is None or not is_quantized(weight):
            continue
        values = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        outputs, inputs = values.shape
        layer: Any = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta")
        if module.source_cls is Conv1D:  # GPT-2's, which transformers turned round to quantize them
            layer, values = Conv1D(outputs, inputs), values.T.contiguous()
        layer.weight = nn.Parameter(values, requires_grad=False)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
        network.set_submodule(name, layer)
        layers[name] = layer
    network.hf_quantizer.remove_quantization_config(network)
    network.is_loaded_in_4bit = False
    return layers


def record_of(network: Any) -> str | None:
    """What stands in RECORD beside an adapter, so that its base model is quantized again; None where it is not."""
    config = getattr(network.config, "quantization_config", None)
    return None if config is None else json.dumps(config.to_dict(), indent=2) + "\n"


def quantization_of(adapter: str | Path, error: type[LossmithError] = PolicyError) -> str | None:
    """In what an adapter's base model was held while it was trained: "nf4", or None where its folder names nothing.

    `error`: the folder says something that is not known here.
    """
    path = at_home(adapter, error) / RECORD
    if not path.is_file():
        return None
    try:
        said = json.loads(read_text(path, error, RECORD))
    except ValueError as problem:
        raise error(f"{str(path)!r} is no JSON ({problem}).") from None
    if not isinstance(said, dict) or {key: said.get(key) for key in _SETTINGS} != _SETTINGS:
        raise error(
            f"{str(path)!r} says that the adapter's base model is quantized in a way that is not known here: only "
            f"{', '.join(f'{key} = {json.dumps(value)}' for key, value in _SETTINGS.items())} is. Without that file "
            "the adapter is loaded over the base model as it is."
        )
    return NF4
