"""The pass of one more token for each row, over the prefix of its slot and its own tokens."""

from dataclasses import dataclass, field

import torch

from pipeline.engine.attention import Asked, Bias, Pair, attend_part, bias_of, is_seen, joined
from pipeline.engine.grid import Grid, over_grid
from pipeline.engine.kv import KVArena


@dataclass(frozen=True)
class Decode:
    """A pass of one token for each of the rows that follow `first_row`.

    `slot_tokens` [slots] and `own_tokens` [rows], the new token included; `longest_prefix` and
    `longest_own` are the largest of them.
    """

    prefixes: KVArena
    branches: KVArena
    first_row: int
    slot_tokens: torch.Tensor
    own_tokens: torch.Tensor
    longest_prefix: int
    longest_own: int
    grid: Grid | None
    _biases: dict[int | None, tuple[Bias, Bias]] = field(default_factory=dict)
    """Made once for all layers with the same window: of the prefixes, and of the rows' own."""

    def attend(self, asked: Asked) -> torch.Tensor:
        heads, rows, dim = asked.query.shape
        own = self._write(asked)
        if asked.window not in self._biases:
            self._biases[asked.window] = self._shared_bias(asked), self._own_bias(asked)
        shared_bias, own_bias = self._biases[asked.window]
        # [rows, kv_heads, group, dim]
        query = asked.query.transpose(0, 1).reshape(rows, asked.kv_heads, asked.group, dim)
        over_own = attend_part(asked, query, own, own_bias)
        keys, values = self.prefixes.layer(asked.layer)
        slots, longest = len(self.slot_tokens), self.longest_prefix
        prefixes = keys[:slots, :, :longest], values[:slots, :, :longest]
        if self.grid is None:
            over_prefix = attend_part(asked, query, prefixes, shared_bias)
        else:
            over_prefix = over_grid(self.grid, asked, query, prefixes, shared_bias)
        return joined(over_prefix, over_own).reshape(rows, heads, dim)

    def _write(self, asked: Asked) -> Pair:
        """Put the new keys and values in their places; gives those of the rows up to there."""
        rows = len(self.own_tokens)
        each = torch.arange(rows, device=self.own_tokens.device)
        keys, values = (kept[self.first_row :][:rows] for kept in self.branches.layer(asked.layer))
        keys[each, :, self.own_tokens - 1] = asked.key.transpose(0, 1)
        values[each, :, self.own_tokens - 1] = asked.value.transpose(0, 1)
        return keys[:, :, : self.longest_own], values[:, :, : self.longest_own]

    def _own_bias(self, asked: Asked) -> Bias:
        """[rows, 1, 1, own]"""
        columns = torch.arange(self.longest_own, device=self.own_tokens.device)
        seen = is_seen((self.own_tokens - 1)[:, None] - columns[None, :], asked.window)
        return bias_of(seen[:, None, None, :], asked.query.dtype)

    def _shared_bias(self, asked: Asked) -> Bias:
        """[slots, 1, 1, prefix]; with a window [slots, 1, most * group, prefix]"""
        columns = torch.arange(self.longest_prefix, device=self.slot_tokens.device)
        seen = (columns[None, :] < self.slot_tokens[:, None])[:, None]
        if asked.window is not None:
            own = self.own_tokens[:, None]
            if self.grid is not None:
                own = self.own_tokens[self.grid.row_of]
            position = self.slot_tokens[:, None] + own - 1
            seen = seen & (position[:, :, None] - columns < asked.window)
            seen = seen.repeat_interleave(asked.group, 1)
        return bias_of(seen[:, None], asked.query.dtype)
