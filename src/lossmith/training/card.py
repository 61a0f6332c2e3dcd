"""The model card of a policy: policy/README.md, which a hub shows, and people read before they use it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith import __version__
from lossmith.intervals import in_words
from lossmith.losses import Loss
from lossmith.policy import adapter_base
from lossmith.policy.embedded import NAME
from lossmith.policy.quantized import quantization_of
from lossmith.training.evaluate import sentences
from lossmith.training.guards import kl_of_completion
from lossmith.training.run import RunFolder

__all__ = ["CARD", "Facts", "of_preferences", "of_rollouts", "write_card"]

CARD = "README.md"
_HUB = re.compile(r"[\w.\-]+/[\w.\-]+")
_EMBEDDED = f"HuggingFaceTB/{NAME}"  # what "default" is, on the hub
_NF4 = 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)\n'
_Figure = tuple[str, Mapping[str, Any], str]  # name, an interval as summary.json holds it, how it is written


@dataclass(frozen=True)
class Facts:
    """What a card says of a run, whatever the policy learned from."""

    data: str
    measure: str  # what the held-out figures are
    figures: Sequence[_Figure]
    verdict: Sequence[str]
    limits: Sequence[str]


def of_rollouts(recipe: Any, summary: Mapping[str, Any], prompts: int, records: Sequence[Mapping[str, Any]]) -> Facts:
    """Of a run that sampled and scored. prompts: trained on. records: the lines of metrics.jsonl."""
    held_out, written = summary["held_out"], recipe.written()
    scorer = _named(written["scorer"])
    n, after = held_out["before"]["n"], held_out["after"]
    distance = kl_of_completion(records[-1]) if records else None
    where = "" if distance is None else f" It ended {distance:.3g} nats a completion (KL) from the base model."
    limits = [
        f"The figures are what `{scorer}` says. What it does not look at was not measured, and may be worse than in "
        "the base model: facts, safety, other languages and tasks.",
        f"Trained and measured with answers of at most {recipe.max_tokens} tokens, at temperature "
        f"{recipe.temperature:g}; {after['ended']:.0%} of the held-out answers ended within that.",
        f"One run, seed {recipe.seed}: another seed may end elsewhere, and the interval does not cover that.",
    ]
    limits += [f"{f['sentence']} ({f['detector']})" for f in summary.get("findings", ()) if f["level"] != "note"]
    return Facts(
        data=f"{prompts} prompts without answers (`{_named(written['prompts'])}`). In {summary['training']['steps']} "
        f"steps the policy wrote {recipe.samples_per_prompt} completions to each of {recipe.prompts_per_step} prompts, "
        f"and `{scorer}` scored them.{where} {n} other prompts were held out.",
        measure=f"Mean score by `{scorer}` of one completion for each of {n} held-out prompts; same prompts and seeds "
        "before and after.",
        figures=[
            ("before", held_out["before"], ".3f"),
            ("after", held_out["after"], ".3f"),
            ("difference", held_out["difference"], "+.3f"),
        ],
        verdict=sentences(summary),
        limits=limits,
    )


def of_preferences(recipe: Any, summary: Mapping[str, Any], verdict: Sequence[str]) -> Facts:
    """Of a run that learned from a file of preferences."""
    held_out, used = summary["held_out"], summary["preferences"]
    return Facts(
        data=f"Preferences (`{_named(recipe.written()['preferences'])}`): {used['train']} to train on, "
        f"{used['held_out']} held out.",
        measure="Accuracy: the share of held-out pairs of texts whose better one has the greater log-ratio to the base "
        "model (or whatever the loss compares). A prompt is the unit.",
        figures=[
            ("before", held_out["before"]["accuracy"], ".3f"),
            ("after", held_out["after"]["accuracy"], ".3f"),
            ("difference", held_out["difference"]["accuracy"], "+.3f"),
        ],
        verdict=verdict,
        limits=[
            "It tells given texts apart; what it writes by itself was not judged. `lossmith sample` and `lossmith "
            "annotate` are a way to.",
            "Who judged, and what they were asked, decides what better means here.",
            f"One run, seed {recipe.seed}: another seed may end elsewhere, and the interval does not cover that.",
        ],
    )


def write_card(folder: RunFolder, recipe: Any, loss: Loss, facts: Facts) -> None:
    """policy/README.md. No path of this machine and no address's key stands in it."""
    base, name = _base_model(recipe.model), folder.path.name
    adapter = (folder.path / "policy" / "adapter_config.json").exists()
    quantized = quantization_of(folder.path / "policy") is not None
    parts = [
        _front(base, loss.name, adapter),
        f"# {name}",
        f"A policy that Lossmith {__version__} trained, starting from `{base}`.",
        f"## Loss\n\n`{loss.name}`, with the values that were in force:\n\n```\n{loss}\n```",
        f"## Data\n\n{facts.data}",
        f"## Held-out figures\n\n{facts.measure}\n\n{_table(facts.figures)}\n\n" + " ".join(facts.verdict),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in facts.limits),
        _use(name, base, adapter, quantized),
    ]
    folder.write_text(f"policy/{CARD}", "\n\n".join(parts) + "\n")


def _base_model(model: str) -> str:
    """A name that others can make something of: a hub name, or a folder's last part. Of an adapter, its base's."""
    model = adapter_base(model) or model
    if model == "default":
        return _EMBEDDED
    return model if _HUB.fullmatch(model) and not os.path.exists(model) else Path(model).name


def _named(value: Any) -> str:
    """A file or folder by its last part, an address without what may be secret in it."""
    if isinstance(value, Mapping):
        return " and ".join(map(_named, value.get("scorers", value)))
    if isinstance(value, list):
        return " and ".join(map(_named, value))
    text = str(value)
    if text.startswith(("http://", "https://")):
        return text.partition("?")[0].rpartition("@")[2].removeprefix("https://").removeprefix("http://")
    return Path(text).name if text.startswith(("/", "~", ".")) or os.path.exists(text) else text


def _front(base: str, loss: str, adapter: bool) -> str:
    """The lines that a hub reads. A license is named only where it is known."""
    lines = [
        "library_name: " + ("peft" if adapter else "transformers"),
        "pipeline_tag: text-generation",
        *([f"base_model: {base}"] if "/" in base else []),
        *(["license: apache-2.0"] if base == _EMBEDDED else []),
        f"tags: [lossmith, rlhf, {re.sub(r'[^a-z0-9_-]', '-', loss.lower())}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _table(figures: Sequence[_Figure]) -> str:
    rows = ["| | mean | 95% interval | n |", "|---|---|---|---|"]
    for name, row, form in figures:
        mean = "?" if row["mean"] is None else format(row["mean"], form)
        rows.append(f"| {name} | {mean} | {in_words(row, form)} | {row['n']} |")
    return "\n".join(rows)


def _use(name: str, base: str, adapter: bool, quantized: bool) -> str:
    served = f"vllm serve {base} --enable-lora --lora-modules {name}=." if adapter else "vllm serve ."
    needs = " and peft, which loads the base model too" if adapter else ""
    classes, how = "AutoModelForCausalLM, AutoTokenizer", ""
    if quantized:
        served = "lossmith merge . -o FOLDER && vllm serve FOLDER"
        needs = ", peft and bitsandbytes: the base model is loaded too, in 4 bits as it was trained beside"
        classes += ", BitsAndBytesConfig"
        how = ", quantization_config=nf4"
    more = ""
    if adapter:
        own = ", a copy of which the run had made from a 4-bit file" if base == _EMBEDDED else ""
        more = (
            f"\n\nThis is a LoRA adapter. Its `adapter_config.json` has the base model where the run had it "
            f"(`base_model_name_or_path`): elsewhere, write `{base}` there{own}. `lossmith merge . -o FOLDER` writes "
            "base and adapter as one model" + " of the weights that the 4 bits stood for" * quantized + "."
        )
    return f"""## Use

In this folder, with transformers{needs}:

```python
from transformers import {classes}

{_NF4 * quantized}model, tokenizer = AutoModelForCausalLM.from_pretrained("."{how}), AutoTokenizer.from_pretrained(".")
asked = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**asked, max_new_tokens=200)[0, asked["input_ids"].shape[1] :]))
```

With vLLM: `{served}`. To a hub, once you have read this card: `hf upload YOU/{name} .`{more}"""
