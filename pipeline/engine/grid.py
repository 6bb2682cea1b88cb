"""Rows by the slot whose prefix they look at: all of one slot look at it together."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engine.attention import Asked, Bias, Pair, Part, attend_part


@dataclass(frozen=True)
class Grid:
    """Where rows and slots are not the same, one by one: which rows a slot has.

    `row_of` [slots, most]: its rows, padded by any row. `place_of` [rows]: where a row is in that,
    flat.
    """

    row_of: torch.Tensor
    place_of: torch.Tensor


def grid_of(slots: np.ndarray, count: int, device: torch.device) -> Grid:
    """`slots`: of each row; there are `count`."""
    counts = np.bincount(slots, minlength=count)
    order = np.argsort(slots, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    within = np.empty(len(slots), dtype=np.int64)
    within[order] = np.arange(len(slots)) - np.repeat(starts, counts)
    row_of = np.zeros((count, int(counts.max())), dtype=np.int64)
    row_of[slots, within] = np.arange(len(slots))
    place_of = slots * row_of.shape[1] + within
    return Grid(torch.from_numpy(row_of).to(device), torch.from_numpy(place_of).to(device))


def over_grid(
    grid: Grid, asked: Asked, query: torch.Tensor, prefixes: Pair, bias: Bias | None
) -> Part:
    """The part of the prefixes, for each row: all rows of a slot look at its prefix together.

    `query` [rows, kv_heads, queries, dim]
    """
    _, kv_heads, queries, dim = query.shape
    slots, most = grid.row_of.shape
    together = query[grid.row_of].transpose(1, 2).reshape(slots, kv_heads, most * queries, dim)
    part = attend_part(asked, together, prefixes, bias)
    out = part.out.reshape(slots, kv_heads, most, queries, dim).transpose(1, 2)
    lse = part.lse.reshape(slots, kv_heads, most, queries).transpose(1, 2)
    return Part(
        out.reshape(slots * most, kv_heads, queries, dim)[grid.place_of],
        lse.reshape(slots * most, kv_heads, queries)[grid.place_of],
    )
