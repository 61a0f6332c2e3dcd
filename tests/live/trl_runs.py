"""A tiny random model trained by TRL's own `GRPOTrainer.train()`, with TRL's loss or with one of Lossmith."""

import contextlib
import functools
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py stands one folder up

import tiny

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@functools.cache
def folder():
    """A model that ends about every sixth token, so that lengths differ and some completions are cut."""
    path = tempfile.mkdtemp()
    tokenizer = tiny.tokenizer()
    model = tiny.llama(len(tokenizer))
    model.generation_config.eos_token_id = [256, *range(40)]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def letters(completions, **_):
    """A reward that differs between the completions of a random model."""
    return [sum(ord(c) % 7 == 3 for c in text) / 5 + 0.1 * (len(text) % 3) for text in completions]


def length(completions, **_):
    """Another one, of another size."""
    return [2.0 * (len(text) % 4) for text in completions]


def written(prompts, trainer, *, sampler=None, tools=False):
    """A rollout function of TRL: completions that depend on the update and the row's place among those of all
    processes, and on nothing else. sampler: spread (nats) of what the sampler says around the policy. tools: some
    tokens are not the policy's."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    first = trainer.accelerator.process_index * len(prompts)
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": [] if sampler else None}
    if tools:
        found["env_mask"] = []
    for i, prompt in enumerate(prompts):
        draw = torch.Generator().manual_seed(1000 * trainer.state.global_step + first + i)
        ids = torch.randint(41, 250, (int(torch.randint(1, 13, (), generator=draw)),), generator=draw)
        if len(ids) < 12:
            ids[-1] = 256
        start = tokenizer(prompt)["input_ids"]
        found["prompt_ids"].append(start)
        found["completion_ids"].append(ids.tolist())
        if tools:
            found["env_mask"].append([1, *(torch.rand(len(ids) - 1, generator=draw) < 0.7).int().tolist()])
        if sampler:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([start + ids.tolist()])).logits[0, len(start) - 1 : -1]
            logp = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            said = (logp + sampler * torch.randn(len(ids), generator=draw)).tolist()
            found["logprobs"].append([None, *said[1:]] if i % 5 == 0 else said)  # vLLM cannot always say
    return found


def config(**changes):
    """12 updates of 16 completions over 3 generation batches of 32, each used twice; plain SGD, so that any difference
    between two gradients stays as large as it is."""
    from trl import GRPOConfig

    settings = dict(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=4, gradient_accumulation_steps=4,
        steps_per_generation=8, num_iterations=2, num_generations=4, max_completion_length=12, max_steps=12,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=1e9, optim="sgd", seed=3, use_cpu=True,
        bf16=False, model_init_kwargs={"dtype": "float32"}, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, eval_strategy="no",
    )  # fmt: skip
    return GRPOConfig(**settings | changes)


@dataclass
class Trained:
    """What is left of a run."""

    before: torch.Tensor  # all weights, in a row
    weights: torch.Tensor
    log: list[dict]

    def apart(self, other):
        return float((self.weights - other.weights).abs().max())

    def moved(self):
        return float((self.weights - self.before).abs().max())

    def rewards(self):
        return [line["reward"] for line in self.log if "reward" in line]


def flat(model):
    return torch.cat([x.detach().flatten().double() for x in model.parameters()])


def trainer(loss=None, *, args=None, rewards=letters, cls=None, **more):
    """TRL's own trainer where there is no loss; the adapter with it else."""
    import transformers
    from datasets import Dataset
    from trl import GRPOTrainer

    from lossmith.adapters.trl import LossmithGRPOTrainer

    kind = cls or (GRPOTrainer if loss is None else LossmithGRPOTrainer)
    given = {} if loss is None else {"loss": loss}
    data = Dataset.from_dict({"prompt": [f"say {word}" for word in WORDS]})
    return kind(
        model=folder(), args=args or config(), train_dataset=data, reward_funcs=rewards,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder()), **given, **more,
    )  # fmt: skip


def run(loss=None, **more):
    """Trained to the end."""
    return trained(trainer(loss, **more))


def trained(made):
    before = flat(made.model)
    with contextlib.redirect_stdout(io.StringIO()):
        made.train()
    return Trained(before, flat(made.model), made.state.log_history)
