"""Whether peft computes what Lossmith does: an adapter of the default model, trained, saved, loaded and merged.

    python benchmarks/lora.py

Trains for two steps in float32. The log-probabilities of peft's own model, of the merged one and of ours must be the
same. Writes benchmarks/results/lora.json. Memory and time beside training all weights: planned_memory.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from machine import description

import lossmith as ls


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rank", type=int, default=16)
    given = asked.parse_args()
    found = {"machine": description(), "rank": given.rank, "greatest_difference_nats": agreement(given.rank)}
    print(json.dumps(found, indent=1))
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


if __name__ == "__main__":
    main()
