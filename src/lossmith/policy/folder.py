"""A model's folder, looked at before anything is loaded: what it holds, and whether that can be used at all.

Policies, reward models, and the bodies of future reward models are checked here, so that each of them is refused for
the same reasons in the same words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import LossmithError, PolicyError, nearest
from lossmith.files import at_home, cache_folder, read_text
from lossmith.policy.embedded import NAME

__all__ = [
    "WEIGHTS_OF_ADAPTER",
    "adapter_base",
    "check_config",
    "check_model",
    "find_config",
    "has_tokenizer",
    "in_brief",
]

_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WEIGHTS_OF_ADAPTER = "adapter_model.safetensors"
_ADAPTER = ("adapter_config.json", WEIGHTS_OF_ADAPTER, "adapter_model.bin")
MOST_PARTS = 100_000  # layers, blocks or experts: transformers would build them one by one, and never end
_OTHER_HEADS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a classifier",
    "ForMaskedLM": "an encoder, which fills gaps in a text",
    "ForNextSentencePrediction": "an encoder",
    "ForImageTextToText": "a model of images and text",
}


def check_model(model: str | Path, error: type[LossmithError] = PolicyError, what: str = "policy") -> None:
    """What can be known of a model before its weights are read. `error` names what is missing and where.

    what: "policy", "reward model" where a trained classifier is meant, or "body" of one to be. A hub name is not looked
    up.
    """
    if str(model) == "default" and what != "reward model":
        return
    folder = at_home(model, error)
    if not os.path.lexists(folder):
        if _HUB_NAME.fullmatch(str(model)) and not str(model).startswith("."):
            return
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, near)
        hint = hint if "Did you mean" in hint else ""  # a folder's whole list helps nobody
        raise error(f"there is no model folder {str(model)!r}, and it is no hub name (owner/name).{hint}")
    if not folder.is_dir():
        raise error(f"{str(model)!r} is a file; a model is a folder with config.json, weights and tokenizer.")
    try:
        names = {p.name for p in folder.iterdir()}
    except OSError as problem:
        raise error(f"the model folder {str(model)!r} cannot be read: {problem.strerror}.") from None
    for name in sorted(names):
        _check_ordinary(folder / name, error)
    if names & set(_ADAPTER):
        _check_adapter(folder, names, error, what)
        return
    if "config.json" not in names:
        raise error(f"{str(model)!r} holds no config.json, so it is not a model folder.")
    check_config(find_config(folder, error), str(model), error, what)
    _check_weights(folder, names, error)
    if not has_tokenizer(folder):
        raise error(f"{str(model)!r} holds no tokenizer: save it there with tokenizer.save_pretrained.")


def _check_ordinary(path: Path, error: type[LossmithError]) -> None:
    """A link into nowhere, or a device, which may never end."""
    if not path.is_file() and not path.is_dir():
        raise error(f"{str(path)!r} is no ordinary file (a broken link, or a device): replace it by what is meant.")
    if not os.access(path, os.R_OK):
        raise error(f"{str(path)!r} cannot be read: permission denied.")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZERS)


def adapter_base(model: str | Path, error: type[LossmithError] = PolicyError) -> str | None:
    """The base model of a LoRA adapter's folder: a folder, a hub name, or "default"; None where it is no adapter.

    `error`: the folder of the base model is not there.
    """
    folder = at_home(model, error)
    if not (folder / "adapter_config.json").is_file():
        return None
    base = _json_object(folder / "adapter_config.json", error).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise error(f"{str(folder)!r} is a LoRA adapter, and its adapter_config.json does not say of which base model.")
    there = at_home(base, error)
    if there.is_absolute() and there.name == NAME and (there.parent == cache_folder() or not there.exists()):
        return "default"  # in this machine's cache, or in that of another
    for place in (there, folder / base):
        if place.is_dir():
            return str(place.absolute())
    if _HUB_NAME.fullmatch(base) and not base.startswith("."):
        return base
    raise error(
        f"{str(folder)!r} is a LoRA adapter, and its base model {base!r} is not there: put it back, or write where it "
        "is now into the adapter's adapter_config.json (base_model_name_or_path)."
    )


def _check_adapter(folder: Path, names: set[str], error: type[LossmithError], what: str) -> None:
    """A policy may be an adapter; it is never ignored, and never taken for a whole model."""
    adapter_files = [name for name in _ADAPTER if name in names]
    if "config.json" in names and any(n.endswith(".safetensors") and n not in _ADAPTER for n in names):
        raise error(
            f"{str(folder)!r} holds a whole model and a LoRA adapter beside it. If the adapter is merged into the "
            f"weights already, remove {' and '.join(adapter_files)}; if it is not, move its files to a folder of their "
            "own, and give that."
        )
    if "adapter_config.json" not in names:
        raise error(f"{str(folder)!r} is a LoRA adapter without its adapter_config.json: copy the whole folder again.")
    if what != "policy":
        base = _json_object(folder / "adapter_config.json", error).get("base_model_name_or_path")
        merge = (
            f"peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained({base!r}), "
            f"{str(folder)!r}).merge_and_unload().save_pretrained(FOLDER)"
        )
        raise error(
            f"{str(folder)!r} is a LoRA adapter, not a whole model; its base model is {base!r}. Merge the two, save "
            f"the tokenizer beside them, and give that folder: {merge}."
        )
    config = _json_object(folder / "adapter_config.json", error)
    if config.get("peft_type") != "LORA":
        raise error(f"{str(folder)!r} is an adapter of the kind {config.get('peft_type')!r}, and LoRA alone is known.")
    if config.get("bias", "none") != "none":
        raise error(
            f"the adapter {str(folder)!r} changes the biases of its base model as well (bias = {config['bias']!r}), "
            "so that the base model cannot be had back from it: merge the two with peft, and give the result."
        )
    if WEIGHTS_OF_ADAPTER not in names:
        pickled = ": its weights are pickled, which can run code" * ("adapter_model.bin" in names)
        raise error(f"the adapter {str(folder)!r} has no {WEIGHTS_OF_ADAPTER}{pickled}. Save it with save_pretrained.")
    base = adapter_base(folder, error)
    if base is not None and base != "default":
        if adapter_base(base, error) is not None:
            raise error(
                f"the base model {base!r} of {str(folder)!r} is an adapter itself: `lossmith merge` that first."
            )
        check_model(base, error, what)


def _check_weights(folder: Path, names: set[str], error: type[LossmithError]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")) and n != "training_args.bin")
        gguf = sorted(n for n in names if n.endswith(".gguf"))
        why = "no *.safetensors file"
        if pickled:
            why = f"only pickled ones ({', '.join(pickled)}), which can run code"
        elif gguf:
            why = f"only quantized ones ({', '.join(gguf)})"
        raise error(f"{str(folder)!r} has no weights to load: {why}. Save the model with save_pretrained.")
    index = "model.safetensors.index.json"
    if index in names and "model.safetensors" not in names:
        where = _json_object(folder / index, error).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(x, str) for x in where.values()):
            raise error(f"{str(folder / index)!r} has no weight_map that says which file holds which weight.")
        lacking = sorted(set(where.values()) - names)
        if lacking:
            raise error(
                f"{str(folder)!r} lacks {len(lacking)} of {len(set(where.values()))} weight files that "
                f"{index} names ({', '.join(lacking[:3])}): copy the whole folder again."
            )


def find_config(place: str | Path, error: type[LossmithError]) -> dict[str, Any]:
    """config.json, or that of a folder, as it is, before transformers interprets it."""
    return _json_object(Path(place) if Path(place).is_file() else Path(place) / "config.json", error)


def _json_object(path: Path, error: type[LossmithError]) -> dict[str, Any]:
    text = read_text(path, error, path.name)
    try:
        data = json.loads(text)
    except RecursionError:
        raise error(f"{str(path)!r} is JSON that is nested too deeply.") from None
    except ValueError as problem:
        raise error(f"{str(path)!r} is no JSON ({problem}).") from None
    if not isinstance(data, dict):
        raise error(f"{str(path)!r} holds a JSON {type(data).__name__} where an object is meant.")
    return data


def check_config(config: Mapping[str, Any], name: str, error: type[LossmithError], what: str) -> None:
    """A configuration says what a model is: quantized, of a kind that transformers does not know, or of another use."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    inner = [x for x in config.values() if isinstance(x, dict)]
    if any(x.get(key) is not None for x in (config, *inner) for key in ("quantization_config", "compression_config")):
        quantization = config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        instead = ", which quantize = 'nf4' holds in 4 bits beside an adapter"
        raise error(
            f"the weights of {name!r} are quantized{f' ({method})' if isinstance(method, str) else ''}, and quantized "
            f"weights cannot be trained or scored with here: give the unquantized model{instead * (what == 'policy')}."
        )
    for key, value in (item for part in (config, *inner) for item in part.items()):
        if (
            isinstance(value, int)
            and value > MOST_PARTS
            and re.search("layer|block|expert", key)
            and "_size" not in key
        ):
            raise error(f"config.json of {name!r} says {key} = {value}, which no model has: it is damaged.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        own = " It needs code of its own, and such code is never run." if config.get("auto_map") else ""
        raise error(
            f"config.json of {name!r} names the model type {kind!r}, which transformers {__version__} does not "
            f"know.{own}"
        )
    architecture = config.get("architectures")
    architecture = (
        architecture[0] if isinstance(architecture, list) and architecture and isinstance(architecture[0], str) else ""
    )
    if what != "reward model":
        _check_text(config, kind, architecture, name, error, causal=what == "policy")
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise error(
            f"{name!r} is a {architecture}, a language model that gives no score: train a reward model of it with "
            "`lossmith reward train`, or give one."
        )


def _check_text(
    config: Mapping[str, Any], kind: str, built: str, name: str, error: type[LossmithError], causal: bool
) -> None:
    """It reads text and nothing else, in one piece; causal: it also continues it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    other = ""
    senses = [key.removesuffix("_config") for key in config if key in ("vision_config", "audio_config")]
    if config.get("is_encoder_decoder") is True:
        other = "an encoder-decoder model"
    elif senses:
        other = f"a model of {' and '.join(senses)} and text"
    elif causal:
        other = next((words for ending, words in _OTHER_HEADS.items() if built.endswith(ending)), "")
        if not other and kind not in CAUSAL:
            other = "a model of another kind"
        elif not other and built.endswith("ForConditionalGeneration") and CAUSAL[kind] != built:
            other = "a model that reads more than text"
    if other:
        known = f"{kind} ({built})" if built else kind
        raise error(f"{name!r} holds a {known}, {other}, and no causal language model: give one that continues a text.")


def in_brief(problem: BaseException) -> str:
    """The beginning of a library's message: some list all names that they know."""
    text = " ".join(str(problem).split())
    return text if len(text) <= 300 else text[:300].rstrip() + " ..."
