"""flash-attn's kernel (`model.attention: flash_attention_2`): it takes no masks, but lengths.

That is enough for packed questions: their two parts are attention over the first keys of a slot or
a row, and causal attention, and it tells the sums by which they are joined. It has been run as far
as what is documented of `flash_attn_with_kvcache` says (`tests/flash.py`): it needs a GPU.
"""

from collections.abc import Callable

import torch

from pipeline.engine.kernels import Pair, Part
from schemas.errors import SpecError


def kernel() -> Callable[..., Pair]:
    """`flash_attn_with_kvcache` of what transformers takes here. Raises SpecError."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    found: Callable[..., Pair] | None
    try:
        (_, _, found, *_), _ = lazy_import_flash_attention("flash_attention_2")
    except (ImportError, OSError, ValueError) as error:
        raise SpecError(
            f"model.attention flash_attention_2: {error}; install flash-attn, or set "
            "model.attention to sdpa"
        ) from error
    if found is None:
        raise SpecError(
            "model.attention flash_attention_2: the package here has no flash_attn_with_kvcache: "
            "update flash-attn, or set model.attention to sdpa"
        )
    return found


class Flash:
    """Raises SpecError where its package is not there."""

    def __init__(self) -> None:
        self._kernel = kernel()

    def attend(self, query: torch.Tensor, keys: Pair, lengths: torch.Tensor, scale: float) -> Part:
        """[N, kv_heads, queries, dim] over the first ones, `lengths` int32 [N], of keys and values
        [N, kv_heads, keys, dim]. Of a query that sees none, `out` is zero."""
        return self._attend(query, keys, scale, cache_seqlens=lengths)

    def attend_causally(
        self, query: torch.Tensor, keys: Pair, scale: float, *, window: int | None
    ) -> Part:
        """[N, heads, tokens, dim] over keys and values [N, kv_heads, tokens, dim]."""
        latest = -1 if window is None else window - 1
        return self._attend(query, keys, scale, causal=True, window_size=(latest, 0))

    def _attend(self, query: torch.Tensor, keys: Pair, scale: float, **options: object) -> Part:
        # Its tokens come before its heads.
        key, value = (each.transpose(1, 2) for each in keys)
        out, lse = self._kernel(
            query.transpose(1, 2),
            key,
            value,
            softmax_scale=scale,
            return_softmax_lse=True,
            **options,
        )
        return Part.of_lse(out.transpose(1, 2), lse)
