"""A step that torch compiles as a whole, with what is read and written of keys.

Of small steps, starting what computes takes longer than computing: Python between layers, and the
waking of threads. In one graph there is no Python, and what is small stays with one thread.
"""

import contextlib

import torch

from pipeline.engine.attention import Asked, is_seen
from pipeline.engine.kernels import few
from pipeline.engine.kv import KVArena, Shape, put

ROWS, CAPACITY = 61, 67
LONGEST, WIDTH = 251, 257
"""To compile with: no two alike, and such as steps have, since torch decides by them what is shared
among threads."""
SMALL = 2**16
"""Numbers that each thread gets at least: for fewer it is not woken."""


class TracedStep:
    """What `Decode` does for the first rows of an arena, where none looks at a slot.

    All that differs from step to step is a tensor or the length of one.
    """

    wanted = None

    def __init__(
        self, rows: KVArena, *, own_tokens: torch.Tensor, longest_own: int, new: torch.Tensor
    ) -> None:
        self._kept = rows.layers
        self._own_tokens, self._new = own_tokens, new
        self._columns = torch.arange(longest_own, device=rows.device)

    def attend(self, asked: Asked) -> torch.Tensor:
        heads, rows, dim = asked.query.shape
        pair = self._kept[asked.layer]
        for kept, new in zip(pair, (asked.key, asked.value), strict=True):
            put(kept, self._new, new)
        keys, values = (kept[:rows, :, : len(self._columns)] for kept in pair)
        seen = is_seen((self._own_tokens - 1)[:, None] - self._columns, asked.window)
        bias = torch.where(seen, 0.0, float("-inf"))[:, None, None]
        query = asked.query.transpose(0, 1).reshape(rows, asked.kv_heads, asked.group, dim)
        out, *_ = few(query, keys, values, bias, asked.scale)
        return out.reshape(rows, heads, dim)


def example(shape: Shape) -> TracedStep:
    """A step to compile with: [ROWS] rows."""
    rows = KVArena(shape, capacity=CAPACITY, width=WIDTH)
    own_tokens = torch.ones(ROWS, dtype=torch.long, device=shape.device)
    new = torch.arange(ROWS * shape.kv_heads, device=shape.device) * WIDTH
    return TracedStep(rows, own_tokens=own_tokens, longest_own=LONGEST, new=new)


def small_alone() -> contextlib.AbstractContextManager[None]:
    """What is compiled leaves small loops to one thread."""
    found: contextlib.AbstractContextManager[None] = torch._inductor.config.patch(
        {"cpp.min_chunk_size": SMALL}
    )
    return found
