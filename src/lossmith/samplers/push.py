"""Sending the policy's weights to a server, and the proof that they arrived.

The weights go through a folder that both see: the server reads it with `reload_weights`, which works on every device.
Two witnesses then: the server's checksum of each of its tensors, and its log-probabilities of a short text beside the
learner's. Without them a server that lost a push goes on answering from old weights, and nothing looks wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lossmith.errors import RunError
from lossmith.files import explain_write_errors
from lossmith.policy import Policy

__all__ = ["BOUNDS", "Checksums", "digests", "write_weights"]

# Nats: the most that the mean |log p of the server - log p of the learner| of a text may be (measured: docs/vllm.md).
BOUNDS = {"bfloat16": 0.08, "float32": 1e-4}

# Of a tensor that the server has packed away: nothing is left under its name, before a push and after it.
_EMPTY = hashlib.sha256(b"").hexdigest()

# What vLLM keeps as one tensor, and which of the model's it is made of, one after another.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def write_weights(policy: Policy, folder: Path) -> None:
    """A model's folder in the type that is computed in, whole or not at all. RunError: it cannot be written.

    On a CPU its head is a tensor of its own, even where the model ties it to the embeddings: vLLM packs a tied head
    once, and reloads the embeddings without it.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    state = {name: x.detach().to("cpu", policy.compute_dtype) for name, x in policy.model.state_dict().items()}
    head = _head_name(policy) if policy.device.type == "cpu" else None
    if head is not None:
        state[head] = state[head].clone()
    with explain_write_errors(folder):
        partial.mkdir(parents=True)
        policy.model.save_pretrained(partial, state_dict=state)
        policy.tokenizer.save_pretrained(partial)
        if head is not None:
            path = partial / "config.json"
            config = json.loads(path.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
            path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        os.replace(partial, folder)


def _head_name(policy: Policy) -> str | None:
    """Of the head's tensor, where it is the embeddings' too."""
    head = policy.model.get_output_embeddings()
    if head.weight is not policy.model.get_input_embeddings().weight:
        return None
    return next(name + ".weight" for name, module in policy.model.named_modules() if module is head)


def digests(policy: Policy) -> dict[str, str]:
    """{name: sha256} of the tensors as the server should hold them, under the model's names and the fused ones."""
    tensors = {name: p.detach() for name, p in policy.model.named_parameters(remove_duplicate=False)}
    found = {name: _sha256([tensor], policy.compute_dtype) for name, tensor in tensors.items()}
    for fused, (first, *others) in _FUSED.items():
        for name in tensors:
            mine, dot, kind = name.rpartition(".")
            if mine.endswith("." + first):
                stem = mine.removesuffix(first)
                parts = [stem + part + dot + kind for part in (first, *others)]
                if all(part in tensors for part in parts):
                    found[stem + fused + dot + kind] = _sha256([tensors[p] for p in parts], policy.compute_dtype)
    return found


def _sha256(parts: list[Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checksums:
    """The server's tensors, held against ours after every push.

    A tensor that the server keeps in another form than ours (cut over several devices, say) cannot be computed here:
    of it, all that is known is that it must change whenever the model has. Of one that it has packed away nothing is
    known, and the log-probabilities alone speak for it.
    """

    def __init__(self) -> None:
        self._theirs: dict[str, str] = {}
        self._ours: dict[str, str] = {}
        self._known: set[str] = set()  # those that were equal once, and must be from then on

    def check(self, theirs: Mapping[str, str], ours: Mapping[str, str]) -> int:
        """How many of the server's tensors are surely ours. RunError: one is not, or none could be told."""
        equal = {name for name, digest in theirs.items() if ours.get(_bare(name)) == digest}
        if not equal and not self._theirs:
            raise RunError(f"none of the server's {len(theirs)} tensors is what was sent")
        wrong = sorted(self._known - equal)
        if self._theirs and theirs.keys() != self._theirs.keys():
            raise RunError("the server's tensors are not those that it had at the push before: it was restarted?")
        if ours != self._ours and self._theirs:
            wrong += sorted(n for n in theirs.keys() - self._known - equal if self._stale(n, theirs, ours))
        if wrong:
            raise RunError(
                f"{len(wrong)} of the server's {len(theirs)} tensors are not what was sent ({_bare(wrong[0])}, ...)"
            )
        self._theirs, self._ours, self._known = dict(theirs), dict(ours), self._known | equal
        return len(equal)

    def _stale(self, name: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
        """Whether it is as before, though the tensor that it is made of is not."""
        bare = _bare(name)
        if theirs[name] == _EMPTY:
            return False
        changed = ours[bare] != self._ours.get(bare) if bare in ours else ours != self._ours
        return changed and theirs[name] == self._theirs.get(name)


def _bare(name: str) -> str:
    """A parameter's name without the worker that holds it ("dp0:pp0:tp0:model.norm.weight")."""
    return name.rpartition(":")[2]
