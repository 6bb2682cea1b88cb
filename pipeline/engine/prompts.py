"""Reading prompts: prefixes into slots, questions into rows, all in one flat sequence.

Of a question that continues another one, what follows the keys that its row has already.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engine.language import Language
from pipeline.engine.live import NOWHERE, Job, Live, Row
from pipeline.engine.prefill import Ends, Looking, Prefill, Stretch
from pipeline.engine.stepper import step_of_ends
from pipeline.engine.transfer import sent


@dataclass(frozen=True)
class Filling:
    """Rows of a job that are to be read, its prefix with them if that is in no slot yet.

    `features`: [tokens, hidden] in place of the prefix's image tokens; null where it is there.
    """

    job: Job
    rows: Sequence[Row]
    features: torch.Tensor | None = None


Taken = Sequence[tuple[Filling, bool]]
"""What has places, and whether its prefix is to be read with it."""


@contextlib.contextmanager
def taken_in(fillings: Sequence[Filling], live: Live) -> Iterator[Taken]:
    """Give the rows their places; where the device fails meanwhile, none of them keeps one that it
    has not had."""
    taken: list[tuple[Filling, bool]] = []
    try:
        for filling in fillings:
            taken.append((filling, filling.job.slot == NOWHERE))
            live.take_in(filling.job, filling.rows)
        yield taken
    except (RuntimeError, MemoryError):
        for filling, is_new in reversed(taken):
            live.put_back(filling.job, filling.rows, with_prefix=is_new)
        raise
    for filling in fillings:
        for row in filling.rows:
            row.kept = None


@dataclass(frozen=True)
class Read:
    """Hidden states in the order of the rows: of the last token of each that is asked; of the last
    tokens of each that is scored (`scores_of`)."""

    asked: torch.Tensor
    scored: torch.Tensor


def read_prompts(taken: Taken, live: Live, language: Language, *, image_token_id: int) -> Read:
    """Raises what the device raises."""
    flat = _Flat(image_token_id)
    new = [filling for filling, is_new in taken if is_new]
    prefixes = [flat.prefix(filling) for filling in new if filling.job.slot != NOWHERE]
    wholes = [flat.whole(filling) for filling in new if filling.job.slot == NOWHERE]
    looking = flat.looking([filling for filling, _ in taken if filling.job.slot != NOWHERE])
    rows = [row for filling, _ in taken for row in filling.rows]
    asked = [flat.end_of[row] - 1 for row in rows if not row.branch.scored]
    scored = [n for row in rows for n in _scored(row, flat.end_of[row])]
    asked_places, scored_places = (
        sent(torch.tensor(each, dtype=torch.long), language.device) for each in (asked, scored)
    )
    is_cut = not scored and language.can_want(len(asked))
    step = step_of_ends(live, rows) if is_cut else None
    ends = Ends(asked_places, step) if step else None
    what = Prefill(prefixes, wholes, looking, slots=live.prefixes, rows=live.branches, ends=ends)
    hidden = language.run(what, flat.embeds(language), flat.positions(language))
    if ends:
        return Read(hidden, hidden[:0])
    return Read(hidden[asked_places], hidden[scored_places])


def _scored(row: Row, end: int) -> range:
    scored = row.branch.scored
    return range(end - 1 - scored, end) if scored else range(0)


class _Flat:
    """The sequence in the making, on the host. `end_of`: where the rows' questions end."""

    def __init__(self, image_token_id: int) -> None:
        self._image_token_id = image_token_id
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._features: list[torch.Tensor] = []
        self._image_tokens: list[int] = []
        """Their places, in the order of the features."""
        self.end_of: dict[Row, int] = {}

    def prefix(self, filling: Filling) -> Stretch:
        return Stretch(self._prefix(filling), len(self._ids), filling.job.slot)

    def whole(self, filling: Filling) -> Stretch:
        (row,) = filling.rows
        return Stretch(self._prefix(filling), self._question(row).stop, row.index)

    def looking(self, fillings: Sequence[Filling]) -> list[Looking]:
        """Those that continue another one come last."""
        rows = [row for filling in fillings for row in filling.rows]
        rows.sort(key=lambda row: bool(row.kept))
        questions = {row: self._question(row) for row in rows}
        return [
            Looking(each.job.slot, each.job.prefix_tokens, [questions[row] for row in each.rows])
            for each in fillings
        ]

    def embeds(self, language: Language) -> torch.Tensor:
        """[tokens, hidden], features in place of image tokens."""
        embeds = language.embedded(sent(torch.tensor(self._ids), language.device))
        if self._features:
            places = sent(torch.tensor(self._image_tokens), language.device)
            embeds.index_copy_(0, places, torch.cat(self._features).to(embeds.dtype))
        return embeds

    def positions(self, language: Language) -> torch.Tensor:
        """[tokens], of each in its own prompt."""
        return sent(torch.tensor(self._positions), language.device)

    def _question(self, row: Row) -> Stretch:
        kept = row.kept or 0
        start = self._add(row.unread, first=row.job.prefix_tokens + kept)
        self.end_of[row] = len(self._ids)
        return Stretch(start, len(self._ids), row.index, kept)

    def _prefix(self, filling: Filling) -> int:
        """Where it starts."""
        ids = filling.job.request.prefix.token_ids
        start = self._add(ids, first=0)
        if filling.features is not None:
            self._features.append(filling.features)
            places = np.flatnonzero(np.array(ids) == self._image_token_id)
            self._image_tokens += (places + start).tolist()
        return start

    def _add(self, ids: Sequence[int], *, first: int) -> int:
        start = len(self._ids)
        self._ids += ids
        self._positions += range(first, first + len(ids))
        return start
