"""Attention over slots: a question sees its image's prefix, itself, and nothing else.

A text model of transformers calls whatever attention function its config names. `SlotAttention` is
such a function. Its tokens come as one flat sequence without padding; which of them belong
together, and where keys and values go, is told beforehand by a pass:

    prefill.py      prompts
    step.py         one more token for each answer
    traced.py       the same, for torch to compile together with the model
    last_layer.py   what of the last layer is left out

A question's attention is computed in two parts, over the prefix that it shares (`shared.py`) and
over itself, and joined (`kernels.py`).
"""

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline.engine.kernels import Kernels
from pipeline.engine.last_layer import LastLayer

_NUMBERS = itertools.count()
_BY_NUMBER: dict[int, "SlotAttention"] = {}


@dataclass(frozen=True)
class Asked:
    """What a layer asks: `query` [heads, tokens, dim], `key` and `value` [kv_heads, tokens, dim].

    In the last layer, `query` is that of the tokens only that the pass wants, if it names them.
    `window`: so many of the latest positions are seen, its own included; null for all.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    kernels: Kernels

    @property
    def kv_heads(self) -> int:
        return self.key.shape[0]

    @property
    def group(self) -> int:
        """Heads that share keys and values."""
        return self.query.shape[0] // self.key.shape[0]


class Pass(Protocol):
    """One run of the text model over a flat sequence of tokens."""

    @property
    def wanted(self) -> torch.Tensor | None:
        """The tokens [wanted] whose hidden states are asked for; null for all of them."""

    def attend(self, asked: Asked) -> torch.Tensor:
        """[tokens, heads, dim], of those in the query."""


class SlotAttention:
    """An attention function under a name of its own, for one model."""

    def __init__(self, kernels: Kernels, last_layer: LastLayer) -> None:
        self._kernels, self._last_layer = kernels, last_layer
        self._number = next(_NUMBERS)
        self.name = f"lavaflow_slots_{self._number}"
        self.current: Pass | None = None
        self.traced: Pass | None = None
        """Instead of `current`, one that is compiled together with the model."""
        _BY_NUMBER[self._number] = self
        # No mask is registered with it, so that none is made: the passes know who sees whom.
        AttentionInterface.register(self.name, self._attend)

    def _attend(  # noqa: PLR0913 (transformers' interface)
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = self._last_layer.seen((key, value))
        if self.traced is not None:
            asked = Asked(
                module.layer_idx, query[0], key[0], value[0], scale, sliding_window, self._kernels
            )
            return self.traced.attend(asked)[None], None
        if torch.compiler.is_compiling():
            numbers = self._number, module.layer_idx, scale, sliding_window
            return _attend_uncompiled(query, key, value, *numbers), None
        return self.attend(query, key, value, module.layer_idx, scale, sliding_window), None

    def attend(  # noqa: PLR0913 (what an operator of torch can be given)
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """From [1, heads, tokens, dim] to [1, tokens, heads, dim], of the query's tokens."""
        assert self.current is not None
        asked = Asked(layer, query[0], key[0], value[0], scale, window, self._kernels)
        return self.current.attend(asked)[None]


@torch.library.custom_op("lavaflow::attend", mutates_args=())
def _attend_uncompiled(  # noqa: PLR0913 (as above)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: int,
    layer: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """What a compiled text model calls: a pass is another one every time."""
    return _BY_NUMBER[number].attend(query, key, value, layer, scale, window).contiguous()


@_attend_uncompiled.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def attend_causally(
    asked: Asked, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """[N, heads, tokens, dim]: stretches of the sequence, each over itself.

    Where one is padded behind its end, no token of its own sees that.
    """
    tokens, mask = query.shape[2], None
    if asked.window is not None and tokens > asked.window:
        places = torch.arange(tokens, device=query.device)
        mask = is_seen(places[:, None] - places[None, :], asked.window)
    return F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(asked.group, 1),
        value.repeat_interleave(asked.group, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=asked.scale,
    )


def is_seen(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """`distance`: positions from a key to the token that looks."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What hides keys: zero for those that are seen, minus infinity for others."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )
