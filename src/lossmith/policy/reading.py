"""Reading a policy: its folder is checked, its weights are loaded and looked through, and what it is for is tried."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from lossmith.errors import PolicyError, nearest
from lossmith.files import at_home
from lossmith.policy.adapter import Adapter, LoraSettings, add_adapter, load_adapter
from lossmith.policy.embedded import embedded_model
from lossmith.policy.folder import adapter_base, check_config, check_model, has_tokenizer, in_brief
from lossmith.policy.load import Policy, find_device, find_dtype
from lossmith.policy.memory import keep_freed_memory
from lossmith.policy.narrow import hold_in_bfloat16
from lossmith.policy.quantized import NF4, RECORD, check_bitsandbytes, quantization_of, quantized_from, settle
from lossmith.policy.text import SpecialTokens, check_special_tokens
from lossmith.policy.trial import sharing_is_exact

__all__ = ["check_head", "check_quantization", "check_weights", "load_policy", "read_pretrained"]


def load_policy(
    model: str | Path = "default",
    *,
    device: str = "auto",
    dtype: str = "auto",
    trainable: bool = True,
    special_tokens: SpecialTokens = "answer",
    chat_template: str | None = None,
    lora: LoraSettings | None = None,
    float32_head: bool = False,
    weights: str = "float32",
    quantize: str | None = None,
) -> Policy:
    """Load a policy: "default" (SmolLM2-135M-Instruct), a folder, or a hub name. Remote code is never run.

    The folder may be that of a LoRA adapter: its base model is found by its adapter_config.json, and what is trained
    then is the adapter. lora: train a new adapter, and leave the model's own weights as they are.

    dtype: what matrix products run in: auto, float32 or bfloat16.
    special_tokens: which of them a completion's text shows (`Policy.decode`). chat_template: the name of one, where
    the model has several. float32_head: logits in float32 where the other products are in bfloat16. weights: what the
    model is held in: float32 or bfloat16; then dtype is auto or bfloat16, which are the same. quantize: "nf4" holds the
    weights of linear layers, but the head's, in 4 bits, beside an adapter or to be computed with alone; an adapter's
    folder that says so is loaded so in any case.

    PolicyError: what check_model finds, bitsandbytes that is needed and not there, weights that are missing, damaged or
    not finite, an adapter that does not fit, or a model whose sampling or log-probabilities are not those of its plain
    forward pass.
    """
    check_model(model)
    check_special_tokens(special_tokens)
    where = find_device(device)
    quantized = check_quantization(model, quantize, where)
    if quantized and trainable and lora is None and adapter_base(model) is None:
        raise PolicyError(
            "quantize = 'nf4': weights in 4 bits cannot learn, an adapter beside them can: give lora too."
        )
    if where.type == "cpu":
        keep_freed_memory()
    tokenizer, network, adapter = _read(str(model), where, lora, quantized)
    if adapter is None or not trainable:
        network.requires_grad_(trainable)
    policy = Policy(
        network.to(where).eval(),
        tokenizer,
        find_dtype("bfloat16" if (dtype, weights) == ("auto", "bfloat16") else dtype, where),
        special_tokens=special_tokens,
        adapter=adapter,
        float32_head=float32_head,
    )
    if chat_template is not None:
        policy.use_template(chat_template)
    _check_parts(policy, str(model))
    sharing_is_exact(policy)
    if adapter is not None and policy.compute_dtype != torch.float32:
        adapter.narrow_base(policy.compute_dtype, but=network.get_output_embeddings() if float32_head else None)
    if weights == "bfloat16":
        hold_in_bfloat16(policy)
    return policy


def check_quantization(model: str | Path, quantize: str | None, device: torch.device | None = None) -> bool:
    """Whether the weights of a model, or of an adapter's base, are to be held in 4 bits. quantize: what a setting says.

    PolicyError: no such quantization; bitsandbytes is not installed, or does not compute on that device.
    """
    if quantize not in (None, NF4):
        raise PolicyError(f"quantize is {quantize!r}.{nearest(quantize, [NF4])}")
    why = "quantize = 'nf4'"
    if quantize is None and adapter_base(model) is not None:
        quantize = quantization_of(model)
        why = f"the adapter {str(model)!r} was trained beside weights in 4 bits ({RECORD}), which"
    if quantize is not None:
        check_bitsandbytes(device, why)
    return quantize is not None


def _read(
    model: str, device: torch.device, lora: LoraSettings | None, quantized: bool
) -> tuple[Any, Any, Adapter | None]:
    """(tokenizer, model on its device, its adapter), of an adapter's folder or of a whole model."""
    more = quantized_from(device) if quantized else {}
    base = adapter_base(model)
    if base is not None and lora is not None:
        raise PolicyError(
            f"lora_rank = {lora.rank}, but {model!r} is a LoRA adapter already, which is trained on as it is: leave "
            f"lora_rank = 0. For a new adapter, merge this one first: lossmith merge {model} -o FOLDER"
        )
    if base is None:
        tokenizer, network, place = _read_whole(model, **more)
        return tokenizer, network, None if lora is None else add_adapter(network.to(device), lora, place)
    folder = at_home(model, PolicyError)
    tokenizer, network, place = _read_whole(base, str(folder) if has_tokenizer(folder) else None, **more)
    adapter = load_adapter(network.to(device), folder, place)
    check_weights(network, model, PolicyError)
    return tokenizer, network, adapter


def _read_whole(model: str, tokenizer: str | None = None, **more: Any) -> tuple[Any, Any, str]:
    """(tokenizer, model in float32, where it is) as transformers reads them, refused where a weight would be made up.

    tokenizer: the folder of another one than the model's own. more: what transformers is told, of quantization.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(model).expanduser()
    place = str(embedded_model() if model == "default" else folder.absolute() if folder.exists() else model)
    text, network, missing = read_pretrained(
        AutoModelForCausalLM, place, model, PolicyError, "policy", tokenizer, **more
    )
    if missing:
        raise PolicyError(
            f"{model!r} lacks {len(missing)} weights of {type(network).__name__} ({', '.join(missing[:3])}, ...), "
            "which would be filled with random numbers. Give a complete model with a language-model head."
        )
    check_weights(network, model, PolicyError)
    settle(network)
    return text, network, place


def read_pretrained(
    auto: Any, place: str, name: str, error: Any, what: str, tokenizer_place: str | None = None, **more: Any
) -> tuple[Any, Any, list[str]]:
    """(tokenizer, model in float32, names of weights that were not there) of a folder or hub name.

    auto: a class of transformers. `error`: transformers cannot make anything of it; `name` is what the user called it.
    """
    from transformers import AutoTokenizer, PretrainedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for half a second of loading hides what the run itself has to say
    try:
        config, _ = PretrainedConfig.get_config_dict(place)
        check_config(config, name, error, what)
        # False, not absent: transformers would ask on the terminal whether to run a model's own code
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place or place, trust_remote_code=False)
        network, report = auto.from_pretrained(
            place,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    except error:
        raise
    except (
        Exception
    ) as problem:  # nothing of ours runs here but the check; damaged files make transformers raise anything
        raise error(f"cannot load the model {name!r}: {in_brief(problem) or type(problem).__name__}") from None
    if getattr(network, "_hf_peft_config_loaded", False):
        raise error(
            f"{name!r} is a LoRA adapter on the hub: download it (hf download {name} --local-dir FOLDER) and give that "
            "folder."
        )
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or not longest > 0:
        raise error(
            f"the tokenizer of {name!r} says model_max_length = {longest!r}, and that must be a number of tokens."
        )
    return tokenizer, network, sorted(report["missing_keys"])


def check_weights(network: Any, name: str, error: Any) -> None:
    """`error` where a weight is not there, or not finite: every loss would be, too."""
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise error(f"the weight {key} of {name!r} could not be loaded.")
        if tensor.numel() and tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            ends = torch.stack(torch.aminmax(tensor))
            if not bool(torch.isfinite(ends).all()):
                bad = "NaN" if bool(torch.isnan(ends).any()) else "infinite numbers"
                raise error(f"the weights of {name!r} hold {bad} (in {key}): they are damaged, or training diverged.")


def check_head(model: Any, name: str) -> None:
    """PolicyError where there is no body apart from a head."""
    if model.base_model is model or model.get_output_embeddings() is None or model.get_input_embeddings() is None:
        raise PolicyError(
            f"{name!r} holds a {type(model).__name__}, whose body and head cannot be told apart, so its "
            "log-probabilities cannot be computed here: give a model of another kind."
        )


def _check_parts(policy: Policy, name: str) -> None:
    """What is used later: a body apart from the head, end tokens, texts that can be saved again."""
    check_head(policy.model, name)
    assert isinstance(policy.eos_ids, frozenset)  # refuses what it cannot read
    try:
        with tempfile.TemporaryDirectory() as scratch:
            policy.model.config.save_pretrained(scratch)
            policy.tokenizer.save_pretrained(scratch)
    except Exception as problem:  # transformers alone runs here
        raise PolicyError(f"{name!r} could be trained but not saved: {in_brief(problem)}") from None
