"""Where keys and values live while completions are written.

`SharedCache` stores those of a prompt once, however many completions it has, and those of the completions in memory
that is laid out before the first token. `PlainCache` is transformers' own cache, one copy a completion: for models
whose attention is not known here, and as the reference that the other is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lossmith.policy.attention import PrefixTree, TreeAttention, follow, scaled_product
from lossmith.policy.distribution import accumulation_dtype
from lossmith.policy.forward import encode_prompts, select_rows
from lossmith.policy.load import Policy
from lossmith.policy.sending import sent

__all__ = ["Cache", "PlainCache", "SharedCache"]

ENCODED_AT_ONCE = 8192  # tokens of prompts, but for a longer one alone
_FIRST_STEPS = 16  # tokens for which rows have room at first; doubled when they need more


class Cache(Protocol):
    """Keys and values of the rows that are being written. Every method returns last hidden states [N, H]."""

    def add(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        """Encode these prompts and append so many rows of each; returns the hidden states of the new rows."""

    def room(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> bool:
        """Whether these can be added now."""

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows go on, in this order."""

    def step(self, ids: Tensor) -> Tensor:
        """Feed each row the token that was just chosen for it."""


def _fit_one_pass(prompts: Sequence[tuple[int, ...]]) -> bool:
    """Whether one forward pass may encode all of these: what it holds on the way grows with their tokens."""
    return len(prompts) == 1 or sum(map(len, prompts)) <= ENCODED_AT_ONCE


class PlainCache:
    """transformers' cache. Rows are added only where there are none."""

    def __init__(self, policy: Policy, most_rows: int) -> None:
        self.policy, self._most, self._count = policy, most_rows, 0
        self._cache: Any = None

    def add(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        cache, mask, last = encode_prompts(self.policy, prompts, grad=False)
        owner = torch.repeat_interleave(torch.tensor(list(copies))).to(mask.device)
        self._cache, self._mask, self._count = select_rows(cache, owner), mask[owner], len(owner)
        self._position = self._mask.sum(1)
        return last[owner]

    def room(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> bool:
        fits = self._count == 0 and sum(copies) <= self._most and _fit_one_pass(prompts)
        return fits and len({len(ids) for ids in prompts}) == 1  # nothing is padded: not every model allows it

    def keep(self, order: Sequence[int]) -> None:
        self._count = len(order)
        if order:
            rows = torch.tensor(list(order), device=self._mask.device)
            self._cache, self._mask = select_rows(self._cache, rows), self._mask[rows]
            self._position = self._position[rows]

    def step(self, ids: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        out = self.policy.model.base_model(
            input_ids=ids[:, None],
            attention_mask=self._mask.long(),
            position_ids=self._position[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache, self._position = out.past_key_values, self._position + 1
        return out.last_hidden_state[:, -1]


class SharedCache:
    """One copy of each prompt's keys and values; rows that end make room for rows of the next prompt."""

    def __init__(self, policy: Policy, rows: int, prompts: int, longest: int, steps: int) -> None:
        """rows, prompts: how many there may be at one time; longest: tokens of a prompt; steps: tokens fed to a row."""
        self.policy = policy
        self._most, self._most_prompts, self._longest, self._steps = rows, prompts, longest, max(steps, 1)
        self._prompt: list[tuple[Tensor, Tensor]] = []  # at each call of attention: keys, values [G, H_kv, P, D]
        self._own: list[tuple[Tensor, Tensor]] = []  # likewise [N, H_kv, T, D]
        self._lengths: list[int] = []  # tokens of each prompt
        self._owner: list[int] = []  # each row's prompt
        self._fed: list[int] = []  # tokens fed to each row

    def room(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> bool:
        rows, groups = len(self._owner) + sum(copies), len(self._lengths) + len(prompts)
        return rows <= self._most and groups <= self._most_prompts and _fit_one_pass(prompts)

    def add(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        tree = PrefixTree.of([(ids, ()) for ids in prompts], self.policy.device)
        hidden = follow(
            self.policy.model, _Encoding(self, tree, len(self._lengths)), tree.ids[None], tree.positions[None]
        )
        last = torch.tensor([s.stop - 1 for s in tree.prompts], device=hidden.device)
        for ids, count in zip(prompts, copies, strict=True):
            self._owner += [len(self._lengths)] * count
            self._fed += [0] * count
            self._lengths.append(len(ids))
        owner = torch.repeat_interleave(torch.tensor(list(copies))).to(hidden.device)
        self._arrange()
        return hidden[0, last][owner]

    def keep(self, order: Sequence[int]) -> None:
        for place, row in enumerate(order):
            if place != row:
                for pair in self._own:
                    for x in pair:
                        x[place, :, : self._fed[row]] = x[row, :, : self._fed[row]]
        self._owner = [self._owner[row] for row in order]
        self._fed = [self._fed[row] for row in order]
        self._drop_prompts()
        self._arrange()

    def step(self, ids: Tensor) -> Tensor:
        lengths = [self._lengths[g] + t for g, t in zip(self._owner, self._fed, strict=True)]
        positions = sent(lengths, ids.device)[:, None]
        hidden = follow(self.policy.model, _Step(self, self._fed, ids.device), ids[:, None], positions)[:, -1]
        self._fed = [t + 1 for t in self._fed]
        return hidden

    def _drop_prompts(self) -> None:
        """Prompts without a row leave; the last one takes the free place."""
        alive = set(self._owner)
        for place in reversed(range(len(self._lengths))):
            if place in alive:
                continue
            last = len(self._lengths) - 1
            if place != last:
                for pair in self._prompt:
                    for x in pair:
                        x[place, :, : self._lengths[last]] = x[last, :, : self._lengths[last]]
                self._lengths[place] = self._lengths[last]
                self._owner = [place if g == last else g for g in self._owner]
                alive = set(self._owner)
            self._lengths.pop()

    def _arrange(self) -> None:
        """Which rows belong to each prompt, padded to the largest group. What the layers need of it is made later."""
        groups: list[list[int]] = [[] for _ in self._lengths]
        for row, g in enumerate(self._owner):
            groups[g].append(row)
        self._groups = groups
        self._arranged: dict[tuple[int, torch.dtype], _Arrangement] = {}

    def arranged(self, heads: int, dtype: torch.dtype) -> _Arrangement:
        """Of the rows as they are now, for layers with so many heads of keys."""
        if (heads, dtype) not in self._arranged:
            arrangement = _Arrangement.of(self._groups, self._lengths, heads, dtype, self.policy.device)
            self._arranged[heads, dtype] = arrangement
        return self._arranged[heads, dtype]

    def slot(self, index: int, key: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((keys, values) of the prompts, (keys, values) of the rows), made when the first token comes through."""
        heads, width = key.shape[1], key.shape[-1]
        if index == len(self._own):
            prompt = (self._most_prompts, heads, self._longest, width)
            own = (self._most, heads, min(_FIRST_STEPS, self._steps), width)
            # zeros: a place that is not filled yet has weight 0, and 0 times what memory happens to hold may be NaN
            self._prompt.append((key.new_zeros(prompt), key.new_zeros(prompt)))
            self._own.append((key.new_zeros(own), key.new_zeros(own)))
        return self._prompt[index], self._own[index]

    def make_room(self, reach: int) -> int:
        """Let rows hold so many tokens; returns how many they can, which is at most twice that.

        A step computes all places, filled or not: products of whole tensors need no copy.
        """
        have = self._own[0][0].shape[2]
        if reach > have:
            have = min(2 * have, self._steps)
            for index, pair in enumerate(self._own):
                grown = tuple(torch.nn.functional.pad(x, (0, 0, 0, have - x.shape[2])) for x in pair)
                self._own[index] = (grown[0], grown[1])
        return have

    def prompt_views(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G * H_kv, P, D] of the prompts that are there."""
        keys, values = self._prompt[index]
        count, reach = len(self._lengths), max(self._lengths)
        return keys[:count].flatten(0, 1)[:, :reach], values[:count].flatten(0, 1)[:, :reach]


class _Encoding:
    """The plan of `add`: each prompt attends to itself, and its keys and values are stored."""

    def __init__(self, cache: SharedCache, tree: PrefixTree, first: int) -> None:
        self.cache, self.tree, self.first = cache, tree, first
        self.own = TreeAttention(tree)
        self.calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (keys, values), _ = self.cache.slot(self.calls, key)
        self.calls += 1
        for i, part in enumerate(self.tree.prompts):
            length = part.stop - part.start
            keys[self.first + i, :, :length] = key[0, :, part]
            values[self.first + i, :, :length] = value[0, :, part]
        return self.own.attend(query, key, value, scale)


@dataclass(frozen=True)
class _Arrangement:
    """From rows to prompts and back. A row has its heads of keys side by side: [N * H_kv, ...]."""

    to_prompts: Tensor  # [G * H_kv * n] places among the rows, n the rows of the largest group
    to_rows: Tensor  # [N * H_kv] places among those
    mask: Tensor | None  # [G * H_kv, 1, P]: -inf where a prompt is padded; None where none is

    @classmethod
    def of(
        cls, groups: list[list[int]], lengths: list[int], heads: int, dtype: torch.dtype, device: torch.device
    ) -> _Arrangement:
        width = max(map(len, groups), default=0)
        members = torch.tensor([rows + [0] * (width - len(rows)) for rows in groups])
        place = {row: (g, i) for g, rows in enumerate(groups) for i, row in enumerate(rows)}
        group, at = torch.tensor([place[row] for row in range(len(place))]).unbind(1)
        head = torch.arange(heads)
        there = members[:, None] * heads + head[:, None]  # [G, H_kv, n]
        back = (group[:, None] * heads + head) * width + at[:, None]  # [N, H_kv]
        beyond = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        mask = _minus_infinity(sent(beyond, device), heads, dtype) if bool(beyond.any()) else None
        return cls(sent(there.flatten(), device), sent(back.flatten(), device), mask)


def _minus_infinity(where: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, K] bool -> [B * heads, 1, K] to be added to scores."""
    mask = torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, -torch.inf)
    return mask.repeat_interleave(heads, 0)[:, None]


class _Step:
    """The plan of `step`: each row sees its prompt, as one product for all rows of it, and what it wrote itself.

    A step has hundreds of these and few numbers in each, so it is the number of operations that counts: scale and mask
    belong to the products.
    """

    def __init__(self, cache: SharedCache, fed: list[int], device: torch.device) -> None:
        self.cache, self.reach = cache, cache.make_room(max(fed) + 1)
        self.rows = torch.arange(len(fed), device=device)
        self.at = sent(fed, device)
        self.later = torch.arange(self.reach, device=device) > self.at[:, None]  # places that are not filled yet
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        index, self._calls = self._calls, self._calls + 1
        _, (keys, values) = self.cache.slot(index, key)
        count, heads, width = len(self.rows), key.shape[1], key.shape[-1]
        keys[self.rows, :, self.at], values[self.rows, :, self.at] = key[:, :, 0], value[:, :, 0]
        own_keys, own_values = (x[:count].flatten(0, 1) for x in (keys, values))
        queries = query.reshape(count * heads, -1, width)  # the heads that share keys side by side
        arrangement = self.cache.arranged(heads, query.dtype)
        prefix = self._to_prompts(queries, index, scale, arrangement)
        own = scaled_product(queries, own_keys.transpose(1, 2), scale, self._mask(heads, query.dtype))
        weights = torch.softmax(torch.cat([prefix, own], -1), -1, dtype=accumulation_dtype(value.dtype)).to(value.dtype)
        reach = prefix.shape[-1]
        out = torch.bmm(weights[..., reach:], own_values)
        return out.add_(self._from_prompts(weights[..., :reach], index, arrangement)).view(query.shape)

    def _mask(self, heads: int, dtype: torch.dtype) -> Tensor:
        """[N * H_kv, 1, T]."""
        if (heads, dtype) not in self._masks:
            self._masks[heads, dtype] = _minus_infinity(self.later, heads, dtype)
        return self._masks[heads, dtype]

    def _to_prompts(self, queries: Tensor, index: int, scale: float, arrangement: _Arrangement) -> Tensor:
        """[N * H_kv, rep, D] -> scores [N * H_kv, rep, P]."""
        keys, _ = self.cache.prompt_views(index)
        by_prompt = queries.index_select(0, arrangement.to_prompts).view(len(keys), -1, queries.shape[-1])
        scores = scaled_product(by_prompt, keys.transpose(1, 2), scale, arrangement.mask)
        return scores.view(-1, queries.shape[1], keys.shape[1]).index_select(0, arrangement.to_rows)

    def _from_prompts(self, weights: Tensor, index: int, arrangement: _Arrangement) -> Tensor:
        """[N * H_kv, rep, P] weights -> what they take from the prompts' values, [N * H_kv, rep, D]."""
        _, values = self.cache.prompt_views(index)
        by_prompt = weights.index_select(0, arrangement.to_prompts).view(len(values), -1, weights.shape[-1])
        products = torch.bmm(by_prompt, values)
        return products.view(-1, weights.shape[1], values.shape[-1]).index_select(0, arrangement.to_rows)
