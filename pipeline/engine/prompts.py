"""Reading prompts: prefixes into slots, questions into rows, all in one flat sequence."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.language import Language
from pipeline.engine.live import NOWHERE, Job, Live, Row
from pipeline.engine.prefill import Prefill, PromptPart


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
    """Give the rows their places; where the device fails meanwhile, none of them keeps one."""
    taken: list[tuple[Filling, bool]] = []
    try:
        for filling in fillings:
            taken.append((filling, filling.job.slot == NOWHERE))
            live.take_in(filling.job, filling.rows)
        yield taken
    except RuntimeError:
        for filling, is_new in reversed(taken):
            live.put_back(filling.job, filling.rows, with_slot=is_new)
        raise


@dataclass(frozen=True)
class Read:
    """Hidden states in the order of the rows: of the last token of each that is asked; of the last
    tokens of each that is scored (`scores_of`)."""

    asked: torch.Tensor
    scored: torch.Tensor


def read_prompts(taken: Taken, live: Live, language: Language, *, image_token_id: int) -> Read:
    """Raises what the device raises."""
    flat = _Flat(language, image_token_id)
    parts = [flat.add(filling, is_new=is_new) for filling, is_new in taken]
    what = Prefill(parts, prefixes=live.prefixes, branches=live.branches)
    hidden = language.run(what, torch.cat(flat.embeds), torch.cat(flat.positions))
    places = (torch.tensor(each, dtype=torch.long) for each in (flat.asked, flat.scored))
    return Read(*(hidden[each.to(hidden.device)] for each in places))


class _Flat:
    """The sequence in the making. `asked`, `scored`: places of the states of Read."""

    def __init__(self, language: Language, image_token_id: int) -> None:
        self._language, self._image_token_id = language, image_token_id
        self.embeds: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.asked: list[int] = []
        self.scored: list[int] = []
        self._end = 0

    def add(self, filling: Filling, *, is_new: bool) -> PromptPart:
        job = filling.job
        prefix = None
        if is_new:
            prefix = self._add(self._prefix(filling), first=0)
        questions = []
        for row in filling.rows:
            embeds = self._language.embedded(row.branch.token_ids)
            start, stop = self._add(embeds, first=job.prefix_tokens)
            questions.append((start, stop, row.index))
            if scored := row.branch.scored:
                self.scored += range(stop - 1 - scored, stop)
            else:
                self.asked.append(stop - 1)
        return PromptPart(job.slot, job.prefix_tokens, prefix, questions)

    def _prefix(self, filling: Filling) -> torch.Tensor:
        ids = torch.tensor(filling.job.request.prefix.token_ids, device=self._language.device)
        embeds = self._language.embedded(ids)
        if filling.features is not None:
            embeds[ids == self._image_token_id] = filling.features.to(embeds.dtype)
        return embeds

    def _add(self, embeds: torch.Tensor, *, first: int) -> tuple[int, int]:
        start, self._end = self._end, self._end + len(embeds)
        self.embeds.append(embeds)
        self.positions.append(torch.arange(first, first + len(embeds), device=embeds.device))
        return start, self._end
