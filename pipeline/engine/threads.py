"""How many threads small steps take on a CPU.

Every matrix product wakes the other threads and waits for them: some 60 us where OpenMP's threads
do not spin, which is longer than the product of a few rows takes.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_THREADS_BYTES = 2**26
"""Multiplications of a layer, times the bytes of a number, that one thread does sooner than two;
measured in float32 and in bfloat16."""


class Threads:
    """For the steps of a text model; knows the number that there was when it was made."""

    def __init__(self, text: "PreTrainedModel") -> None:
        layers = list(text.layers)
        weights = [weight for layer in layers for weight in layer.parameters()]
        # To unpack quantized ones takes as long for a single row as for many.
        are_plain = all(weight.is_floating_point() for weight in weights)
        self._all = torch.get_num_threads()
        self.most_rows = 0
        """For as many one thread is enough."""
        if text.device.type == "cpu" and self._all > 1 and are_plain:
            bytes_of_layers = sum(weight.nbytes for weight in weights)
            self.most_rows = ONE_THREADS_BYTES * len(layers) // bytes_of_layers

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
