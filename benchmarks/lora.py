"""A LoRA adapter of the default model: whether peft computes what Lossmith does, and what it takes beside all weights.

    python benchmarks/lora.py [--rank 8] [--only adapter adapter_nf4]     # minutes each, 6 GB

Trains an adapter for two steps in float32: the log-probabilities of peft's own model, of the merged one and of ours
must be the same. Then the same `lossmith train` with an adapter, with one beside weights in 4 bits, and without any,
each in a process of its own: its greatest resident size and processor time, as the system counts them, and what it
wrote. Writes benchmarks/results/lora.json, where others stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import description

import lossmith as ls

ROUND = {"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 32, "held_out": 4}


KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"learning_rate": 4e-4},
    "adapter_nf4": {"learning_rate": 4e-4, "quantize": "nf4"},
    "all_weights": {},
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rank", type=int, default=8)
    asked.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    given = asked.parse_args()
    place = Path(__file__).parent / "results" / "lora.json"
    found = json.loads(place.read_text()) if place.exists() else {}
    for name in given.only:
        rank = 0 if name == "all_weights" else given.rank
        row = {"machine": description(), "rank": rank, "round": ROUND}
        if rank:  # apart: what a process has held at most counts as that of a program it starts afterwards, too
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:
                row["greatest_difference_nats"] = apart.submit(agreement, rank, KINDS[name]).result()
        found[name] = row | taken({"lora_rank": rank, **KINDS[name]})
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        place.write_text(json.dumps(found, indent=1) + "\n")


def agreement(rank: int, more: dict[str, Any]) -> dict[str, float]:
    """The greatest difference of a token's log-probability, in nats: peft's model and the merged one, to ours."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    as_held = {"quantization_config": nf4, "device_map": {"": "cpu"}} if "quantize" in more else {}
    with tempfile.TemporaryDirectory() as scratch:
        run = ls.train(
            quiet=True, runs=scratch, steps=2, prompts_per_step=4, samples_per_prompt=4, held_out=2, max_tokens=24,
            lora_rank=rank, dtype="float32", checkpoint_minutes=0, guards={"all": "off"}, **more,
        )  # fmt: skip
        folder = run.folder.path / "policy"
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **as_held), folder).eval()
        merged = ls.load_policy(ls.merge_adapter(run.folder.path, Path(scratch) / "merged"), dtype="float32")
        settings = run.recipe.sampling
        drawn = ls.sample(run.policy, list(run.held_out)[:2], 4, settings, seed=1)
        with torch.no_grad():
            ours, whole = (ls.token_outputs(p, drawn, settings).logp for p in (run.policy, merged))
            apart = {"merged": float((ours - whole).abs().max()), "peft": 0.0}
            base_only = ls.token_outputs(run.policy.frozen(), drawn, settings).logp
            for row, r in zip(ours, drawn, strict=True):
                ids = torch.tensor([r.prompt_ids + r.completion_ids])
                logps = (theirs(input_ids=ids).logits[0] / settings.temperature).log_softmax(-1)
                at = logps[len(r.prompt_ids) - 1 : -1].gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]
                apart["peft"] = max(apart["peft"], float((row[: len(at)] - at).abs().max()))
        return apart | {"learned": float((ours - base_only).abs().max())}


def taken(more: dict[str, Any]) -> dict[str, Any]:
    """One run of the command: memory, time, and the sizes of what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {**ROUND, **more, "runs": scratch, "name": "run", "checkpoint_every": ROUND["steps"]}
        words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        run = subprocess.Popen([sys.executable, "-m", "lossmith", "train", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(run.pid, 0)
        if status:
            sys.exit("the run failed")
        folder = Path(scratch) / "run"
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        checkpoint = max((folder / "checkpoints").glob("step-*"))
        return {
            "peak_gb": used.ru_maxrss * 1024 / 1e9,
            "processor_seconds": used.ru_utime + used.ru_stime,
            "median_seconds": {
                part: statistics.median(step[f"seconds_{part}"] for step in steps) for part in ("sample", "update")
            },
            "checkpoint_mb": size(checkpoint) / 1e6,
            "policy_mb": size(folder / "policy") / 1e6,
            "held_out": json.loads((folder / "summary.json").read_text())["held_out"]["difference"],
        }


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
