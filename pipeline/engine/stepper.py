"""One more token for each row: what a step is told, and the text model that does it."""

from collections.abc import Sequence
from functools import partial

import torch

from pipeline.engine.language import Language
from pipeline.engine.live import Live, Row
from pipeline.engine.outline import Outline
from pipeline.engine.replays import CudaGraphs, Replays
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
        first, are_all = rows[0].index, len(rows) == len(live.rows)
        outline, numbers = live.step(rows, is_rounded=self.replays is not None and are_all)
        step = partial(self._step, live, first, outline)
        if self.replays is None or not are_all:
            return step(sent(numbers, self._language.device))
        return self.replays.run(live, outline, step, numbers)[: len(rows)]

    def _step(
        self, live: Live, first: int, outline: Outline, numbers: torch.Tensor
    ) -> torch.Tensor:
        what = live.decode(first, outline, numbers)
        embeds = self._language.embedded(live.tokens[first : first + outline.rows])
        return self._language.run(what, embeds, what.positions)
