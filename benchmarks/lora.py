"""A LoRA adapter of the default model: whether peft computes what Lossmith does, and what it takes beside all weights.

    python benchmarks/lora.py [--rank 8]     # minutes, 6 GB

Trains an adapter for two steps in float32: the log-probabilities of peft's own model, of the merged one and of ours
must be the same. Then the same `lossmith train` with and without the adapter, each in a process of its own: its
greatest resident size and processor time, as the system counts them, and what it wrote. Writes
benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import description

import lossmith as ls

ROUND = {"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 32, "held_out": 4}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rank", type=int, default=8)
    rank = asked.parse_args().rank
    found = {"machine": description(), "rank": rank, "round": ROUND, "greatest_difference_nats": agreement(rank)}
    print(json.dumps(found, indent=1), flush=True)
    for name, each, learning_rate in (("adapter", rank, 4e-4), ("all_weights", 0, None)):
        found[name] = taken(each, learning_rate)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    (Path(__file__).parent / "results" / "lora.json").write_text(json.dumps(found, indent=1) + "\n")


def agreement(rank: int) -> dict[str, float]:
    """The greatest difference of a token's log-probability, in nats: peft's model and the merged one, to ours."""
    import peft
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        run = ls.train(
            quiet=True, runs=scratch, steps=2, prompts_per_step=4, samples_per_prompt=4, held_out=2, max_tokens=24,
            lora_rank=rank, learning_rate=4e-4, dtype="float32", checkpoint_minutes=0, guards={"all": "off"},
        )  # fmt: skip
        folder = run.folder.path / "policy"
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
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


def taken(rank: int, learning_rate: float | None) -> dict[str, Any]:
    """One run of the command: memory, time, and the sizes of what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {**ROUND, "lora_rank": rank, "runs": scratch, "name": "run", "checkpoint_every": ROUND["steps"]}
        options |= {} if learning_rate is None else {"learning_rate": learning_rate}
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
