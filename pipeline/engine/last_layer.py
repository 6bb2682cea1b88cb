"""Of the last layer, nobody asks for more than a few tokens: the last ones of prompts.

For all others its keys and values are all that is needed. So the layer is run twice: for all tokens
up to there, then as a whole for those that are asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.engine.kernels import Pair


class LastLayer:
    """Stands before the last layer of a text model; its attention shows keys and values to `seen`.

    A layer is given what goes with its tokens as tensors [1, tokens, ...], or tuples of these.
    """

    def __init__(self, text: Any) -> None:
        layer = text.layers[text.config.num_hidden_layers - 1]
        self._run, layer.forward = layer.forward, self._forward
        self._wanted: torch.Tensor | None = None
        self._pair: Pair | None = None
        self._is_looking_for_pair = False

    @contextmanager
    def of(self, wanted: torch.Tensor | None) -> Iterator[None]:
        """Only these tokens [wanted], in this order, come out of it; null: all of them."""
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = self._pair = None
            self._is_looking_for_pair = False

    def seen(self, pair: Pair) -> Pair:
        """Keys and values of a layer's tokens: those that its attention is to be given."""
        if self._is_looking_for_pair:
            self._pair = pair
            raise _PairFoundError
        return pair if self._pair is None else self._pair

    def _forward(self, hidden: torch.Tensor, **given: Any) -> Any:
        if self._wanted is None:
            return self._run(hidden, **given)
        self._is_looking_for_pair = True
        try:
            self._run(hidden, **given)
        except _PairFoundError:
            self._is_looking_for_pair = False
        wanted = {name: _taken(each, self._wanted) for name, each in given.items()}
        found = self._run(_taken(hidden, self._wanted), **wanted)
        self._pair = None
        return found


class _PairFoundError(Exception):
    """The rest of the layer is not needed."""


def _taken(given: Any, wanted: torch.Tensor) -> Any:
    if isinstance(given, torch.Tensor):
        return given[:, wanted]
    if isinstance(given, tuple):
        return tuple(_taken(each, wanted) for each in given)
    return given
