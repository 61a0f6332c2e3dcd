"""One rank of a sharded policy beside the same work in one process; prints how far they are apart, as JSON.

python sharded_ranks.py FOLDER RANK SIZE
"""

import json
import sys

import torch
import torch.distributed as dist

import tiny
from lossmith.policy import SamplingSettings, sample, token_outputs
from lossmith.policy.sharded import shard, whole, whole_tensor

SETTINGS = SamplingSettings(temperature=0.8, max_tokens=9)


def backward(policy, rollouts, rows, passes, recompute=False):
    """Gradients of Σ c_i log p_i over these rows, a pass for each; passes beyond them count nothing."""
    weights = torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
    for k in range(passes):
        i, there = (rows[k], 1.0) if k < len(rows) else (0, 0.0)
        out = token_outputs(policy, [rollouts[i]], SETTINGS, activation_checkpointing=recompute)
        (there * weights[i] * out.logp.sum()).backward()


def together(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def furthest(ours, theirs):
    return max(float((together(a).detach() - b.detach()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def adamw(policy):
    return torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def one_step(policy, optimizer, *work, recompute=False):
    backward(policy, *work, recompute=recompute)
    norm = together(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def main(folder, rank, size):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    rollouts = tiny.rollouts()
    mine = [i for i in range(len(rollouts)) if i % 3 % size == rank]  # of two ranks, one has twice as many
    mine = mine if rank else [*mine, 0]  # and rank 0 sees the first twice
    seen = [i for r in range(size) for i in ([i for i in range(len(rollouts)) if i % 3 % size == r] + [0] * (r == 0))]
    passes = torch.tensor(len(mine))
    dist.all_reduce(passes, dist.ReduceOp.MAX)
    ours, alone = tiny.policy(dtype=torch.float64), tiny.policy(dtype=torch.float64)
    shard(ours)
    gathered = {name: whole_tensor(p) for name, p in ours.model.named_parameters()}
    found = {"checksum": ours.checksum(gathered) != alone.checksum()}
    found |= {"held": sum(p.to_local().numel() for p in ours.parameters()) / sum(p.numel() for p in alone.parameters())}

    own = (rollouts, mine, int(passes))
    theirs = (rollouts, seen, len(seen))
    backward(alone, *theirs)
    for name, recompute in (("gradient", False), ("gradient, layers run again", True)):
        backward(ours, *own, recompute)
        found[name] = furthest([p.grad for p in ours.parameters()], [p.grad for p in alone.parameters()])
        for p in ours.parameters():
            p.grad = None
    for p in alone.parameters():
        p.grad = None

    optimizer, its = adamw(ours), adamw(alone)
    for _ in range(3):
        norm, its_norm = one_step(ours, optimizer, *own), one_step(alone, its, *theirs)
    found["gradient norm"] = abs(norm - its_norm)
    found["parameters after 3 steps"] = furthest(ours.parameters(), alone.parameters())

    prompts = tiny.prompts()
    with whole(ours):
        texts = sample(ours, prompts[rank : rank + 1], 1 + rank, SETTINGS, seed=0)
    expected = sample(alone, prompts[rank : rank + 1], 1 + rank, SETTINGS, seed=0)
    found["texts that differ"] = sum(a.completion_ids != b.completion_ids for a, b in zip(texts, expected, strict=True))
    print(json.dumps(found))
    dist.destroy_process_group()


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
