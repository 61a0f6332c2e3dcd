"""Forward passes through the model's body: last hidden states at the positions that predict response tokens.

Every layout gives the same rows: for each rollout in turn, one hidden state [H] a response token, that of the position
just before it. "shared" encodes each prompt once, whatever the number of its completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.attention import PrefixTree, TreeAttention, follow
from lossmith.policy.load import Policy
from lossmith.policy.sending import sent
from lossmith.rollouts import Rollout

__all__ = ["Layout", "encode_prompts", "hidden_states", "select_rows"]

Layout = Literal["shared", "right", "left", "packed", "single"]


def hidden_states(policy: Policy, rollouts: Sequence[Rollout], layout: Layout) -> Tensor:
    """[M, H], M the number of response tokens of all rollouts together, rollout by rollout."""
    policy.model.eval()  # the caller may have changed it: dropout would make the ratio differ from 1
    if layout == "shared":
        return _shared(policy, rollouts)
    if layout == "packed":
        return _packed(policy, rollouts)
    if layout == "single":
        return torch.cat([_padded(policy, [r], "right") for r in rollouts])
    if layout in ("right", "left"):
        return _padded(policy, rollouts, layout)
    raise PolicyError(f"layout is {layout!r}; known: shared, right, left, packed, single.")


def encode_prompts(policy: Policy, prompts: Sequence[tuple[int, ...]], grad: bool) -> tuple[Any, Tensor, Tensor]:
    """(cache of keys and values, prompt mask [P, L], hidden state of each prompt's last token [P, H]).

    Prompts are padded on the right, with positions given explicitly: no row is ever without a position to attend to.
    """
    from transformers import DynamicCache

    policy.model.eval()
    ids, mask = _stack(prompts, policy.device)
    positions = _positions(mask)
    with torch.set_grad_enabled(grad):
        out = policy.model.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=DynamicCache(),
            use_cache=True,
        )
    last = mask.sum(1) - 1
    return out.past_key_values, mask, out.last_hidden_state[torch.arange(len(ids), device=last.device), last]


def select_rows(cache: Any, rows: Tensor) -> Any:
    """A new cache with these rows of another, in that order, repeated where a row repeats; gradients kept."""
    from transformers import DynamicCache

    chosen = DynamicCache()
    for index, layer in enumerate(cache.layers):
        chosen.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), index)
    return chosen


def _shared(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """Each distinct prompt once, all completions behind it, everything in one row without padding."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(rollouts):
        members.setdefault(r.prompt_ids, []).append(i)
    fed = [(prompt, [rollouts[i].completion_ids[:-1] for i in rows]) for prompt, rows in members.items()]
    tree = PrefixTree.of(fed, policy.device)
    hidden = follow(policy.model, TreeAttention(tree), tree.ids[None], tree.positions[None])
    order = sorted(range(len(rollouts)), key=[i for rows in members.values() for i in rows].__getitem__)
    places = [j for k in order for j in (tree.before[k], *range(tree.rows[k][0], sum(tree.rows[k])))]
    # Not hidden[0, places]: a prompt's last state stands there once for each completion, and the backward pass of such
    # an index adds up in whatever order the threads come, so that two runs of one recipe would part in the last bits.
    return hidden[0].index_select(0, sent(places, policy.device))


def _padded(policy: Policy, rollouts: Sequence[Rollout], side: str) -> Tensor:
    """Prompt and completion as one row each, padded to the longest."""
    rows = [r.prompt_ids + r.completion_ids[:-1] for r in rollouts]
    ids, mask = _stack(rows, policy.device, side)
    out = policy.model.base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=_positions(mask), use_cache=False
    )
    response = torch.zeros_like(mask)
    for i, r in enumerate(rollouts):
        end = mask.shape[1] if side == "left" else len(rows[i])
        response[i, end - len(r.completion_ids) : end] = True
    return out.last_hidden_state[response]


def _packed(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """All rows end to end in one; positions start again at each, and the mask keeps attention within a row."""
    rows = [r.prompt_ids + r.completion_ids[:-1] for r in rollouts]
    ids = torch.tensor([i for row in rows for i in row], device=policy.device)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].to(policy.device)
    owner = torch.repeat_interleave(torch.tensor([len(row) for row in rows], device=policy.device))
    sees = (owner[:, None] == owner[None]).tril()[None, None]
    if policy.model.config._attn_implementation != "sdpa":  # the others add their mask to the scores
        floor = torch.finfo(policy.model.dtype).min
        sees = torch.zeros(sees.shape, dtype=policy.model.dtype, device=policy.device).masked_fill(~sees, floor)
    out = policy.model.base_model(input_ids=ids, attention_mask=sees, position_ids=positions, use_cache=False)
    response = [
        i >= len(row) - len(r.completion_ids) for row, r in zip(rows, rollouts, strict=True) for i in range(len(row))
    ]
    return out.last_hidden_state[0, torch.tensor(response, device=policy.device)]


def _stack(rows: Sequence[tuple[int, ...]], device: torch.device, side: str = "right") -> tuple[Tensor, Tensor]:
    """Ragged ids -> ([N, L] ids, [N, L] mask). Padded slots hold id 0 and are never attended to."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    """0, 1, 2, ... over the valid positions of each row; 0 in padded slots before them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
