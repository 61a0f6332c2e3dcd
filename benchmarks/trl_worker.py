"""One GRPO step of TRL at a time, on request: runs in TRL's own environment, in a process of its own.

Reads a work (JSON) from its first argument, then one line of stdin a step; answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

seconds: dict[str, float] = defaultdict(float)
answers = sys.stdout
sys.stdout = sys.stderr  # libraries may print; only answers go to the pipe


@contextlib.contextmanager
def clock(phase):
    start = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - start


def timed(owner, name, phase):
    """Replace a method by one that adds its time to a phase: (phase with gradient, phase without) or one name."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        with clock(phase if isinstance(phase, str) else phase[not torch.is_grad_enabled()]):
            return method(*args, **kwargs)

    setattr(owner, name, call)


def scorer(completions, **_):
    """Share of letters in a completion: cheap, and different from one to the next."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(x.isalpha() for x in text) / max(len(text), 1) for text in texts]


class Steps(TrainerCallback):
    """Waits for a line before each step, and answers after it."""

    def on_step_begin(self, args, state, control, **_):
        if not sys.stdin.readline().strip():
            sys.exit(0)
        seconds.clear()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        phases = dict(seconds)
        phases["total"] = time.perf_counter() - self.start
        lengths = trainer.completion_tokens
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(x.split()[1]) for x in status if x.startswith("VmHWM"))
        print(json.dumps({"seconds": phases, "tokens": lengths, "peak_gb": peak / 1e6}), file=answers, flush=True)


class Trainer(GRPOTrainer):
    completion_tokens = 0

    def _generate_and_score_completions(self, inputs):
        found = super()._generate_and_score_completions(inputs)
        self.completion_tokens = int(found["completion_mask"].sum())
        return found


work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
prompts = [{"prompt": [{"role": "user", "content": text}]} for text in work["prompts"]]
rows = len(prompts) * work["samples"]
config = GRPOConfig(
    output_dir="/tmp/trl-benchmark",
    use_cpu=True,
    bf16=work["dtype"] == "bfloat16",  # autocast over float32 master weights
    per_device_train_batch_size=work["trl_batch"],
    gradient_accumulation_steps=rows // work["trl_batch"],
    num_generations=work["samples"],
    max_completion_length=work["max_tokens"],
    temperature=1.0,
    beta=work["beta"],
    loss_type="grpo",
    learning_rate=4e-5,
    lr_scheduler_type="constant",
    optim="adamw_torch_fused",
    max_grad_norm=1.0,
    gradient_checkpointing=work.get("trl_checkpointing", False),
    max_steps=1000,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=0,
    model_init_kwargs={"dtype": torch.float32},
)
trainer = Trainer(
    model=work["model"],
    reward_funcs=scorer,
    args=config,
    train_dataset=Dataset.from_list(prompts * 1000),
    callbacks=[Steps()],
)
timed(trainer, "_generate", "sample")
timed(trainer, "_get_per_token_logps_and_entropies", ("loss_forward", "log_probs"))
timed(trainer.accelerator, "backward", "backward")
original = trainer.create_optimizer


def create_optimizer(*args, **kwargs):
    optimizer = original(*args, **kwargs)
    timed(optimizer, "step", "optimizer")
    return optimizer


trainer.create_optimizer = create_optimizer
trainer.train()
