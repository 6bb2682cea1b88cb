"""Who sees whom, and where keys go: the two passes over the text model.

Prefill   prompts: prefixes (causal), then each question over its prefix and itself
Decode    one token for each row, over the prefix of its slot and its own tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipeline.engine.attention import (
    Asked,
    Bias,
    Pair,
    Part,
    attend_causally,
    attend_part,
    bias_of,
    is_seen,
    joined,
)
from pipeline.engine.kv import KVArena


@dataclass(frozen=True)
class PromptPart:
    """What a prefill adds to one image's slot.

    `prefix`: (start, stop) of its tokens in the flat sequence, null where its keys are there.
    `questions`: (start, stop, row) of each question.
    """

    slot: int
    prefix_tokens: int
    prefix: tuple[int, int] | None
    questions: Sequence[tuple[int, int, int]]


class Prefill:
    """A pass over prompts, an image at a time."""

    def __init__(
        self, parts: Sequence[PromptPart], *, prefixes: KVArena, branches: KVArena
    ) -> None:
        self._prompts = [_Prompt(part, prefixes.device) for part in parts]
        self._prefixes, self._branches = prefixes, branches

    def attend(self, asked: Asked) -> torch.Tensor:
        out = torch.empty_like(asked.query)
        prefixes, branches = self._prefixes.layer(asked.layer), self._branches.layer(asked.layer)
        for prompt in self._prompts:
            prompt.attend(asked, out, prefixes=prefixes, branches=branches)
        return out.transpose(0, 1)


class _Prompt:
    """A PromptPart at work. Its questions are padded by repeating their last token."""

    def __init__(self, part: PromptPart, device: torch.device) -> None:
        self._part = part
        lengths = torch.tensor([stop - start for start, stop, _ in part.questions], device=device)
        starts = torch.tensor([start for start, _, _ in part.questions], device=device)
        self._count, self._longest = len(part.questions), int(lengths.max())
        columns = torch.arange(self._longest, device=device)
        self._is_there = columns[None, :] < lengths[:, None]
        self._places = starts[:, None] + torch.minimum(columns[None, :], lengths[:, None] - 1)
        self._rows = torch.tensor([row for _, _, row in part.questions], device=device)

    def attend(self, asked: Asked, out: torch.Tensor, *, prefixes: Pair, branches: Pair) -> None:
        """Write keys and values, and the attention into `out` [heads, tokens, dim]."""
        slot, prefix = self._part.slot, self._part.prefix
        own = asked.key[:, self._places], asked.value[:, self._places]
        for kept, new in zip(branches, own, strict=True):
            kept[self._rows, :, : self._longest] = new.transpose(0, 1)
        if prefix is not None:
            start, stop = prefix
            for kept, new in zip(prefixes, (asked.key, asked.value), strict=True):
                kept[slot, :, : stop - start] = new[:, start:stop]
            if self._count == 1:
                # A lone question follows its prefix: both are one causal sequence.
                stop = self._part.questions[0][1]
                out[:, start:stop] = attend_causally(asked, start, stop)
                return
            out[:, start:stop] = attend_causally(asked, start, stop)
        tokens = self._part.prefix_tokens
        shared = prefixes[0][slot, :, :tokens], prefixes[1][slot, :, :tokens]
        answer = self._attend_questions(asked, own, shared)
        out[:, self._places[self._is_there]] = answer[self._is_there].transpose(0, 1)

    def _attend_questions(self, asked: Asked, own: Pair, prefix: Pair) -> torch.Tensor:
        """[questions, longest, heads, dim]"""
        heads, _, dim = asked.query.shape
        n, longest, group, kv_heads = self._count, self._longest, asked.group, asked.kv_heads
        # [questions, kv_heads, longest * group, dim]
        query = (
            asked.query[:, self._places]
            .view(kv_heads, group, n, longest, dim)
            .permute(2, 0, 3, 1, 4)
            .reshape(n, kv_heads, longest * group, dim)
        )
        own = own[0].transpose(0, 1), own[1].transpose(0, 1)
        over_own = attend_part(asked, query, own, self._own_bias(asked))
        over_prefix = attend_part(
            asked,
            query.transpose(0, 1).reshape(1, kv_heads, n * longest * group, dim),
            (prefix[0][None], prefix[1][None]),
            self._prefix_bias(asked),
        )
        over_prefix = Part(
            over_prefix.out.reshape(kv_heads, n, longest * group, dim).transpose(0, 1),
            over_prefix.lse.reshape(kv_heads, n, longest * group).transpose(0, 1),
        )
        return (
            joined(over_prefix, over_own)
            .view(n, kv_heads, longest, group, dim)
            .transpose(1, 2)
            .reshape(n, longest, heads, dim)
        )

    def _own_bias(self, asked: Asked) -> Bias:
        """[1, 1, longest * group, longest]: causal, and within the window."""
        places = torch.arange(self._longest, device=asked.query.device)
        seen = is_seen(places[:, None] - places[None, :], asked.window)
        return bias_of(seen.repeat_interleave(asked.group, 0)[None, None], asked.query.dtype)

    def _prefix_bias(self, asked: Asked) -> Bias | None:
        """[1, 1, questions * longest * group, prefix]; null where all of the prefix is seen."""
        tokens = self._part.prefix_tokens
        if asked.window is None or tokens + self._longest <= asked.window:
            return None
        looking = tokens + torch.arange(self._longest, device=asked.query.device)
        looked_at = torch.arange(tokens, device=asked.query.device)
        seen = is_seen(looking[:, None] - looked_at, asked.window)
        seen = seen.repeat_interleave(asked.group, 0).repeat(self._count, 1)
        return bias_of(seen[None, None], asked.query.dtype)


@dataclass(frozen=True)
class Grid:
    """Where rows and slots are not the same, one by one: which rows a slot has.

    `row_of` [slots, most]: its rows, padded by any row. `place_of` [rows]: where a row is in that,
    flat.
    """

    row_of: torch.Tensor
    place_of: torch.Tensor


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
            over_prefix = _over_grid(self.grid, asked, query, prefixes, shared_bias)
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


def _over_grid(grid: Grid, asked: Asked, query: torch.Tensor, prefixes: Pair, bias: Bias) -> Part:
    """The part of the prefixes, for each row: all rows of a slot look at its prefix together."""
    _, kv_heads, group, dim = query.shape
    slots, most = grid.row_of.shape
    together = query[grid.row_of].transpose(1, 2).reshape(slots, kv_heads, most * group, dim)
    part = attend_part(asked, together, prefixes, bias)
    out = part.out.reshape(slots, kv_heads, most, group, dim).transpose(1, 2)
    lse = part.lse.reshape(slots, kv_heads, most, group).transpose(1, 2)
    return Part(
        out.reshape(slots * most, kv_heads, group, dim)[grid.place_of],
        lse.reshape(slots * most, kv_heads, group)[grid.place_of],
    )
