"""Started by test_ranks.py, becomes all ranks: every loss named, trained by all ranks and by this process alone.

ranks_program.py OUT DTYPE PROMPTS SHARD LOSS...: rank 0 writes the largest differences of each loss to OUT. LOSS+lora
trains an adapter, LOSS+qlora one beside weights in 4 bits. SHARD "parts": every rank holds a part of the weights;
"copies": all of them.
"""

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import tiny
from lossmith.errors import quiet_traps
from lossmith.losses import example_loss
from lossmith.policy import LoraSettings, Teacher, load_policy
from lossmith.policy.adapter import add_adapter
from lossmith.ranks import of_environment
from lossmith.rollouts import Distribution, Score
from lossmith.training import Recipe
from lossmith.training.can_learn import TAUGHT
from lossmith.training.learner import Learner
from lossmith.training.shards import named_weights

FIELDS = dict(
    temperature=0.8,
    max_tokens=9,
    learning_rate=1e-2,
    allow_traps=True,
    epochs=2,
    updates_per_step=2,
    micro_batch_tokens=30,
)


sent = []  # by this rank: how many numbers each sum of gradients and each copy of the weights has


def counted(operation):
    def call(tensor, *args, **more):
        sent.append(tensor.numel())
        return operation(tensor, *args, **more)

    return call


def made(name, dtype, ranks=None, shard=False):
    name, _, lora = name.partition("+")
    settings = LoraSettings(2, 8.0, ("all-linear",), seed=0)
    if lora == "qlora":
        policy = load_policy(tiny.folder(), device="cpu", dtype="float32", lora=settings, quantize="nf4")
    else:
        policy = tiny.policy(tiny.llama(), dtype)
    if lora == "lora":
        policy.adapter = add_adapter(policy.model, settings, "base")
    loss = example_loss(name, max_length=9)
    teacher = Teacher(tiny.policy(tiny.llama(seed=5), dtype)) if loss.needs & TAUGHT else None
    if loss.value.active:
        policy.add_value_head()
        torch.nn.init.normal_(policy.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    with quiet_traps():
        return Learner(policy, loss, Recipe.make(**FIELDS, shard=shard), ranks=ranks, teacher=teacher)


def rounds(dtype, prompts):
    """Three rounds of ragged completions with scores; of the policy as it then is."""
    for step in range(3):
        kind = Distribution(0, 0.8, 1.0, 0, str(dtype).removeprefix("torch."))
        rollouts = tiny.rollouts(prompt_count=prompts, seed=step, measure=kind, dtype=dtype)
        values = torch.rand(len(rollouts), generator=torch.Generator().manual_seed(step)).tolist()
        yield [dataclasses.replace(r, score=Score(value=v)) for r, v in zip(rollouts, values, strict=True)]


def trained(learner, dtype, prompts):
    """(the parameters after three rounds of four optimizer steps, the metrics of each round)."""
    metrics = []
    for step, rollouts in enumerate(rounds(dtype, prompts)):
        now = [
            dataclasses.replace(r.behavior_logp.distribution, policy_version=learner.policy.version) for r in rollouts
        ]
        rollouts = [
            dataclasses.replace(r, behavior_logp=dataclasses.replace(r.behavior_logp, distribution=d))
            for r, d in zip(rollouts, now, strict=True)
        ]
        update, _ = tiny.update(learner, rollouts, step)
        metrics.append(update.metrics)
    return parameters(learner), metrics


def parameters(learner):
    shards = learner.shards
    held = dict(named_weights(learner.policy)) if shards is None else shards.weights()
    return torch.cat([p.flatten().double() for p in held.values()])


def compare(name, dtype, prompts, ranks):
    ranks.call("begin", name)
    sent.clear()
    ours, together = trained(begun[name], dtype, prompts)
    alone, expected = trained(made(name, dtype), dtype, prompts)
    start = parameters(made(name, dtype))
    gap = max(
        abs(a[key] - b[key]) / max(1.0, abs(b[key]))
        for a, b in zip(together, expected, strict=True)
        for key in (a.keys() | b.keys()) - {"accuracy"}  # it counts ties, which rounding breaks
    )
    return {
        "parameters": float((ours - alone).abs().max()),
        "metrics": gap,
        "moved": float((alone - start).abs().max()),
        "sent": sum(sent),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, dtype, prompts, held, *losses = sys.argv[1:]
    tiny.folder()  # before there are others, of which transformers lets one alone write
    for rank in range(1, int(os.environ["WORLD_SIZE"])):
        if os.fork() == 0:  # what was imported is imported
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            break
    kind, ranks, begun = getattr(torch, dtype), of_environment(), {}
    dist.reduce, dist.broadcast = counted(dist.reduce), counted(dist.broadcast)
    ranks.tasks["begin"] = lambda name: begun.update({name: made(name, kind, ranks, held == "parts")})
    if ranks.rank:
        ranks.serve()
    else:
        found = {name: compare(name, kind, int(prompts), ranks) for name in losses}
        ranks.end()
        Path(out).write_text(json.dumps(found))
