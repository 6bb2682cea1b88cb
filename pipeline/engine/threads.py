"""How many threads the steps of a small model take on a CPU.

Every matrix product wakes the other threads and waits for them: some 60 us where OpenMP's threads
do not spin, which is longer than a small model takes for the product of a few rows.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_THREADS_PRODUCTS = 2**24
"""Multiplications of a layer that one thread does sooner than two; measured in float32."""
FEWEST_ROWS = 16
"""Models for which it is so with fewer rows only are left alone: what torch compiles, it compiles
once for each number of threads."""


class Threads:
    """For the steps of a text model; knows the number that there was when it was made."""

    def __init__(self, text: "PreTrainedModel") -> None:
        layers = list(text.layers)
        weights = sum(weight.numel() for layer in layers for weight in layer.parameters())
        rows = ONE_THREADS_PRODUCTS * len(layers) // weights
        self._all = torch.get_num_threads()
        self.most_rows = 0
        """For as many one thread is enough."""
        if text.device.type == "cpu" and self._all > 1 and rows >= FEWEST_ROWS:
            self.most_rows = rows

    @contextlib.contextmanager
    def enough_for(self, rows: int) -> Iterator[None]:
        """In the thread that calls, and in those that torch has not been used in before."""
        if rows > self.most_rows:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._all)
