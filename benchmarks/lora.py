"""A GRPO step with a LoRA adapter beside one that trains all weights: seconds and memory; and whether peft agrees.

    python benchmarks/lora.py                   # the default model; a few minutes
    python benchmarks/lora.py --steps 2 --rank 4

Each kind of step runs in a process of its own. Then an adapter is trained for two steps, saved, loaded by peft itself
and merged: the log-probabilities of all three, in float32, must be the same. Writes benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import description
from works import WORKS, described

import lossmith as ls
from lossmith.policy import embedded_model

HERE = Path(__file__).parent


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--work", choices=list(WORKS), default="small-reference")
    asked.add_argument("--steps", type=int, default=4)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--threads", type=int, default=2)
    given = asked.parse_args()
    model = str(embedded_model())
    work = described(ls.load_policy(model), WORKS[given.work], model, given.threads)
    kinds = {"all weights": {}, "adapter": {"lora_rank": given.rank, "learning_rate": 4e-4}}
    found = {name: _measured(work | {"lossmith": more}, given.steps) for name, more in kinds.items()}
    for name, one in found.items():
        print(
            f"{name}: {one['seconds']['total']:.2f} s a step, {one['cpu_seconds']:.2f} s of processor, "
            f"{one['peak_gb']:.2f} GB",
            flush=True,
        )
    agrees = _agreement(given.rank)
    print(json.dumps(agrees))
    result = {"machine": description(), "work": given.work, "rank": given.rank, "steps": given.steps}
    (HERE / "results" / "lora.json").write_text(json.dumps(result | found | {"nats": agrees}, indent=1) + "\n")


def _measured(work: dict[str, Any], steps: int) -> dict[str, Any]:
    """Medians over the steps after the first, with the least and the most of a whole step."""
    command = [sys.executable, str(HERE / "lossmith_worker.py"), json.dumps(work)]
    done = subprocess.run(command, input="\n" * (steps + 1), capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()][1:]  # the first touch of memory takes long
    seconds = {name: statistics.median(one["seconds"][name] for one in lines) for name in lines[0]["seconds"]}
    total = [one["seconds"]["total"] for one in lines]
    cpu = statistics.median(one["cpu_seconds"] for one in lines)
    return {"seconds": seconds, "range": [min(total), max(total)], "cpu_seconds": cpu, "peak_gb": lines[-1]["peak_gb"]}


def _agreement(rank: int) -> dict[str, float]:
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


if __name__ == "__main__":
    main()
