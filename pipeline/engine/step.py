"""The pass of one more token for each row, over the prefix of its slot and its own tokens."""

from dataclasses import dataclass

import torch

from pipeline.engine.attention import (
    Asked,
    Hidden,
    bias_of,
    hidden_of,
    is_seen,
)
from pipeline.engine.grid import Grid
from pipeline.engine.kernels import Pair, Part
from pipeline.engine.kv import KVArena, put
from pipeline.engine.traced import TracedStep


@dataclass(frozen=True)
class Shared:
    """The prefixes in slots that rows look at.

    `tokens` [slots]. `grid`: which rows look at which slot. `alone` [rows]: which look at none;
    null where there is no such row.
    """

    arena: KVArena
    tokens: torch.Tensor
    longest: int
    grid: Grid
    alone: torch.Tensor | None


class Decode:
    """A pass of one token for each of the rows that follow `first_row`.

    `own_tokens` [rows] are the tokens in a row, the new one included, `longest_own` the most of
    them. `shared`: null where no row looks at a slot.
    """

    wanted = None

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
        self._hidden: dict[int | None, Hidden] = {}
        self._biases: dict[int | None, torch.Tensor] = {}
        """Made once for all layers with the same window: of the prefixes, and of the rows' own."""
        kv_heads, width = branches.kv_heads, branches.width
        device = own_tokens.device
        sequences = torch.arange(len(own_tokens) * kv_heads, device=device).view(-1, kv_heads)
        self._new = (sequences * width + own_tokens[:, None] - 1).flatten()
        """Where the new keys go: [rows, kv_heads] of [rows, kv_heads, width], flat."""

    def attend(self, asked: Asked) -> torch.Tensor:
        for kept, new in zip(self._kept(asked), (asked.key, asked.value), strict=True):
            put(kept, self._new, new)
        return self.look(asked)

    def look(self, asked: Asked) -> torch.Tensor:
        """[rows, heads, dim], where the new keys are in their places."""
        heads, rows, dim = asked.query.shape
        if asked.window not in self._biases:
            self._biases[asked.window] = self._bias(asked)
        query = asked.query.transpose(0, 1).reshape(rows, asked.kv_heads, asked.group, dim)
        keys, values = (kept[:, :, : self._longest_own] for kept in self._kept(asked))
        bias = self._biases[asked.window]
        own = asked.kernels.attend(query, (keys, values), bias, scale=asked.scale)
        found = own.out if self._shared is None else self._joined(self._shared, asked, own)
        return found.reshape(rows, heads, dim)

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

    def _joined(self, shared: Shared, asked: Asked, own: Part) -> torch.Tensor:
        """[rows * heads, dim]"""
        if asked.window not in self._hidden:
            self._hidden[asked.window] = self._hides(shared, asked)
        hidden = self._hidden[asked.window]
        keys, values = (
            kept[: len(shared.tokens), :, : shared.longest]
            for kept in shared.arena.layers[asked.layer]
        )
        query = shared.grid.spread(asked.query, asked.kv_heads)
        prefix = asked.kernels.attend(query, (keys, values), hidden.bias, scale=asked.scale)
        at_prefix = shared.grid.places(asked.kv_heads, asked.group)
        at_own = torch.arange(len(at_prefix), device=at_prefix.device)
        return asked.kernels.join(prefix, at_prefix, own, at_own, blind=hidden.blind)

    def _kept(self, asked: Asked) -> Pair:
        """Of the rows, [rows, kv_heads, width, dim]."""
        keys, values = self._branches.layers[asked.layer]
        return keys[self._rows], values[self._rows]

    def _bias(self, asked: Asked) -> torch.Tensor:
        """[rows, 1, 1, own]"""
        columns = torch.arange(self._longest_own, device=self._own_tokens.device)
        seen = is_seen((self._own_tokens - 1)[:, None] - columns[None, :], asked.window)
        return bias_of(seen[:, None, None, :], asked.query.dtype)

    def _hides(self, shared: Shared, asked: Asked) -> Hidden:
        columns = torch.arange(shared.longest, device=shared.tokens.device)
        seen = (columns[None, :] < shared.tokens[:, None])[:, None]
        if asked.window is not None:
            position = shared.tokens[:, None] + self._own_tokens[shared.grid.table] - 1
            seen = seen & (position[:, :, None] - columns < asked.window)
        hidden = hidden_of(seen, asked, shared.grid)
        if shared.alone is None:
            return hidden
        alone = shared.alone.repeat_interleave(asked.query.shape[0])
        return Hidden(hidden.bias, hidden.blind | alone)
