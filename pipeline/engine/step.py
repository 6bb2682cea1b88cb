"""The pass of one more token for each row, over the prefix of its slot and its own tokens."""

import torch

from pipeline.engine.attention import Asked, bias_of, is_seen
from pipeline.engine.kernels import Pair
from pipeline.engine.kv import KVArena, put
from pipeline.engine.shared import Shared
from pipeline.engine.traced import TracedStep


class Decode:
    """A pass of one token for each of the rows that follow `first_row`.

    `own_tokens` [rows] are the tokens in a row, the new one included, `longest_own` the most of
    them, `positions` [rows] those of the new ones. `shared`: null where no row looks at a slot.
    """

    wanted = None

    def __init__(  # noqa: PLR0913 (by name)
        self,
        branches: KVArena,
        *,
        first_row: int,
        own_tokens: torch.Tensor,
        longest_own: int,
        positions: torch.Tensor,
        shared: Shared | None,
    ) -> None:
        self._branches = branches
        self._rows = slice(first_row, first_row + len(own_tokens))
        self._own_tokens, self._longest_own = own_tokens, longest_own
        self._lengths = own_tokens.int()
        self.positions = positions
        self._shared = shared
        self._biases: dict[int | None, torch.Tensor] = {}
        """Made once for all layers with the same window."""
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
        bias, lengths = self._biases[asked.window], None if asked.window else self._lengths
        own = asked.kernels.attend(query, (keys, values), bias, scale=asked.scale, lengths=lengths)
        if self._shared is None:
            return own.attention.reshape(rows, heads, dim)
        at_own = torch.arange(rows * heads, device=query.device)
        return self._shared.joined(asked, own, at_own).view(rows, heads, dim)

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

    def _kept(self, asked: Asked) -> Pair:
        """Of the rows, [rows, kv_heads, width, dim]."""
        keys, values = self._branches.layers[asked.layer]
        return keys[self._rows], values[self._rows]

    def _bias(self, asked: Asked) -> torch.Tensor:
        """[rows, 1, 1, own]"""
        columns = torch.arange(self._longest_own, device=self._own_tokens.device)
        seen = is_seen((self._own_tokens - 1)[:, None] - columns[None, :], asked.window)
        return bias_of(seen[:, None, None, :], asked.query.dtype)
