"""Sampling with Lossmith, one round a request."""

from __future__ import annotations

import json
import sys
import time

import torch
from lossmith_worker import peak_gb

from lossmith.policy import SamplingSettings, load_policy, sample
from lossmith.prompts import Prompt

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
policy = load_policy(work["model"])
prompts = [Prompt(text) for text in work["prompts"]]
settings = SamplingSettings(max_tokens=work["max_tokens"])
for step, _ in enumerate(sys.stdin):
    start = time.perf_counter()
    rollouts = sample(policy, prompts, work["samples"], settings, seed=0, step=step)
    seconds = time.perf_counter() - start
    tokens = sum(len(r.completion_ids) for r in rollouts)
    print(json.dumps({"seconds": {"sample": seconds}, "tokens": tokens, "peak_gb": peak_gb()}), flush=True)
