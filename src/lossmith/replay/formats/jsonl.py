"""What other trainers write as JSON lines: verl, NeMo-RL, prime-rl, verifiers, open-instruct.

Layouts of verl 0.9.1 (`trainer.rollout_data_dir`), NeMo-RL (`train_data_step{N}.jsonl`), prime-rl (`token_exports`,
schema 1), verifiers 0.4.0 (`traces.jsonl`, also in prime-rl's rollouts) and open-instruct (RolloutRecord).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lossmith.errors import RunError
from lossmith.replay.formats.lines import Record, shown_keys
from lossmith.replay.recorded import Row

__all__ = ["layout_of"]


@dataclass(frozen=True)
class Layout:
    """One trainer's lines. marks: fields that its lines have and no other's."""

    source: str
    marks: tuple[str, ...]
    rows: Callable[[Record], Iterator[Row]]
    notes: tuple[str, ...] = ()


def _verl(record: Record) -> Iterator[Row]:
    text = str(record["output"])
    group = record.get("uid", record["input"])
    row = Row(max(1, len(text.encode())), group, int(record.get("step", 0)), str(record["input"]), text)
    row.by_row["reward"] = record.number("score")
    yield row


def _nemo_rl(record: Record) -> Iterator[Row]:
    """The whole sequence, prompt included and padded; the response is where token_loss_mask is not 0."""
    mask = [bool(x) for x in record.numbers("token_loss_mask")]
    if not any(mask) or not record.get("sample_loss_mask", 1):
        return
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    ids = record.get("token_ids") or [0] * len(mask)
    row = Row(
        last - first, tuple(ids[:first]), prompt_tokens=ids[:first], tokens=ids[first:last], mask=mask[first:last]
    )
    content = record.get("content")
    row.completion = content if isinstance(content, str) else ""
    names = {"generation_logprobs": "behavior_logp", "prev_logprobs": "old_logp"}
    names["reference_policy_logprobs"] = "ref_logp"
    for theirs, ours in names.items():
        if theirs in record:
            row.by_token[ours] = record.numbers(theirs)[first:last]
    row.by_row["reward"] = record.number("rewards")
    advantage = record.get("advantages")
    row.advantage = record.numbers("advantages")[first:last] if isinstance(advantage, list) else advantage
    yield row


def _prime_rl(record: Record) -> Iterator[Row]:
    mask = [bool(x) for x in record.numbers("loss_mask")]
    if not any(mask):
        return
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    row = Row(last - first, prompt_tokens=record["token_ids"][:first], tokens=record["token_ids"][first:last])
    row.mask, row.step = mask[first:last], int(record.get("step", 0))
    row.by_token["behavior_logp"] = record.numbers("inference_logprobs")[first:last]
    row.by_token["old_logp"] = record.numbers("trainer_logprobs")[first:last]
    if isinstance(record.get("entropy"), list):
        row.by_token["entropy"] = record.numbers("entropy")[first:last]
    row.advantage = record.numbers("advantages")[first:last]
    yield row


def _verifiers(record: Record) -> Iterator[Row]:
    """A row for every leaf of every trace's message graph: the path from its root."""
    group = (record.get("group") or {}).get("id") or record.get("id")
    for trace in record.list_of("traces"):
        nodes = trace.get("nodes") or []
        rewards = {k: r for k, r in (trace.get("rewards") or {}).items() if r is not None}
        for leaf in set(range(len(nodes))) - {node.get("parent") for node in nodes}:
            row = _path(nodes, leaf)
            if row is None or not rewards:
                continue
            row.group = group
            row.by_row["reward"] = sum(r["score"] * r.get("weight", 1.0) for r in rewards.values())
            yield row


def _path(nodes: list[dict[str, Any]], leaf: int) -> Row | None:
    """The sampled tokens on the way from the root to this leaf; None where there is none."""
    path: list[dict[str, Any]] = []
    at: int | None = leaf
    while at is not None and len(path) <= len(nodes):
        path.insert(0, nodes[at])
        at = nodes[at].get("parent")
    ids = [i for node in path for i in node.get("token_ids") or []]
    mask = [bool(m) for node in path for m in node.get("mask") or []]
    if not any(mask):
        return None
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    row = Row(last - first, prompt_tokens=ids[:first], tokens=ids[first:last], mask=mask[first:last])
    said = [(node.get("message") or {}) for node in path]
    row.prompt = str(next((m.get("content") for m in said if m.get("role") == "user"), ""))
    row.completion = "".join(str(m.get("content") or "") for m in said if m.get("role") == "assistant")
    for theirs, ours in _VERIFIERS.items():
        spread = _spread(path, theirs)
        if spread is not None and ours == "advantage":
            row.advantage = spread[first:last]
        elif spread is not None:
            row.by_token[ours] = spread[first:last]
    return row


_VERIFIERS = {
    "logprobs": "behavior_logp",
    "trainer_logprobs": "old_logp",
    "reference_logprobs": "ref_logp",
    "entropies": "entropy",
    "advantages": "advantage",
}


def _spread(path: list[dict[str, Any]], name: str) -> list[float] | None:
    """A field of sampled tokens, one number a token of the path; None where a sampled node lacks it."""
    out: list[float] = []
    for node in path:
        mask = node.get("mask") or []
        values = iter(node.get(name) or [])
        for sampled in mask:
            value = next(values, None) if sampled else 0.0
            if value is None:
                return None
            out.append(float(value))
    return out


def _open_instruct(record: Record) -> Iterator[Row]:
    tokens = record.list_of("response_tokens")
    if not tokens:
        return
    prompt = record.list_of("prompt_tokens")
    row = Row(len(tokens), record.get("prompt_idx", tuple(prompt)), int(record.get("step", 0)))
    row.prompt_tokens, row.tokens = prompt, tokens
    if record.get("logprobs"):
        row.by_token["behavior_logp"] = record.numbers("logprobs")
    row.by_row |= {"reward": record.number("reward"), "truncated": record.get("finish_reason") == "length"}
    row.advantage = record.number("advantage") if record.get("advantage") is not None else None
    yield row


_BYTES = "token ids are not recorded: bytes of the text stand for tokens"

LAYOUTS = (
    Layout("NeMo-RL", ("token_loss_mask", "rewards"), _nemo_rl),
    Layout("prime-rl", ("inference_logprobs", "loss_mask"), _prime_rl, ("rewards and groups are not recorded",)),
    Layout("verifiers", ("traces", "task"), _verifiers, ("verifiers rounds numbers to 4 decimals",)),
    Layout("open-instruct", ("response_tokens", "prompt_tokens"), _open_instruct),
    Layout("verl", ("input", "output", "score"), _verl, (_BYTES, "log-probabilities and advantages are not recorded")),
)


def layout_of(record: Record) -> Layout:
    """Whose line it is. RunError: nobody's that is known."""
    for layout in LAYOUTS:
        if all(mark in record for mark in layout.marks):
            return layout
    known = "; ".join(f"{x.source}: {', '.join(x.marks)}" for x in LAYOUTS)
    raise RunError(
        f"{record.where}: a line with {shown_keys(record)} is of no trainer that is known ({known}). Say what its "
        "fields are with --map reward=...,completion=...,group=..."
    )
