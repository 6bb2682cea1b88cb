"""The pass that reads prompts: causal stretches, then each question over its prefix and itself.

A question that continues another one looks at what its row has of that, too. In the last layer only
the last tokens look at anything, where no more is wanted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.attention import (
    Asked,
    Hidden,
    attend_causally,
    bias_of,
    hidden_of,
    is_seen,
)
from pipeline.engine.grid import grid_of
from pipeline.engine.kernels import Pair, Part
from pipeline.engine.kv import KVArena, put
from pipeline.engine.step import Decode

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
        self._new = (heads * arena.width + column[:, None]).flatten().to(arena.device)
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


class _Causal:
    """Stretches over themselves, block by block: what follows a block is not computed for it."""

    def __init__(self, stretches: Sequence[Stretch], arena: KVArena) -> None:
        self._stretches = _Stretches(stretches, arena)
        self.keep, self.places = self._stretches.keep, self._stretches.places
        blocks = -(-self._stretches.longest // BLOCK_TOKENS)
        bounds = [n * self._stretches.longest // blocks for n in range(blocks + 1)]
        self._blocks = list(itertools.pairwise(bounds))
        self._biases: dict[int | None, list[torch.Tensor]] = {}

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim], where they see nothing else."""
        if asked.kernels.are_compiled:
            found, places = self.attend_part(asked).flat[0], self.places(asked)
        else:
            found, places = self._attend(asked)
        return found.index_select(0, places).view(-1, *asked.query.shape[::2])

    def _attend(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        """[places, dim], and the place of each token and head."""
        self.keep(asked)
        heads, _, dim = asked.query.shape
        query = self._stretches.grid.spread(asked.query, heads)
        found = attend_causally(asked, query, *self._stretches.kept(asked, self._stretches.longest))
        return found.reshape(-1, dim), self._stretches.grid.places(heads, 1)

    def attend_part(self, asked: Asked) -> Part:
        """[stretches, kv_heads, longest * group, dim]"""
        if asked.window not in self._biases:
            biases = [self._bias(asked, start, stop) for start, stop in self._blocks]
            self._biases[asked.window] = biases
        self.keep(asked)
        keys, values = self._stretches.kept(asked, self._stretches.longest)
        query = self._stretches.grid.spread(asked.query, asked.kv_heads)
        parts = [
            asked.kernels.attend(
                query[:, :, start * asked.group : stop * asked.group],
                (keys[:, :, :stop], values[:, :, :stop]),
                bias,
                scale=asked.scale,
            )
            for (start, stop), bias in zip(self._blocks, self._biases[asked.window], strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return Part(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))

    def _bias(self, asked: Asked, start: int, stop: int) -> torch.Tensor:
        """[1, 1, (stop - start) * group, stop]: causal, and within the window."""
        places = torch.arange(stop, device=asked.query.device)
        seen = is_seen(places[start:, None] - places[None, :], asked.window)
        return bias_of(seen.repeat_interleave(asked.group, 0)[None, None], asked.query.dtype)


class _Continuing:
    """Questions over what their rows keep and over themselves."""

    def __init__(self, questions: Sequence[Stretch], rows: KVArena) -> None:
        self._stretches = _Stretches(questions, rows)
        self.keep, self.places = self._stretches.keep, self._stretches.places
        self._kept = torch.tensor([question.kept for question in questions], device=rows.device)
        self._longest = max(question.kept + len(question) for question in questions)
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend_part(self, asked: Asked) -> Part:
        """[questions, kv_heads, longest * group, dim]"""
        if asked.window not in self._biases:
            self._biases[asked.window] = self._bias(asked)
        self.keep(asked)
        pair = self._stretches.kept(asked, self._longest)
        query = self._stretches.grid.spread(asked.query, asked.kv_heads)
        return asked.kernels.attend(query, pair, self._biases[asked.window], scale=asked.scale)

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
        self._grid = grid_of(groups, tokens=tokens, device=device)
        self._slots, self._arena = _selector([each.slot for each in looking], device), slots
        self._tokens = torch.tensor([each.prefix_tokens for each in looking], device=device)
        self._longest_prefix = max(1, *(each.prefix_tokens for each in looking))
        within = torch.cat([torch.arange(q.kept, q.kept + len(q)) for q in questions]).to(device)
        self._within = within[self._grid.table - tokens.start]
        self._hidden: dict[int | None, Hidden] = {}

    def keep(self, asked: Asked) -> None:
        for each in self._own:
            each.keep(asked)

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim]"""
        if asked.window not in self._hidden:
            self._hidden[asked.window] = self._hides(asked)
        hidden = self._hidden[asked.window]
        own, at_own = _flat([(each.attend_part(asked), each.places(asked)) for each in self._own])
        keys, values = (
            kept[self._slots, :, : self._longest_prefix] for kept in self._arena.layers[asked.layer]
        )
        query = self._grid.spread(asked.query, asked.kv_heads)
        prefix = asked.kernels.attend(query, (keys, values), hidden.bias, scale=asked.scale)
        at_prefix = self._grid.places(asked.kv_heads, asked.group)
        found = asked.kernels.join(prefix, at_prefix, own, at_own, blind=hidden.blind)
        return found.view(-1, *asked.query.shape[::2])

    def _hides(self, asked: Asked) -> Hidden:
        columns = torch.arange(self._longest_prefix, device=asked.query.device)
        seen = (columns < self._tokens[:, None])[:, None]
        if asked.window is not None:
            looking = self._tokens[:, None] + self._within
            seen = seen & (looking[:, :, None] - columns < asked.window)
        return hidden_of(seen, asked, self._grid)


def _flat(parts: Sequence[tuple[Part, torch.Tensor]]) -> tuple[Part, torch.Tensor]:
    """Of other queries each, and where these are in it."""
    if len(parts) == 1:
        return parts[0]
    flat, start, places = [], 0, []
    for part, at in parts:
        flat.append(part.flat)
        places.append(at + start)
        start += part.lse.numel()
    outs, sums = zip(*flat, strict=True)
    return Part(torch.cat(outs), torch.cat(sums)), torch.cat(places)


def _selector(places: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """A slice where they follow each other: what it takes is a view."""
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(places, device=device)
