"""The outputs that the screens show, from the default model: `python -m lossmith.explorer.record > \
src/lossmith/explorer/outputs.json` (a minute; the model is fetched once).

Of each token the eight likeliest alternatives are kept, and what the rest of the vocabulary has together.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from lossmith.policy import Policy, SamplingSettings, load_policy, sample
from lossmith.policy.forward import hidden_states
from lossmith.prompts import default_prompts_path, load_prompts
from lossmith.scorers import load_scorer, score_rollouts

__all__ = ["record"]

SEED, SAMPLES, KEPT, TOKENS = 2, slice(3, 7), 8, 48


def record() -> dict[str, Any]:
    """Samples 3 to 6 of the first shipped prompt, seed 2: one of them ended in time."""
    policy = load_policy("default", device="cpu", dtype="float32")
    prompt = next(iter(load_prompts(default_prompts_path())))
    rollouts = sample(policy, [prompt], SAMPLES.stop, SamplingSettings(max_tokens=TOKENS), seed=SEED)[SAMPLES]
    scored = score_rollouts(load_scorer("helpfulness"), rollouts)
    with torch.no_grad():
        logits = policy.model.lm_head(hidden_states(policy, rollouts, "right"))
        table = logits.double().log_softmax(-1)
    outputs, at = [], 0
    for rollout in scored:
        ids = rollout.completion_ids
        tokens = [_token(policy, table[at + t], list(ids), t) for t in range(len(ids))]
        at += len(ids)
        score = rollout.score
        assert score is not None and score.value is not None
        outputs.append(
            {
                "sample": rollout.sample, "finish": rollout.finish_reason, "text": rollout.completion,
                "score": round(score.value, 4), "parts": {k: round(v, 4) for k, v in score.parts.items()},
                "tokens": tokens,
            }
        )  # fmt: skip
    return {
        "model": "SmolLM2-135M-Instruct", "prompt": prompt.content, "temperature": 1.0, "max_tokens": TOKENS,
        "seed": SEED, "scorer": "helpfulness", "outputs": outputs,
    }  # fmt: skip


def _token(policy: Policy, logp: torch.Tensor, ids: list[int], t: int) -> dict[str, Any]:
    """Its text, and the likeliest tokens [id, text, log-probability]; the sampled one is among them."""
    likely = logp.topk(KEPT).indices.tolist()
    kept = likely if ids[t] in likely else [*likely, ids[t]]
    return {
        "id": ids[t],
        "text": _text(policy, ids, t),
        "top": [[i, _decoded(policy, [i]), round(float(logp[i]), 5)] for i in kept],
    }


def _text(policy: Policy, ids: list[int], t: int) -> str:
    before, after = _decoded(policy, ids[:t]), _decoded(policy, ids[: t + 1])
    return after[len(before) :]


def _decoded(policy: Policy, ids: list[int]) -> str:
    found: str = policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return found


if __name__ == "__main__":
    print(json.dumps(record(), ensure_ascii=False, separators=(",", ":")))
