"""Sampling with transformers' own `generate`, one round a request: bfloat16 weights, which is its fastest here."""

from __future__ import annotations

import json
import sys
import time

import torch
from lossmith_worker import peak_gb
from transformers import AutoModelForCausalLM, AutoTokenizer

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16).eval()
chats = [[{"role": "user", "content": text}] for text in work["prompts"] for _ in range(work["samples"])]
texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
for step, _ in enumerate(sys.stdin):
    torch.manual_seed(step)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work["max_tokens"]
        )
    seconds = time.perf_counter() - start
    new = out[:, inputs["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).cumsum(1)
    tokens = int(((ended - (new == tokenizer.eos_token_id).long()) == 0).sum())
    print(json.dumps({"seconds": {"sample": seconds}, "tokens": tokens, "peak_gb": peak_gb()}), flush=True)
