"""Keys and values of what is being answered, preallocated and written in place.

    prefixes   [slots, kv_heads, width, head_dim]   an image's prompt up to its question
    branches   [rows, kv_heads, width, head_dim]    a question and its answer

of each layer, keys and values apart.

Live slots and rows come first and without gaps: what a step looks at is a view, never a copy. Stale
numbers may lie behind them and beyond a length; they are finite, and a mask hides them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.engine.kernels import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


WIDTH_STEP = 16


@dataclass(frozen=True)
class Shape:
    """What the text model keeps of one token."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


def shape_of(config: "PreTrainedConfig", *, dtype: torch.dtype, device: torch.device) -> Shape:
    """`config`: of the text model."""
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        device=device,
    )


class KVArena:
    """Keys and values of `capacity` sequences of at most `width` tokens."""

    def __init__(self, shape: Shape, *, capacity: int, width: int) -> None:
        self.capacity, self.width, self.device = capacity, width, shape.device
        self.kv_heads = shape.kv_heads
        size = (capacity, shape.kv_heads, width, shape.head_dim)
        # Zeros, because what was never written is multiplied by probabilities of zero.
        # One tensor each: torch's compiler copies all of what it writes parts of.
        self.layers: list[Pair] = [
            (
                torch.zeros(size, dtype=shape.dtype, device=shape.device),
                torch.zeros(size, dtype=shape.dtype, device=shape.device),
            )
            for _ in range(shape.layers)
        ]
        """Of each, keys and values [capacity, kv_heads, width, head_dim]."""

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._each())

    def move(self, source: int, target: int, *, tokens: int) -> None:
        """Put the first tokens of a sequence in the place of another."""
        for kept in self._each():
            kept[target, :, :tokens] = kept[source, :, :tokens]

    def copy(self, other: "KVArena", *, sequences: int) -> None:
        """Put the first sequences of another arena in the same places, as far as they are wide."""
        width = min(self.width, other.width)
        for kept, there in zip(self._each(), other._each(), strict=True):
            kept[:sequences, :, :width] = there[:sequences, :, :width]

    def free(self) -> None:
        """It has no place for anything then."""
        self.layers = []

    def clear(self, place: int) -> None:
        """Zero a sequence whose numbers are not finite."""
        for kept in self._each():
            kept[place] = 0

    def _each(self) -> Iterator[torch.Tensor]:
        return itertools.chain.from_iterable(self.layers)


def rounded(tokens: int) -> int:
    """How wide a place for so many is: one step at least, so that there is something to look at."""
    return max(-(-tokens // WIDTH_STEP), 1) * WIDTH_STEP


def put(kept: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> None:
    """New keys or values [kv_heads, tokens, dim] in their places [tokens * kv_heads], which are
    those of [sequences, kv_heads, width], flat."""
    dim = new.shape[-1]
    kept.view(-1, dim).index_copy_(0, places, new.transpose(0, 1).reshape(-1, dim))
