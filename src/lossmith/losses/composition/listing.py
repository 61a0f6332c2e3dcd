"""A loss as plain torch, generated from the composition: a function one can read, run, or take into another trainer.

Every piece says its own lines; tests run the listing and compare value and gradient with the loss itself.
The listing leaves out what the loss does about bad input: it expects finite numbers, and a token in every row.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lossmith.losses.axes.advantage import Critic, Given, NoScale, ReferenceGap, Zero
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.axes.extra import NoExtra
from lossmith.losses.axes.masks import KeepAll
from lossmith.losses.axes.mismatch import NoMismatch
from lossmith.losses.axes.shaping import Potential
from lossmith.losses.batch import FIELDS

if TYPE_CHECKING:
    from lossmith.losses.composition.policy_loss import PolicyLoss

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


def listing(loss: PolicyLoss) -> str:
    """The source of a function of torch tensors, named after the loss. Tokens stand at the left of their rows."""
    body = ["T = mask.sum(1)", *_rewards(loss), *_advantages(loss), *_objective(loss)]
    used = _mentioned(body)
    head = [line for name, lines in _HELPERS.items() if name in used for line in lines]
    first = body.index("T = mask.sum(1)") + 1
    body = [*body[:first], *head, *body[first:]]
    words = set(re.findall(r"\w+", "\n".join(body)))
    fields = ", ".join(f for f in FIELDS if f in words and f not in ("logp", "mask"))
    name = re.sub(r"\W", "_", loss.name)
    return "\n".join([f"def {name}(logp, mask{', *, ' + fields if fields else ''}):", *("    " + x for x in body)])


def _mentioned(body: list[str]) -> set[str]:
    """Helpers that the lines use, and those that these use."""
    found = {name for name in _HELPERS if any(f"{name}(" in line for line in body)}
    while more := {n for name in found for n in _USES.get(name, ())} - found:
        found |= more
    return found


def _rewards(loss: PolicyLoss) -> list[str]:
    """R [N], or r_t [N, T] where the estimator or the KL penalty works on tokens."""
    if isinstance(loss.advantage, (Zero, Given)) or not loss.needs & {"reward", "reward_parts"}:
        return []
    lines = ["R = reward"] if "reward" in loss.needs else []
    for shaping in loss.shaping:
        lines += shaping.code()
    per_token = any(isinstance(s, Potential) for s in loss.shaping)
    if loss.truncated == "zero":
        lines.append("R = torch.where(truncated, 0.0, R)")
    in_reward = loss.kl.in_reward
    if (loss.advantage.per_token or in_reward) and not per_token and not isinstance(loss.advantage, ReferenceGap):
        lines.append("r_t = on_last(R)")
    if in_reward:
        lines += [*loss.kl.code(), "r_t = r_t - kl"]
    if (in_reward or per_token) and not loss.advantage.per_token:
        lines.append("R = (r_t * mask).sum(1)")
    return lines


def _advantages(loss: PolicyLoss) -> list[str]:
    lines = [] if isinstance(loss.advantage, Zero) and not loss.kl.active else loss.advantage.code()
    if not isinstance(loss.scale, NoScale):
        lines += loss.scale.code()
    if loss.advantage_mul != 1:
        lines.append(f"A = {loss.advantage_mul} * A")
    if loss.advantage_clip is not None:
        lines.append(f"A = A.clamp(-{loss.advantage_clip}, {loss.advantage_clip})")
    return [*lines, "A = A if A.ndim == 2 else A[:, None].expand(mask.shape)"] if lines else []


def _objective(loss: PolicyLoss) -> list[str]:
    lines = []
    below = {"old": "old_logp", "behavior": "behavior_logp", "ref": "ref_logp", "self": "logp.detach()"}
    kl_ratio = loss.kl.uses_ratio
    if loss.trust.uses_ratio or kl_ratio:
        lines += [f"below = {below[loss.ratio.denominator]}", *loss.ratio.code()]
    if isinstance(loss.advantage, Zero):
        lines.append("loss = torch.zeros(mask.shape, dtype=torch.float64)")
    else:
        lines += _policy(loss)
    after: list[str] = []
    if loss.kl.in_loss:
        lines += loss.kl.code()
        if loss.kl.masked and not isinstance(loss.mismatch, NoMismatch):
            lines.append("kl = u * kl")
        (lines if loss.kl_aggregate == "same" else after).append("kl")
    if loss.entropy_coef:
        (lines if loss.entropy_aggregate == "same" else after).append(f"-{loss.entropy_coef} * entropy")
    lines = [f"loss = loss + {x}" if x == "kl" or x.startswith("-") else x for x in lines]
    if not isinstance(loss.extra, NoExtra):
        lines += loss.extra.code()
    if loss.value.active:
        target = loss.advantage.target_code() if isinstance(loss.advantage, Critic) else ["G = returns"]
        lines += [*target, *loss.value.code(), "loss = loss + critic"]
    return [*lines, *_total(loss, after)]


def _policy(loss: PolicyLoss) -> list[str]:
    """The policy term with its masks and mismatch weights."""
    lines = list(loss.trust.code())
    for mask in (loss.token_mask, loss.sequence_mask):
        if mask.code():
            lines += [*mask.code(), "loss = loss * keep"]
    if not isinstance(loss.mismatch, NoMismatch):
        lines += [*loss.mismatch.code(), "loss = u * loss"]
    return lines


def _total(loss: PolicyLoss, after: list[str]) -> list[str]:
    """From the tokens' terms to the scalar."""
    lines = ["m = mask"]
    if not isinstance(loss.group_filter, KeepAll):
        lines = [*loss.group_filter.code(), "m = mask & keep_row[:, None]"]
    if loss.truncated == "mask":
        lines.append("loss = torch.where(truncated[:, None], 0.0, loss)")
    lines.append(f"L = {loss.aggregate.code('loss')}")
    for term in after:
        how = loss.kl_aggregate if term == "kl" else loss.entropy_aggregate
        lines.append(f"L = L + {AGGREGATE[how]().code(f'({term})')}")
    return [*lines[:-1], lines[-1].replace("L =", "return", 1)]
