"""flash-attn's `flash_attn_with_kvcache` as it is documented, by the formula, on a CPU."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

Found = tuple[torch.Tensor, torch.Tensor]
KERNEL = 2
"""Which of the functions it is that transformers has of that package."""


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let transformers find it; counts what is asked of it."""
    calls = Counter[str]()

    def counted(*args: torch.Tensor, **options: object) -> Found:
        calls["causal" if options.get("causal") else "lengths"] += 1
        return flash_attn_with_kvcache(*args, **options)  # type: ignore[arg-type]

    functions: list[Callable[..., Found] | None] = [None] * 5
    functions[KERNEL] = counted
    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention",
        lambda name: (tuple(functions), (dict, dict)),
    )
    return calls


def flash_attn_with_kvcache(  # noqa: PLR0913 (its interface)
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_softmax_lse: bool = False,
) -> Found:
    """[batch, queries, heads, dim] over [batch, keys, kv_heads, dim]; sums [batch, heads, queries].

    What lies behind `cache_seqlens` is never read. Masks are aligned to the last key and query. A
    query that sees nothing gets zeros, and infinity as its sum.
    """
    batch, queries, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    assert k_cache.shape == v_cache.shape == (batch, k_cache.shape[1], kv_heads, dim)
    assert heads % kv_heads == 0
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert softmax_scale is not None
    assert return_softmax_lse
    if cache_seqlens is None:
        cache_seqlens = q.new_full((batch,), k_cache.shape[1], dtype=torch.int32)
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (batch,)
    assert cache_seqlens.is_contiguous()
    out, lse = torch.zeros_like(q), q.new_full((batch, heads, queries), float("inf"))
    if q.device.type == "meta":
        return out, lse
    assert int(cache_seqlens.max()) <= k_cache.shape[1]
    for n, length in enumerate(cache_seqlens.tolist()):
        keys, values = (
            each[n, :length].transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
            for each in (k_cache, v_cache)
        )
        scores = q[n].transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        distance = torch.arange(queries)[:, None] + length - queries - torch.arange(length)
        left, right = window_size[0], 0 if causal else window_size[1]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= distance >= -right
        scores = scores.masked_fill(~seen, float("-inf"))
        some = seen.any(-1)
        out[n, some] = (scores[:, some].softmax(-1) @ values).transpose(0, 1)
        lse[n, :, some] = scores[:, some].logsumexp(-1)
    return out, lse
