"""Who sees whom, and where keys go: the two passes over the text model.

Prefill   prompts: prefixes (causal), then each question over its prefix and itself
Decode    one token for each row, over the prefix of its slot and its own tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
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
    """A pass over prompts.

    A lone question follows its prefix: both are one causal stretch. Other questions look at their
    prefix through its slot. What is shorter than its neighbours is padded by its last token.
    """

    def __init__(
        self, parts: Sequence[PromptPart], *, prefixes: KVArena, branches: KVArena
    ) -> None:
        device = prefixes.device
        self._prefixes, self._branches = prefixes, branches
        new = [part for part in parts if part.prefix is not None]
        self._slots = torch.tensor([part.slot for part in new], device=device)
        self._written = _Stretches([part.prefix for part in new if part.prefix], device)
        self._causal = _Stretches([_causal_stretch(part) for part in new], device)
        questions = [question for part in parts for question in part.questions]
        self._rows = torch.tensor([row for _, _, row in questions], device=device)
        self._questions = _Stretches([(start, stop) for start, stop, _ in questions], device)
        looking = [part for part in parts if not _is_one_stretch(part)]
        self._looking = _Looking(looking, device) if looking else None

    def attend(self, asked: Asked) -> torch.Tensor:
        out = torch.empty_like(asked.query)
        prefixes, branches = self._prefixes.layer(asked.layer), self._branches.layer(asked.layer)
        for new, prefix, branch in zip((asked.key, asked.value), prefixes, branches, strict=True):
            if self._written.count:
                prefix[self._slots, :, : self._written.longest] = self._written.of(new)
            branch[self._rows, :, : self._questions.longest] = self._questions.of(new)
        if self._causal.count:
            stretches = (self._causal.of(each) for each in (asked.query, asked.key, asked.value))
            self._causal.put(out, attend_causally(asked, *stretches))
        if self._looking:
            self._looking.attend(asked, out, prefixes)
        return out.transpose(0, 1)


def _is_one_stretch(part: PromptPart) -> bool:
    return part.prefix is not None and len(part.questions) == 1


def _causal_stretch(part: PromptPart) -> tuple[int, int]:
    assert part.prefix is not None
    start, stop = part.prefix
    return (start, part.questions[0][1]) if _is_one_stretch(part) else (start, stop)


class _Stretches:
    """Stretches of the flat sequence, (start, stop) each, side by side."""

    def __init__(self, stretches: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.count = len(stretches)
        self.longest = max((stop - start for start, stop in stretches), default=0)
        starts, stops = (
            torch.tensor([pair[n] for pair in stretches], device=device) for n in (0, 1)
        )
        columns = torch.arange(self.longest, device=device)
        places = starts[:, None] + columns
        self._there = places < stops[:, None]
        self._places = torch.minimum(places, stops[:, None] - 1)
        self._flat = self._places[self._there]

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """From [heads, tokens, dim] to [count, heads, longest, dim]."""
        return tokens[:, self._places].transpose(0, 1)

    def put(self, out: torch.Tensor, found: torch.Tensor) -> None:
        """The reverse, into `out`."""
        out[:, self._flat] = found.transpose(0, 1)[:, self._there]


class _Looking:
    """Questions that look at a prefix through its slot, those of one slot together."""

    def __init__(self, parts: Sequence[PromptPart], device: torch.device) -> None:
        self._slots = torch.tensor([part.slot for part in parts], device=device)
        self._tokens = torch.tensor([part.prefix_tokens for part in parts], device=device)
        self._longest_prefix = max(part.prefix_tokens for part in parts)
        pairs = [(start, stop) for part in parts for start, stop, _ in part.questions]
        self._questions = _Stretches(pairs, device)
        counts = [len(part.questions) for part in parts]
        self._grid = grid_of(np.repeat(np.arange(len(parts)), counts), len(parts), device)
        self._biases: dict[int | None, tuple[Bias | None, Bias]] = {}

    def attend(self, asked: Asked, out: torch.Tensor, prefixes: Pair) -> None:
        heads, _, dim = asked.query.shape
        n, longest, group, kv_heads = (
            self._questions.count,
            self._questions.longest,
            asked.group,
            asked.kv_heads,
        )
        if asked.window not in self._biases:
            self._biases[asked.window] = self._prefix_bias(asked), self._own_bias(asked)
        prefix_bias, own_bias = self._biases[asked.window]
        # [questions, kv_heads, longest * group, dim]
        query = (
            self._questions.of(asked.query)
            .reshape(n, kv_heads, group, longest, dim)
            .transpose(2, 3)
            .reshape(n, kv_heads, longest * group, dim)
        )
        own = self._questions.of(asked.key), self._questions.of(asked.value)
        over_own = attend_part(asked, query, own, own_bias)
        keys, values = (kept[self._slots, :, : self._longest_prefix] for kept in prefixes)
        over_prefix = over_grid(self._grid, asked, query, (keys, values), prefix_bias)
        found = (
            joined(over_prefix, over_own)
            .view(n, kv_heads, longest, group, dim)
            .transpose(2, 3)
            .reshape(n, heads, longest, dim)
        )
        self._questions.put(out, found)

    def _own_bias(self, asked: Asked) -> Bias:
        """[1, 1, longest * group, longest]: causal, and within the window."""
        places = torch.arange(self._questions.longest, device=asked.query.device)
        seen = is_seen(places[:, None] - places[None, :], asked.window)
        return bias_of(seen.repeat_interleave(asked.group, 0)[None, None], asked.query.dtype)

    def _prefix_bias(self, asked: Asked) -> Bias | None:
        """[slots, 1, 1, prefix], with a window [slots, 1, most * longest * group, prefix]; null
        where all of all prefixes is seen."""
        longest = self._questions.longest
        columns = torch.arange(self._longest_prefix, device=asked.query.device)
        seen = (columns < self._tokens[:, None])[:, None]
        if asked.window is not None:
            looking = self._tokens[:, None] + torch.arange(longest, device=asked.query.device)
            within = looking[:, :, None] - columns < asked.window
            most = self._grid.row_of.shape[1]
            seen = (seen & within).repeat_interleave(asked.group, 1).repeat(1, most, 1)
        return None if bool(seen.all()) else bias_of(seen[:, None], asked.query.dtype)


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
