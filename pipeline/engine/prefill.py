"""The pass that reads prompts: causal stretches, then each question over its prefix and itself.

A question that continues another one looks at what its row has of that, too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.attention import (
    Asked,
    Bias,
    attend_causally,
    attend_part,
    bias_of,
    is_seen,
    joined,
)
from pipeline.engine.grid import grid_of
from pipeline.engine.kernels import Pair, Part
from pipeline.engine.kv import KVArena, put

BLOCK_TOKENS = 128
"""At most, of those that look at the same keys: fewer take longer to set going than they spare."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `start` to `stop` of the flat sequence that are seen causally, and the place in an
    arena where their keys go, behind the `kept` ones that are there."""

    start: int
    stop: int
    place: int
    kept: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Looking:
    """What looks at the prefix of one slot. `questions`: each with its row."""

    slot: int
    prefix_tokens: int
    questions: Sequence[Stretch]


class Prefill:
    """A pass over prompts.

    The flat sequence has `prefixes`, whose keys go into slots, then `wholes`, prompts whose keys go
    into rows, then the questions of `looking`, in these orders and without gaps; but of the
    questions, those come last whose rows keep something.
    """

    def __init__(
        self,
        prefixes: Sequence[Stretch],
        wholes: Sequence[Stretch],
        looking: Sequence[Looking],
        *,
        slots: KVArena,
        rows: KVArena,
    ) -> None:
        self._parts: list[_Causal | _Looking] = [
            _Causal(stretches, arena)
            for stretches, arena in ((prefixes, slots), (wholes, rows))
            if any(map(len, stretches))
        ]
        if looking:
            self._parts.append(_Looking(looking, slots, rows))

    def attend(self, asked: Asked) -> torch.Tensor:
        found = [part.attend(asked) for part in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found)


class _Stretches:
    """Stretches side by side. What is shorter than the longest is padded by a token of its own."""

    def __init__(self, stretches: Sequence[Stretch], arena: KVArena) -> None:
        self.count, self.longest = len(stretches), max(map(len, stretches))
        self._all = slice(stretches[0].start, stretches[-1].stop)
        self._arena = arena
        self.places = _selector([stretch.place for stretch in stretches], arena.device)
        self._grid = None
        if any(len(stretch) < self.longest for stretch in stretches):
            groups = [range(stretch.start, stretch.stop) for stretch in stretches]
            tokens = range(self._all.start, self._all.stop)
            self._grid = grid_of(groups, tokens=tokens, device=arena.device)

    def spread(self, tokens: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """From [heads, tokens, dim] to [count, kv_heads, longest * group, dim]."""
        if self._grid is not None:
            return self._grid.spread(tokens, kv_heads)
        heads, _, dim = tokens.shape
        even = tokens[:, self._all].view(kv_heads, heads // kv_heads, self.count, -1, dim)
        # [count, kv_heads, longest, group, dim]
        return even.permute(2, 0, 3, 1, 4).reshape(self.count, kv_heads, -1, dim)

    def gather(self, found: torch.Tensor) -> torch.Tensor:
        """The reverse: [tokens, kv_heads, group, ...]."""
        if self._grid is not None:
            return self._grid.gather(found)
        count, kv_heads, queries, *rest = found.shape
        even = found.view(count, kv_heads, self.longest, queries // self.longest, *rest)
        return even.transpose(1, 2).reshape(count * self.longest, kv_heads, -1, *rest)

    def keep(self, asked: Asked) -> Pair:
        """Put keys and values in their places; gives them [count, kv_heads, longest, dim]."""
        keys, values = self._arena.layers[asked.layer]
        for kept, new in ((keys, asked.key), (values, asked.value)):
            kept[self.places, :, : self.longest] = self.spread(new, asked.kv_heads)
        # Where they follow each other, matrix products take these as they are, without a copy.
        return keys[self.places, :, : self.longest], values[self.places, :, : self.longest]


class _Causal:
    """Stretches over themselves, block by block: what follows a block is not computed for it."""

    def __init__(self, stretches: Sequence[Stretch], arena: KVArena) -> None:
        self._stretches = _Stretches(stretches, arena)
        blocks = -(-self._stretches.longest // BLOCK_TOKENS)
        bounds = [n * self._stretches.longest // blocks for n in range(blocks + 1)]
        self._blocks = list(itertools.pairwise(bounds))
        self._biases: dict[int | None, list[Bias]] = {}

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim], where they see nothing else."""
        if asked.kernels.are_compiled:
            return self.attend_part(asked).out.flatten(1, 2)
        pair = self._stretches.keep(asked)
        heads = asked.query.shape[0]
        query = self._stretches.spread(asked.query, heads)
        return self._stretches.gather(attend_causally(asked, query, *pair)).squeeze(2)

    def attend_part(self, asked: Asked) -> Part:
        """[tokens, kv_heads, group, dim]"""
        if asked.window not in self._biases:
            biases = [self._bias(asked, start, stop) for start, stop in self._blocks]
            self._biases[asked.window] = biases
        keys, values = self._stretches.keep(asked)
        query = self._stretches.spread(asked.query, asked.kv_heads)
        parts = [
            attend_part(
                asked,
                query[:, :, start * asked.group : stop * asked.group],
                (keys[:, :, :stop], values[:, :, :stop]),
                bias,
            )
            for (start, stop), bias in zip(self._blocks, self._biases[asked.window], strict=True)
        ]
        return _put_together(parts, 2).each(self._stretches.gather)

    def _bias(self, asked: Asked, start: int, stop: int) -> Bias:
        """[1, 1, (stop - start) * group, stop]: causal, and within the window."""
        places = torch.arange(stop, device=asked.query.device)
        seen = is_seen(places[start:, None] - places[None, :], asked.window)
        return bias_of(seen.repeat_interleave(asked.group, 0)[None, None], asked.query.dtype)


class _Continuing:
    """Questions over what their rows keep and over themselves."""

    def __init__(self, questions: Sequence[Stretch], rows: KVArena) -> None:
        self._stretches, self._arena = _Stretches(questions, rows), rows
        self._tokens = slice(questions[0].start, questions[-1].stop)
        kept = torch.tensor([question.kept for question in questions])
        lengths = torch.tensor([len(question) for question in questions])
        places = torch.tensor([question.place for question in questions])
        self._longest = int((kept + lengths).max())
        self._kept = kept.to(rows.device)
        column = torch.cat([torch.arange(q.kept, q.kept + len(q)) for q in questions])
        sequence = places.repeat_interleave(lengths)[:, None] * rows.kv_heads
        sequence = sequence + torch.arange(rows.kv_heads)
        self._new = (sequence * rows.width + column[:, None]).flatten().to(rows.device)
        """Where the new keys go: [tokens, kv_heads] of [rows, kv_heads, width], flat."""
        self._biases: dict[int | None, Bias] = {}

    def attend_part(self, asked: Asked) -> Part:
        """[tokens, kv_heads, group, dim]"""
        if asked.window not in self._biases:
            self._biases[asked.window] = self._bias(asked)
        keys, values = (
            self._written(kept, new)[self._stretches.places, :, : self._longest]
            for kept, new in zip(
                self._arena.layers[asked.layer], (asked.key, asked.value), strict=True
            )
        )
        query = self._stretches.spread(asked.query, asked.kv_heads)
        found = attend_part(asked, query, (keys, values), self._biases[asked.window])
        return found.each(self._stretches.gather)

    def _written(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        put(kept, self._new, new[:, self._tokens])
        return kept

    def _bias(self, asked: Asked) -> Bias:
        """[questions, 1, longest * group, columns]: causal, and within the window."""
        device = asked.query.device
        within = torch.arange(self._stretches.longest, device=device)
        looking = self._kept[:, None] + within
        distance = looking[:, :, None] - torch.arange(self._longest, device=device)
        seen = is_seen(distance, asked.window).repeat_interleave(asked.group, 1)
        return bias_of(seen[:, None], asked.query.dtype)


class _Looking:
    """Questions that look at a prefix through its slot, those of one slot together."""

    def __init__(self, looking: Sequence[Looking], slots: KVArena, rows: KVArena) -> None:
        device = slots.device
        questions = [question for each in looking for question in each.questions]
        questions.sort(key=lambda question: question.start)
        fresh = [question for question in questions if not question.kept]
        continuing = questions[len(fresh) :]
        self._own: list[_Causal | _Continuing] = []
        if fresh:
            self._own.append(_Causal(fresh, rows))
        if continuing:
            self._own.append(_Continuing(continuing, rows))
        groups = [[n for q in each.questions for n in range(q.start, q.stop)] for each in looking]
        tokens = range(questions[0].start, questions[-1].stop)
        self._grid = grid_of(groups, tokens=tokens, device=device)
        self._slots, self._arena = _selector([each.slot for each in looking], device), slots
        self._tokens = torch.tensor([each.prefix_tokens for each in looking], device=device)
        self._longest_prefix = max(1, *(each.prefix_tokens for each in looking))
        within = torch.cat([torch.arange(q.kept, q.kept + len(q)) for q in questions]).to(device)
        self._within = within[self._grid.table - tokens.start]
        self._biases: dict[int | None, Bias | None] = {}

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim]"""
        if asked.window not in self._biases:
            self._biases[asked.window] = self._bias(asked)
        over_own = _put_together([each.attend_part(asked) for each in self._own], 0)
        keys, values = (
            kept[self._slots, :, : self._longest_prefix] for kept in self._arena.layers[asked.layer]
        )
        query = self._grid.spread(asked.query, asked.kv_heads)
        found = attend_part(asked, query, (keys, values), self._biases[asked.window])
        return joined(found.each(self._grid.gather), over_own).flatten(1, 2)

    def _bias(self, asked: Asked) -> Bias | None:
        """[slots, 1, 1, prefix], with a window [slots, 1, width * group, prefix]; null where all of
        all prefixes is seen."""
        columns = torch.arange(self._longest_prefix, device=asked.query.device)
        seen = (columns < self._tokens[:, None])[:, None]
        if asked.window is not None:
            looking = self._tokens[:, None] + self._within
            seen = seen & (looking[:, :, None] - columns < asked.window)
            seen = seen.repeat_interleave(asked.group, 1)
        return None if bool(seen.all()) else bias_of(seen[:, None], asked.query.dtype)


def _put_together(parts: Sequence[Part], dim: int) -> Part:
    """Of other queries each."""
    if len(parts) == 1:
        return parts[0]
    outs, sums = [part.out for part in parts], [part.lse for part in parts]
    return Part(torch.cat(outs, dim), torch.cat(sums, dim))


def _selector(places: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """A slice where they follow each other: what it takes is a view."""
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(places, device=device)
