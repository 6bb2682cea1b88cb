"""The pass of one more token for each row, over the prefix of its slot and its own tokens."""

from dataclasses import dataclass

import torch

from pipeline.engine.attention import (
    Asked,
    Bias,
    attend_part,
    bias_of,
    is_seen,
    joined,
)
from pipeline.engine.grid import Grid
from pipeline.engine.kernels import Pair, Part
from pipeline.engine.kv import KVArena, put
from pipeline.engine.traced import TracedStep


@dataclass(frozen=True)
class Shared:
    """The prefixes in slots that rows look at.

    `tokens` [slots]. `grid`: which rows look at which slot; null where row n looks at slot n.
    `alone` [rows]: which look at none; null where there is no such row.
    """

    arena: KVArena
    tokens: torch.Tensor
    longest: int
    grid: Grid | None
    alone: torch.Tensor | None


class Decode:
    """A pass of one token for each of the rows that follow `first_row`.

    `own_tokens` [rows] are the tokens in a row, the new one included, `longest_own` the most of
    them. `shared`: null where no row looks at a slot.
    """

    def __init__(
        self,
        branches: KVArena,
        *,
        first_row: int,
        own_tokens: torch.Tensor,
        longest_own: int,
        shared: Shared | None,
    ) -> None:
        self._branches = branches
        self._rows = slice(first_row, first_row + len(own_tokens))
        self._own_tokens, self._longest_own = own_tokens, longest_own
        self._shared = shared
        self._biases: dict[int | None, tuple[Bias | None, Bias]] = {}
        """Made once for all layers with the same window: of the prefixes, and of the rows' own."""
        kv_heads, width = branches.kv_heads, branches.width
        device = own_tokens.device
        sequences = torch.arange(len(own_tokens) * kv_heads, device=device).view(-1, kv_heads)
        self._new = (sequences * width + own_tokens[:, None] - 1).flatten()
        """Where the new keys go: [rows, kv_heads] of [rows, kv_heads, width], flat."""

    def attend(self, asked: Asked) -> torch.Tensor:
        heads, rows, dim = asked.query.shape
        own = self._write(asked)
        if asked.window not in self._biases:
            self._biases[asked.window] = self._shared_bias(asked), self._own_bias(asked)
        shared_bias, own_bias = self._biases[asked.window]
        query = asked.query.transpose(0, 1).reshape(rows, asked.kv_heads, asked.group, dim)
        found = attend_part(asked, query, own, own_bias)
        if self._shared is None:
            return found.out.reshape(rows, heads, dim)
        over_prefix = self._over_prefix(self._shared, asked, query, shared_bias)
        return joined(over_prefix, found).reshape(rows, heads, dim)

    def traced(self) -> TracedStep | None:
        """The same as a part of what is compiled; null where it is none, or would be compiled once
        more: for a length of one, and where all of the rows' width is looked at."""
        longest, width = self._longest_own, self._branches.width
        is_alike = len(self._own_tokens) > 1 and 1 < longest < width
        if self._shared is not None or self._rows.start or not is_alike:
            return None
        return TracedStep(
            self._branches, own_tokens=self._own_tokens, longest_own=longest, new=self._new
        )

    def _over_prefix(
        self, shared: Shared, asked: Asked, query: torch.Tensor, bias: Bias | None
    ) -> Part:
        keys, values = (
            kept[: len(shared.tokens), :, : shared.longest]
            for kept in shared.arena.layers[asked.layer]
        )
        if shared.grid is None:
            return attend_part(asked, query, (keys, values), bias)
        query = shared.grid.spread(asked.query, asked.kv_heads)
        part = attend_part(asked, query, (keys, values), bias).each(shared.grid.gather)
        if shared.alone is None:
            return part
        return Part(part.out, part.lse.masked_fill(shared.alone[:, None, None], float("-inf")))

    def _write(self, asked: Asked) -> Pair:
        """Put the new keys and values in their places; gives those of the rows up to there."""
        pair = tuple(kept[self._rows] for kept in self._branches.layers[asked.layer])
        for kept, new in zip(pair, (asked.key, asked.value), strict=True):
            put(kept, self._new, new)
        keys, values = pair
        return keys[:, :, : self._longest_own], values[:, :, : self._longest_own]

    def _own_bias(self, asked: Asked) -> Bias:
        """[rows, 1, 1, own]"""
        columns = torch.arange(self._longest_own, device=self._own_tokens.device)
        seen = is_seen((self._own_tokens - 1)[:, None] - columns[None, :], asked.window)
        return bias_of(seen[:, None, None, :], asked.query.dtype)

    def _shared_bias(self, asked: Asked) -> Bias | None:
        """[slots, 1, 1, prefix]; with a window [slots, 1, width * group, prefix]"""
        if self._shared is None:
            return None
        tokens, grid = self._shared.tokens, self._shared.grid
        columns = torch.arange(self._shared.longest, device=tokens.device)
        seen = (columns[None, :] < tokens[:, None])[:, None]
        if asked.window is not None:
            own = self._own_tokens[:, None] if grid is None else self._own_tokens[grid.table]
            position = tokens[:, None] + own - 1
            seen = seen & (position[:, :, None] - columns < asked.window)
            seen = seen.repeat_interleave(asked.group, 1)
        return bias_of(seen[:, None], asked.query.dtype)
