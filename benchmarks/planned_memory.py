"""What `lossmith plan` says that training takes, beside the most that real steps held: four sizes of models.

    python benchmarks/planned_memory.py     # on the CPU; some minutes, 10 GB

Models of random weights and the default model's tokenizer; of each, three GRPO steps with a reference in a process of
its own, whose greatest resident size (VmHWM) is the measurement. Writes benchmarks/results/planned_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import description

import lossmith as ls
from lossmith.policy import embedded_model
from lossmith.policy.quantized import numbers
from lossmith.training import Learner, Recipe

# hidden, inner, layers, heads, heads of keys
SIZES = {
    "32M": (384, 1024, 8, 6, 3),
    "60M": (512, 1408, 12, 8, 4),
    "90M": (640, 1664, 14, 10, 5),
    "135M": (576, 1536, 30, 9, 3),  # the default model's shape
}
ROUND = {
    "prompts_per_step": 8,
    "samples_per_prompt": 4,
    "max_tokens": 64,
    "dtype": "float32",
    "loss": "grpo(beta=0.04)",
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    asked.add_argument("--lora-rank", type=int, default=0)
    asked.add_argument("--quantize", choices=["nf4"])
    asked.add_argument("--worker")
    given = asked.parse_args()
    adapter = {"lora_rank": given.lora_rank} | ({"quantize": given.quantize} if given.quantize else {})
    if given.worker:
        print(json.dumps(work(given.worker, adapter)))
        return
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), *SIZES[name])
            command = [sys.executable, __file__, "--worker", folder, "--lora-rank", str(given.lora_rank)]
            command += ["--quantize", given.quantize] if given.quantize else []
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        write(name, adapter, json.loads(done.stdout.splitlines()[-1]))


def write(size: str, adapter: dict[str, Any], measured: dict[str, Any]) -> None:
    """In the place of what was measured of this size before."""
    off = measured["planned_gb"] / measured["peak_gb"] - 1
    print(f"{size}, {adapter}: planned {measured['planned_gb']:.2f} GB, held {measured['peak_gb']:.2f} GB ({off:+.0%})")
    row = {
        "size": size,
        "shape": SIZES[size],
        "round": ROUND | adapter,
        "machine": description(),
        **measured,
    }
    place = Path(__file__).parent / "results" / "planned_memory.json"
    rows = json.loads(place.read_text())["rows"] if place.exists() else []
    rows = [r for r in rows if (r["size"], r["round"]) != (size, row["round"])] + [row]
    rows.sort(key=lambda r: (r["round"]["lora_rank"], r["round"].get("quantize", ""), r["parameters"]))
    place.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def make(folder: Path, hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(embedded_model())
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, inner, layers
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, key_heads, hidden // heads
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)


def work(folder: str, adapter: dict[str, Any]) -> dict[str, Any]:
    """Three steps; the most that this process has held, and what was planned."""
    recipe = Recipe.make(model=folder, **ROUND, **adapter)
    policy = ls.load_policy(folder, lora=recipe.lora, dtype=recipe.dtype, quantize=recipe.quantize)
    prompts = list(ls.load_prompts([f"What is {i} good for, and why?" for i in range(8)]))
    longest = max(len(policy.encode(p)) for p in prompts)
    learner = Learner(policy, recipe.policy_loss(), recipe, longest)
    loaded = held("VmRSS")
    for step in range(3):
        worked = time.process_time()
        rollouts = ls.sample(policy, prompts, recipe.samples_per_prompt, recipe.sampling, seed=0, step=step)
        scored = ls.score_rollouts(ls.load_scorer(length), rollouts)
        batch = learner.make_batch(scored)
        learner.update(scored, batch, learner.credit(batch), step)
    memory = learner.memory
    return {
        "parameters": numbers(policy.model.parameters()),
        "compute": str(policy.compute_dtype),
        "prompt_tokens": longest,
        "planned_gb": memory.total(learner.recompute) / 1e9,
        "peak_gb": held("VmHWM"),
        "loaded_gb": loaded,
        "step_processor_seconds": time.process_time() - worked,  # of the last step: other work may run beside it
        "parts_gb": {k: v / 1e9 for k, v in memory.held.items()}
        | {"sampling": memory.sampling / 1e9, "update": memory.activations / 1e9},
    }


def length(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def held(name: str) -> float:
    """GB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


if __name__ == "__main__":
    main()
