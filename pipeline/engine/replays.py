"""Steps that a device does again as they were recorded: on a GPU, CUDA graphs.

Of a small step, starting what computes takes longer than computing: Python between layers, and a
call for each kernel. What is recorded is set going by one call.

CUDA graphs have not been run; that steps of one outline differ in nothing but their numbers, which
is what they want, is tested on a CPU.
"""

from collections.abc import Callable
from functools import partial

import torch

from pipeline.engine.live import Live
from pipeline.engine.outline import Outline
from pipeline.engine.transfer import sent
from schemas.errors import SpecError

Run = Callable[[], torch.Tensor]


class Replays:
    """`record`: makes what does the same again, reading and writing the same memory."""

    def __init__(self, record: Callable[[Run], Run]) -> None:
        self._record = record
        self._live: Live | None = None
        self._kept: dict[Outline, tuple[torch.Tensor, Run]] = {}

    def run(
        self,
        live: Live,
        outline: Outline,
        step: Callable[[torch.Tensor], torch.Tensor],
        numbers: torch.Tensor,
    ) -> torch.Tensor:
        """What the step gives for its numbers, which are on the host, until the next one runs."""
        if live is not self._live:
            self._live, self._kept = live, {}
        given = sent(numbers, live.tokens.device)
        if outline not in self._kept:
            kept = given.clone()
            self._kept[outline] = kept, self._record(partial(step, kept))
        kept, again = self._kept[outline]
        kept.copy_(given)
        return again()


class CudaGraphs:
    """Records for one device; those of one engine share their memory, since they take turns.
    Raises SpecError where a step waits for the device, which cannot be recorded."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        # What a first call makes ready must not be recorded. It may be repeated: the same keys go
        # into the same places.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of an actor may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = run()
        except torch.OutOfMemoryError:
            # It has just run once: only to keep it there is no room.
            return run
        except RuntimeError as error:
            raise SpecError(
                "resources.generate.compile: this model's steps cannot be recorded as CUDA graphs "
                f"({str(error).splitlines()[0]}): set it to false"
            ) from error

        def again() -> torch.Tensor:
            graph.replay()
            return found

        return again
