"""Reading prompts: prefixes into slots, questions into rows, all in one flat sequence."""

from collections.abc import Sequence
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


def read_prompts(
    fillings: Sequence[Filling], live: Live, language: Language, *, image_token_id: int
) -> torch.Tensor:
    """Take the rows in; gives the hidden state [rows, hidden] of the last token of each.

    Raises what the device raises; then none of them is taken in.
    """
    taken: list[tuple[Filling, bool]] = []
    try:
        for filling in fillings:
            taken.append((filling, filling.job.slot == NOWHERE))
            live.take_in(filling.job, filling.rows)
        flat = _Flat(language, image_token_id)
        parts = [flat.add(filling, is_new=is_new) for filling, is_new in taken]
        what = Prefill(parts, prefixes=live.prefixes, branches=live.branches)
        hidden = language.run(what, torch.cat(flat.embeds), torch.cat(flat.positions))
        return hidden[torch.tensor(flat.last, device=hidden.device)]
    except RuntimeError:
        for filling, is_new in reversed(taken):
            live.put_back(filling.job, filling.rows, with_slot=is_new)
        raise


class _Flat:
    """The sequence in the making. `last`: where the questions end."""

    def __init__(self, language: Language, image_token_id: int) -> None:
        self._language, self._image_token_id = language, image_token_id
        self.embeds: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.last: list[int] = []
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
            self.last.append(stop - 1)
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
