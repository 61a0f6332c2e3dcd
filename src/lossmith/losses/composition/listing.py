"""A loss as plain torch, generated from the composition: a function one can read, run, or take into another trainer.

Every piece says its own lines; tests run the listing and compare value and gradient with the loss itself.
The listing leaves out what the loss does about bad input: it expects finite numbers, and a token in every row.
"""

from __future__ import annotations

import re

from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.batch import FIELDS
from lossmith.losses.composition.composition import Composition

__all__ = ["listing"]

_HELPERS = {
    "sum_g": [
        "def sum_g(x):  # over the completions of each prompt",
        "    return (group[:, None] == group).to(x.dtype) @ x",
    ],
    "size_g": ["def size_g():", "    return (group[:, None] == group).sum(1)"],
    "mean_g": ["def mean_g(x):", "    return sum_g(x) / size_g()"],
    "std_g": [
        "def std_g(x, ddof=1):",
        "    return (sum_g((x - mean_g(x)) ** 2) / (size_g() - ddof).clamp(min=1)).sqrt()",
    ],
    "max_g": ["def max_g(x):", "    return torch.where(group[:, None] == group, x, -torch.inf).amax(1)"],
    "min_g": ["def min_g(x):", "    return torch.where(group[:, None] == group, x, torch.inf).amin(1)"],
    "std_of_others": [
        "def std_of_others():",
        "    def std(i):",
        "        others = R[(group == group[i]) & (torch.arange(len(R)) != i)]",
        "        return others.std() if len(others) > 1 else torch.zeros(())",
        "    return torch.stack([std(i) for i in range(len(R))])",
    ],
    "on_last": [
        "def on_last(x):  # [N] -> [N, T], on the last token",
        "    return torch.zeros(mask.shape, dtype=x.dtype).scatter(1, T[:, None] - 1, x[:, None])",
    ],
}
_USES = {"mean_g": ("sum_g", "size_g"), "std_g": ("sum_g", "mean_g", "size_g")}


def listing(loss: Composition) -> str:
    """The source of a function of torch tensors, named after the loss. Tokens stand at the left of their rows."""
    objective = _objective(loss)
    advantages = _advantages(loss) if loss.advantage.acts or "A" in _words(objective) else []
    body = ["T = mask.sum(1)", *_rewards(loss, _words([*advantages, *objective])), *advantages, *objective]
    used = _mentioned(body)
    head = [line for name, lines in _HELPERS.items() if name in used for line in lines]
    first = body.index("T = mask.sum(1)") + 1
    body = [*body[:first], *head, *body[first:]]
    words = _words(body)
    fields = ", ".join(f for f in FIELDS if f in words and f not in ("logp", "mask"))
    name = re.sub(r"\W", "_", loss.name)
    return "\n".join([f"def {name}(logp, mask{', *, ' + fields if fields else ''}):", *("    " + x for x in body)])


def _words(lines: list[str]) -> set[str]:
    """Those of the code; a comment reads no field."""
    return set(re.findall(r"\w+", "\n".join(line.partition("#")[0] for line in lines)))


def _mentioned(body: list[str]) -> set[str]:
    """Helpers that the lines use, and those that these use."""
    found = {name for name in _HELPERS if any(f"{name}(" in line for line in body)}
    while more := {n for name in found for n in _USES.get(name, ())} - found:
        found |= more
    return found


def _rewards(loss: Composition, words: set[str]) -> list[str]:
    """R [N], or r_t [N, T], if what follows mentions either."""
    if not words & {"R", "r_t"}:
        return []
    lines = ["R = reward", *(line for shaping in loss.shaping for line in shaping.code())]
    per_token = "r_t" in _words(lines)
    if loss.truncated == "zero":
        lines.append("R = torch.where(truncated, 0.0, R)")
    if ("r_t" in words or loss.kl.in_reward) and not per_token:
        lines.append("r_t = on_last(R)")
    if loss.kl.in_reward:
        lines += [*loss.kl.code(), "r_t = r_t - kl"]
    summed = not loss.advantage.per_token or "R" in _words(loss.advantage.code())
    if (loss.kl.in_reward or per_token) and summed:
        lines.append("R = (r_t * mask).sum(1)")
    return lines


def _advantages(loss: Composition) -> list[str]:
    lines = [*loss.advantage.code(), *loss.advantage_scale.code()]
    if loss.advantage_mul != 1:
        lines.append(f"A = {loss.advantage_mul} * A")
    if loss.advantage_clip is not None:
        lines.append(f"A = A.clamp(-{loss.advantage_clip}, {loss.advantage_clip})")
    return [*lines, "A = A if A.ndim == 2 else A[:, None].expand(mask.shape)"]


def _objective(loss: Composition) -> list[str]:
    lines = []
    policies = {"old": "old_logp", "behavior": "behavior_logp", "ref": "ref_logp", "self": "logp.detach()"}
    if loss.needs_ratio:
        lines += [f"denominator_logp = {policies[loss.ratio_level.denominator]}", *loss.ratio_level.code()]
    nothing = ["loss = torch.zeros(mask.shape, dtype=torch.float64)"]
    lines += _policy(loss) if loss.advantage.acts else nothing
    after: list[str] = []
    if loss.kl.in_loss:
        lines += loss.kl.code()
        if loss.kl.masked and loss.mismatch.acts:
            lines.append("kl = u * kl")
        (lines if loss.kl_aggregate == "same" else after).append("kl")
    if loss.entropy_coef:
        (lines if loss.entropy_aggregate == "same" else after).append(f"-{loss.entropy_coef} * entropy")
    lines = [f"loss = loss + {x}" if x == "kl" or x.startswith("-") else x for x in lines]
    lines += loss.extra.code()
    if loss.value.active:
        lines += [*loss.advantage.target_code(), *loss.value.code(), "loss = loss + critic"]
    return [*lines, *_total(loss, after)]


def _policy(loss: Composition) -> list[str]:
    """The policy term with its masks and mismatch weights."""
    lines = list(loss.trust.code())
    for mask in (loss.token_mask, loss.sequence_mask):
        if mask.code():
            lines += [*mask.code(), "loss = loss * keep"]
    if loss.mismatch.acts:
        lines += [*loss.mismatch.code(), "loss = u * loss"]
    return lines


def _total(loss: Composition, after: list[str]) -> list[str]:
    """From the tokens' terms to the scalar."""
    lines = ["m = mask"]
    if loss.group_filter.acts:
        lines = [*loss.group_filter.code(), "m = mask & keep_row[:, None]"]
    if loss.truncated == "mask":
        lines.append("loss = torch.where(truncated[:, None], 0.0, loss)")
    lines.append(f"L = {loss.aggregate.code('loss')}")
    for term in after:
        how = loss.kl_aggregate if term == "kl" else loss.entropy_aggregate
        lines.append(f"L = L + {AGGREGATE[how]().code(f'({term})')}")
    return [*lines[:-1], lines[-1].replace("L =", "return", 1)]
