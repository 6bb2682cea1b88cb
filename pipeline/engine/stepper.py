"""One more token for each row: what a step is told, its pass, and the text model that does it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pipeline.engine.grid import Grid, tables_of
from pipeline.engine.language import Language
from pipeline.engine.live import NOWHERE, Live, Row
from pipeline.engine.outline import Numbers, Outline, flat_of, numbers_of, rounded_up
from pipeline.engine.replays import CudaGraphs, Replays
from pipeline.engine.shared import Shared
from pipeline.engine.step import Decode
from pipeline.engine.transfer import sent


class Stepper:
    """`compiled`: on a GPU, steps are recorded and done again."""

    def __init__(self, language: Language, *, compiled: bool) -> None:
        self._language = language
        self.replays: Replays | None = None
        if compiled and language.device.type == "cuda":
            self.replays = Replays(CudaGraphs())

    def run(self, live: Live, rows: Sequence[Row]) -> torch.Tensor:
        """[rows, hidden] of neighbouring rows, good until the next step. Raises what the device
        raises."""
        first = rows[0].index
        outline, numbers = _told(live, rows, [row.own_tokens + 1 for row in rows])
        # What is added are places behind these rows.
        are_all = len(rows) == len(live.rows)
        if self.replays is None or not are_all:
            most_rows = live.branches.capacity if are_all else len(rows)
            fewest = min(self._language.fewest_rows, most_rows)
            outline = replace(outline, rows=max(outline.rows, fewest))
            flat = sent(flat_of(outline, numbers), live.tokens.device)
            return self._step(live, first, outline, flat)[: len(rows)]
        rounded = rounded_up(outline, most=_most(live))
        step = partial(self._step, live, first, rounded)
        return self.replays.run(live, rounded, step, flat_of(rounded, numbers))[: len(rows)]

    def _step(self, live: Live, first: int, outline: Outline, flat: torch.Tensor) -> torch.Tensor:
        what = _pass(live, first, outline, flat)
        embeds = self._language.embedded(live.tokens[first : first + outline.rows])
        return self._language.run(what, embeds, what.positions)


def step_of_ends(live: Live, rows: Sequence[Row]) -> Decode | None:
    """What the last tokens of their questions look at; null where they are no neighbours."""
    first = rows[0].index
    if [row.index for row in rows] != list(range(first, first + len(rows))):
        return None
    outline, numbers = _told(live, rows, [row.question_tokens for row in rows])
    return _pass(live, first, outline, sent(flat_of(outline, numbers), live.tokens.device))


def _told(
    live: Live, rows: Sequence[Row], own_tokens: Sequence[int]
) -> tuple[Outline, list[np.ndarray]]:
    """A step of neighbouring rows, and its numbers as `flat_of` wants them."""
    outline = Outline(len(rows), max(own_tokens))
    numbers = [np.array(own_tokens), np.array([row.next_position for row in rows])]
    slots = np.array([row.job.slot for row in rows])
    if (slots == NOWHERE).all():
        return outline, numbers
    groups = [np.flatnonzero(slots == slot).tolist() for slot in range(len(live.jobs))]
    table, place_of = tables_of(groups, tokens=range(len(rows)))
    prefix_tokens = [job.prefix_tokens for job in live.jobs]
    numbers += [np.array(prefix_tokens), table, place_of, (slots == NOWHERE).astype(int)]
    longest, abreast = max(1, *prefix_tokens), table.shape[1]
    outline = replace(outline, slots=len(groups), abreast=abreast, longest_prefix=longest)
    return outline, numbers


def _pass(live: Live, first: int, outline: Outline, flat: torch.Tensor) -> Decode:
    """`flat`: the numbers, on the device."""
    numbers = numbers_of(outline, flat)
    return Decode(
        live.branches,
        first_row=first,
        own_tokens=numbers.own_tokens,
        longest_own=outline.longest_own,
        positions=numbers.positions,
        shared=_shared(live, outline, numbers) if outline.slots else None,
    )


def _shared(live: Live, outline: Outline, numbers: Numbers) -> Shared:
    return Shared(
        live.prefixes,
        slots=slice(outline.slots),
        tokens=numbers.prefix_tokens,
        longest=outline.longest_prefix,
        grid=Grid(numbers.table, numbers.place_of),
        behind=(numbers.own_tokens - 1)[numbers.table],
        alone=numbers.is_alone.bool(),
    )


def _most(live: Live) -> Outline:
    """What there are places for."""
    rows, slots = live.branches.capacity, live.prefixes.capacity
    return Outline(rows, live.branches.width, slots, rows, live.prefixes.width)
