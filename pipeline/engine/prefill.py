"""The pass that reads prompts: prefixes (causal), then each question over its prefix and itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engine.attention import (
    Asked,
    Bias,
    Pair,
    attend_causally,
    attend_part,
    bias_of,
    is_seen,
    joined,
)
from pipeline.engine.grid import grid_of, over_grid
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
