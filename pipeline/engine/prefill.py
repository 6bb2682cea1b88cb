"""The pass that reads prompts: causal stretches, then each question over its prefix and itself.

A question that continues another one looks at what its row has of that, too. In the last layer only
the last tokens look at anything, where no more is wanted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.attention import Asked, attend_causally, bias_of, is_seen
from pipeline.engine.grid import Grid, grid_of
from pipeline.engine.kernels import Pair, Part
from pipeline.engine.kv import KVArena, put, rounded
from pipeline.engine.shared import Shared
from pipeline.engine.step import Decode
from pipeline.engine.transfer import sent

Placed = tuple[Part, torch.Tensor]
"""And where each token and head [tokens * heads] is in it, flat."""

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


@dataclass(frozen=True)
class Ends:
    """The last tokens [wanted] of prompts, and what looks at their rows, as a step does."""

    tokens: torch.Tensor
    step: Decode


class Prefill:
    """A pass over prompts.

    The flat sequence has `prefixes`, whose keys go into slots, then `wholes`, prompts whose keys go
    into rows, then the questions of `looking`, in these orders and without gaps; but of the
    questions, those come last whose rows keep something. `ends`: null where more is wanted.
    """

    def __init__(  # noqa: PLR0913 (what there is to read by its kind)
        self,
        prefixes: Sequence[Stretch],
        wholes: Sequence[Stretch],
        looking: Sequence[Looking],
        *,
        slots: KVArena,
        rows: KVArena,
        ends: Ends | None = None,
    ) -> None:
        self._ends, self._last_layer = ends, len(rows.layers) - 1
        self._parts: list[_Causal | _Looking] = [
            _Causal(stretches, arena)
            for stretches, arena in ((prefixes, slots), (wholes, rows))
            if any(map(len, stretches))
        ]
        if looking:
            self._parts.append(_Looking(looking, slots, rows))

    @property
    def wanted(self) -> torch.Tensor | None:
        return None if self._ends is None else self._ends.tokens

    def attend(self, asked: Asked) -> torch.Tensor:
        if self._ends is not None and asked.layer == self._last_layer:
            for part in self._parts:
                part.keep(asked)
            return self._ends.step.look(asked)
        found = [part.attend(asked) for part in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found)


class _Stretches:
    """Stretches side by side. What is shorter than the longest is padded by a token of its own."""

    def __init__(self, stretches: Sequence[Stretch], arena: KVArena) -> None:
        self.longest = max(map(len, stretches))
        self.width = arena.width
        self._arena = arena
        self._tokens = slice(stretches[0].start, stretches[-1].stop)
        self.grid = grid_of(
            [range(stretch.start, stretch.stop) for stretch in stretches],
            tokens=range(self._tokens.start, self._tokens.stop),
            device=arena.device,
        )
        self._sequences = _selector([stretch.place for stretch in stretches], arena.device)
        column = torch.cat([torch.arange(each.kept, each.kept + len(each)) for each in stretches])
        lengths = torch.tensor([len(each) for each in stretches])
        sequence = torch.tensor([each.place for each in stretches]).repeat_interleave(lengths)
        heads = sequence[:, None] * arena.kv_heads + torch.arange(arena.kv_heads)
        self._new = sent((heads * arena.width + column[:, None]).flatten(), arena.device)
        """Where the new keys go: [tokens, kv_heads] of [sequences, kv_heads, width], flat."""

    def keep(self, asked: Asked) -> None:
        """Put keys and values in their places."""
        kept = self._arena.layers[asked.layer]
        for each, new in zip(kept, (asked.key, asked.value), strict=True):
            put(each, self._new, new[:, self._tokens])

    def kept(self, asked: Asked, tokens: int) -> Pair:
        """The first ones [stretches, kv_heads, tokens, dim]."""
        keys, values = self._arena.layers[asked.layer]
        # Where they follow each other, matrix products take these as they are, without a copy.
        return keys[self._sequences, :, :tokens], values[self._sequences, :, :tokens]

    def places(self, asked: Asked) -> torch.Tensor:
        return self.grid.places(asked.kv_heads, asked.group)


class _Block:
    """Tokens `start` to `stop` of each stretch, over the first `columns` of its keys.

    These are more than the tokens see: where they are all the width that there is, matrix products
    take them as they are, without a copy.
    """

    def __init__(self, start: int, stop: int, columns: int, grid: Grid) -> None:
        self._start, self._stop = start, stop
        self.columns, self.grid = columns, grid
        self._biases: dict[int | None, torch.Tensor] = {}

    def bias(self, asked: Asked) -> torch.Tensor:
        """[1, 1, tokens * group, columns]: causal, and within the window."""
        if asked.window not in self._biases:
            places = torch.arange(max(self._stop, self.columns), device=asked.query.device)
            distance = places[self._start : self._stop, None] - places[: self.columns]
            seen = is_seen(distance, asked.window).repeat_interleave(asked.group, 0)
            self._biases[asked.window] = bias_of(seen[None, None], asked.query.dtype)
        return self._biases[asked.window]


class _Causal:
    """Stretches over themselves, block by block: what follows a block is not computed for it."""

    def __init__(self, stretches: Sequence[Stretch], arena: KVArena) -> None:
        self._stretches = _Stretches(stretches, arena)
        self.keep = self._stretches.keep
        blocks = -(-self._stretches.longest // BLOCK_TOKENS)
        bounds = [n * self._stretches.longest // blocks for n in range(blocks + 1)]
        self._blocks = [self._block(*each) for each in itertools.pairwise(bounds)]

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim], where they see nothing else."""
        if asked.kernels.are_compiled or asked.kernels.flash is not None:
            flat = asked.kernels.taken(*self.attend_part(asked))
        else:
            query, keys, places = self._by_heads(asked)
            found = attend_causally(asked, query, *keys).reshape(-1, query.shape[-1])
            flat = found.index_select(0, places)
        return flat.view(-1, *asked.query.shape[::2])

    def attend_part(self, asked: Asked) -> Placed:
        if asked.kernels.flash is None:
            return self._by_blocks(asked), self._stretches.places(asked)
        query, keys, places = self._by_heads(asked)
        window = asked.window
        return asked.kernels.flash.attend_causally(query, keys, asked.scale, window=window), places

    def _by_heads(self, asked: Asked) -> tuple[torch.Tensor, Pair, torch.Tensor]:
        """The query [stretches, heads, longest, dim], keys and values with kv_heads, and the place
        of each token and head in the query."""
        self.keep(asked)
        grid, heads = self._stretches.grid, asked.query.shape[0]
        keys = self._stretches.kept(asked, self._stretches.longest)
        return grid.spread(asked.query, heads), keys, grid.places(heads, 1)

    def _by_blocks(self, asked: Asked) -> Part:
        """[stretches, kv_heads, longest * group, dim]"""
        self.keep(asked)
        parts = [
            asked.kernels.attend(
                block.grid.spread(asked.query, asked.kv_heads),
                self._stretches.kept(asked, block.columns),
                block.bias(asked),
                scale=asked.scale,
            )
            for block in self._blocks
        ]
        if len(parts) == 1:
            return parts[0]
        sums = zip(*((part.out, part.highest, part.total) for part in parts), strict=True)
        return Part(*(torch.cat(each, 2) for each in sums))

    def _block(self, start: int, stop: int) -> "_Block":
        columns = min(rounded(stop), self._stretches.width)
        return _Block(start, stop, columns, self._stretches.grid.between(start, stop))


class _Continuing:
    """Questions over what their rows keep and over themselves."""

    def __init__(self, questions: Sequence[Stretch], rows: KVArena) -> None:
        self._stretches = _Stretches(questions, rows)
        self.keep = self._stretches.keep
        self._kept = sent(torch.tensor([question.kept for question in questions]), rows.device)
        self._longest = max(question.kept + len(question) for question in questions)
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend_part(self, asked: Asked) -> Placed:
        """[questions, kv_heads, longest * group, dim]"""
        if asked.window not in self._biases:
            self._biases[asked.window] = self._bias(asked)
        self.keep(asked)
        pair = self._stretches.kept(asked, self._longest)
        query = self._stretches.grid.spread(asked.query, asked.kv_heads)
        part = asked.kernels.attend(query, pair, self._biases[asked.window], scale=asked.scale)
        return part, self._stretches.places(asked)

    def _bias(self, asked: Asked) -> torch.Tensor:
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
        grid = grid_of(groups, tokens=tokens, device=device)
        behind = torch.cat([torch.arange(q.kept, q.kept + len(q)) for q in questions])
        self._shared = Shared(
            slots,
            slots=_selector([each.slot for each in looking], device),
            tokens=sent(torch.tensor([each.prefix_tokens for each in looking]), device),
            longest=max(each.prefix_tokens for each in looking),
            grid=grid,
            behind=sent(behind, device)[grid.table - tokens.start],
        )

    def keep(self, asked: Asked) -> None:
        for each in self._own:
            each.keep(asked)

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim]"""
        own, at_own = _flat([each.attend_part(asked) for each in self._own])
        return self._shared.joined(asked, own, at_own).view(-1, *asked.query.shape[::2])


def _flat(parts: Sequence[Placed]) -> Placed:
    """Of other queries each, and where these are in it."""
    if len(parts) == 1:
        return parts[0]
    flat, start, places = [], 0, []
    for part, at in parts:
        flat.append(part.flat)
        places.append(at + start)
        start += part.total.numel()
    return Part(*map(torch.cat, zip(*flat, strict=True))), torch.cat(places)


def _selector(places: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """A slice where they follow each other: what it takes is a view."""
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return slice(first, first + count)
    return sent(torch.tensor(places), device)
