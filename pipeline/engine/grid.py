"""Tokens of the flat sequence side by side, for an attention that takes them so."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.engine.transfer import sent


class Grid:
    """Groups of tokens that look at the same keys: [groups, width], padded by any token of
    the group, so that what is not finite stays where it is.

    `table` [groups, width]: numbers of tokens. `place_of` [tokens]: where each token is in that,
    flat.
    """

    def __init__(self, table: torch.Tensor, place_of: torch.Tensor) -> None:
        self.table, self.place_of = table, place_of
        self._rows: dict[int, torch.Tensor] = {}
        """By the number of heads of the keys: which rows [token and head] come where."""
        self._places: dict[tuple[int, int], torch.Tensor] = {}

    def spread(self, tokens: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """From [heads, tokens, dim] to [groups, kv_heads, width * group, dim]; `group`: heads that
        share keys."""
        heads, count, dim = tokens.shape
        groups, width = self.table.shape
        if kv_heads not in self._rows:
            head = torch.arange(kv_heads, device=self.table.device)[:, None]
            self._rows[kv_heads] = (self.table[:, None] * kv_heads + head).flatten()
        rows = tokens.transpose(0, 1).reshape(count * kv_heads, heads // kv_heads * dim)
        found = rows.index_select(0, self._rows[kv_heads])
        return found.view(groups, kv_heads, width * (heads // kv_heads), dim)

    def between(self, start: int, stop: int) -> "Grid":
        """Of each group so many tokens; the places stay those in the whole."""
        return Grid(self.table[:, start:stop], self.place_of)

    def places(self, kv_heads: int, group: int) -> torch.Tensor:
        """[tokens * heads]: where each token and head is in what was spread, flat."""
        if (kv_heads, group) not in self._places:
            width = self.table.shape[1]
            kv_head, one = (torch.arange(n, device=self.table.device) for n in (kv_heads, group))
            sequence = (self.place_of // width)[:, None] * kv_heads + kv_head
            query = sequence * width + (self.place_of % width)[:, None]
            self._places[kv_heads, group] = (query[..., None] * group + one).flatten()
        return self._places[kv_heads, group]


def grid_of(groups: Sequence[Sequence[int]], *, tokens: range, device: torch.device) -> Grid:
    """`groups`: the tokens of each, by number. Of `tokens`, those in no group have any place."""
    table, place_of = tables_of(groups, tokens=tokens)
    return Grid(sent(torch.from_numpy(table), device), sent(torch.from_numpy(place_of), device))


def tables_of(groups: Sequence[Sequence[int]], *, tokens: range) -> tuple[np.ndarray, np.ndarray]:
    """`table` and `place_of` of a Grid, int64."""
    width = max(map(len, groups))
    table = np.empty((len(groups), width), dtype=np.int64)
    place_of = np.zeros(len(tokens), dtype=np.int64)
    for number, group in enumerate(groups):
        table[number] = group[0] if group else tokens.start
        table[number, : len(group)] = group
        place_of[np.asarray(group, dtype=np.int64) - tokens.start] = (
            np.arange(len(group)) + number * width
        )
    return table, place_of
