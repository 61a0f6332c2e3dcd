"""What other trainers write as JSON lines: verl, NeMo-RL, prime-rl, verifiers, open-instruct.

Layouts of verl 0.9.1 (`trainer.rollout_data_dir`), NeMo-RL (`train_data_step{N}.jsonl`), prime-rl (`token_exports`,
schema 1), verifiers 0.4.0 (`traces.jsonl`, also in prime-rl's rollouts) and open-instruct (RolloutRecord).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    group = record.name("uid" if "uid" in record else "input")
    row = Row(max(1, len(text.encode("utf-8", "replace"))), group, record.whole("step"), str(record["input"]), text)
    row.by_row["reward"] = record.number("score")
    yield row


def _nemo_rl(record: Record) -> Iterator[Row]:
    """The whole sequence, prompt included and padded; the response is where token_loss_mask is not 0."""
    mask = [bool(x) for x in record.numbers("token_loss_mask")]
    if not any(mask) or not record.get("sample_loss_mask", 1):
        return
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    ids = record.ids("token_ids") if record.get("token_ids") else [0] * len(mask)
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
    if isinstance(advantage, list):
        row.advantage = record.numbers("advantages")[first:last]
    elif advantage is not None:
        row.advantage = record.number("advantages")
    yield row


def _prime_rl(record: Record) -> Iterator[Row]:
    mask = [bool(x) for x in record.numbers("loss_mask")]
    if not any(mask):
        return
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    ids = record.ids("token_ids")
    row = Row(last - first, prompt_tokens=ids[:first], tokens=ids[first:last])
    row.mask, row.step = mask[first:last], record.whole("step")
    row.by_token["behavior_logp"] = record.numbers("inference_logprobs")[first:last]
    row.by_token["old_logp"] = record.numbers("trainer_logprobs")[first:last]
    if isinstance(record.get("entropy"), list):
        row.by_token["entropy"] = record.numbers("entropy")[first:last]
    row.advantage = record.numbers("advantages")[first:last]
    yield row


def _verifiers(record: Record) -> Iterator[Row]:
    """A row for every leaf of every trace's message graph: the path from its root."""
    group = record.object("group").name("id") or record.name("id")
    for trace in record.objects("traces"):
        nodes = trace.objects("nodes")
        parents = {node.get("parent") if node.get("parent") is None else node.whole("parent") for node in nodes}
        given = trace.object("rewards")
        rewards = [given.object(name) for name, reward in given.items() if reward is not None]
        for leaf in set(range(len(nodes))) - parents:
            row = _path(nodes, leaf)
            if row is None or not rewards:
                continue
            row.group = group
            row.by_row["reward"] = sum(r.number("score") * r.number("weight", 1.0) for r in rewards)
            yield row


def _path(nodes: list[Record], leaf: int) -> Row | None:
    """The sampled tokens on the way from the root to this leaf; None where there is none."""
    path: list[Record] = []
    at: int | None = leaf
    while at is not None and len(path) <= len(nodes):
        if not 0 <= at < len(nodes):
            raise RunError(f"{nodes[0].where}: parent {at} is no node of the {len(nodes)} that there are.")
        path.insert(0, nodes[at])
        at = None if nodes[at].get("parent") is None else nodes[at].whole("parent")
    ids = [i for node in path if node.get("token_ids") for i in node.ids("token_ids")]
    mask = [bool(m) for node in path if node.get("mask") for m in node.list_of("mask")]
    if not any(mask):
        return None
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    row = Row(last - first, prompt_tokens=ids[:first], tokens=ids[first:last], mask=mask[first:last])
    said = [node.object("message") for node in path]
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


def _spread(path: list[Record], name: str) -> list[float] | None:
    """A field of sampled tokens, one number a token of the path; None where a sampled node lacks it."""
    out: list[float] = []
    for node in path:
        mask = node.get("mask") or []
        values = iter(node.numbers(name) if node.get(name) else [])
        for sampled in mask:
            value = next(values, None) if sampled else 0.0
            if value is None:
                return None
            out.append(value)
    return out


def _open_instruct(record: Record) -> Iterator[Row]:
    tokens = record.ids("response_tokens")
    if not tokens:
        return
    prompt = record.ids("prompt_tokens")
    group = record.name("prompt_idx") if "prompt_idx" in record else tuple(prompt)
    row = Row(len(tokens), group, record.whole("step"))
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
