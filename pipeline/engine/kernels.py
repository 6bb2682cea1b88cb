"""What computes attention over some of the keys.

    flash      torch's kernel for CPUs, which tells its sums; where oneMKL knows no instructions for
               bfloat16, it takes as long in it as in float32
    products   of matrices, which on a CPU are oneDNN's, and a softmax between them; as in
               transformers' eager attention, scores are rounded to the model's dtype
    few        for a few queries over many keys, where reading these is all the work
    flash.py   flash-attn's, on a GPU, where a spec asks for it; what it takes no mask for is done
               by products

In bfloat16 on a CPU products and few are the faster ones, once torch has compiled them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.engine.compiling import attention_pays_on, compile_once

if TYPE_CHECKING:
    from pipeline.engine.flash import Flash

LOWEST = torch.finfo(torch.float32).min
TINY = torch.finfo(torch.float32).tiny
FEW = 8
SIZES = 37, 41, 43
"""To compile with, of sequences, keys and room for them: what no model has two of, so that torch
does not take one for the other."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys. `out` [..., queries, dim], `lse` float32 [..., queries]."""

    out: torch.Tensor
    lse: torch.Tensor

    @property
    def flat(self) -> Pair:
        """[places, dim] and [places]"""
        return self.out.reshape(-1, self.out.shape[-1]), self.lse.reshape(-1)


class Kernels:
    """The fastest there are; `eager`: products; `flash`: flash-attn's; `compiled`: those that torch
    compiles, too."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        eager: bool = False,
        flash: "Flash | None" = None,
        compiled: bool = False,
    ) -> None:
        self.flash = flash
        self.are_compiled = compiled and not eager and attention_pays_on(device, dtype)
        """Causal attention is then faster by `attend`, too, than by torch's own kernel for it."""
        # Of torch's kernels that tell their sums, only the CPU's has been tried out.
        self._has_cpu_flash = device.type == "cpu" and not eager and flash is None
        self.can_be_traced = self._has_cpu_flash and compiled
        """Whether steps are compiled with their attention, by `few`; that, too, only there."""
        self._few_queries = 0
        self._few: Callable[..., Pair] = few
        self._softmax: Callable[..., Pair] = softmax
        self._join: Callable[..., torch.Tensor] = join
        if self.are_compiled:
            self._few, self._softmax = compile_once(few), compile_once(softmax)
            self._join = compile_once(join)

    def attend(
        self,
        query: torch.Tensor,
        keys: Pair,
        bias: torch.Tensor,
        *,
        scale: float,
        lengths: torch.Tensor | None = None,
    ) -> Part:
        """[N, kv_heads, queries, dim] over keys and values [N, kv_heads, keys, dim].

        `bias`: [1 or N, 1, 1 or queries, keys], zero or minus infinity. `lengths` int32 [N]: that
        all it says is how many first keys a sequence sees. Of a query that sees no key `lse` may be
        anything, `out` is finite.
        """
        if self.flash is not None and lengths is not None:
            return self.flash.attend(query, keys, lengths, scale)
        sequences, columns = len(query), keys[0].shape[2]
        # Lengths of one would be compiled again, each for itself.
        if self.are_compiled and sequences > 1 and columns > 1:
            if query.shape[2] == self._few_queries and bias.shape[:3] == (sequences, 1, 1):
                return Part(*self._few(query, *keys, bias, scale))
            return by_products(query, keys, bias, scale, weigh=self._softmax)
        if self._has_cpu_flash:
            return _by_cpu_flash(query, keys, bias, scale)
        return by_products(query, keys, bias, scale)

    def join(
        self, a: Part, at_a: torch.Tensor, b: Part, at_b: torch.Tensor, *, blind: torch.Tensor
    ) -> torch.Tensor:
        """Attention over the keys of both: [queries, dim].

        `at_a`, `at_b` [queries]: where each query is in the parts, flat. `blind` [queries]: which
        see nothing in `a`; in `b` each sees one key at least.
        """
        return self._join(*a.flat, at_a, *b.flat, at_b, blind)

    def warm_up(self, *, kv_heads: int, group: int, dim: int) -> None:
        """Have compiled what models without sliding windows want; raises what torch raises."""
        if not self.are_compiled:
            return
        self._few_queries = group if group <= FEW else 0
        sequences, columns, width = SIZES
        arena = torch.zeros(sequences, kv_heads, width, dim, dtype=torch.bfloat16)
        keys = arena[:, :, :columns], arena.clone()[:, :, :columns]
        for tokens in (1, FEW + 1):
            query = arena.new_zeros(sequences, kv_heads, tokens * group, dim)
            for bias in ((sequences, 1, 1), (1, 1, query.shape[2])):
                part = self.attend(query, keys, arena.new_zeros(*bias, columns), scale=dim**-0.5)
        places = torch.zeros(columns, dtype=torch.long)
        other = Part(part.out[1:].clone(), part.lse[1:].clone())
        self.join(part, places, other, places.clone(), blind=places > 0)


def _by_cpu_flash(query: torch.Tensor, keys: Pair, bias: torch.Tensor, scale: float) -> Part:
    return Part(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *keys, attn_mask=bias, scale=scale
        )
    )


def softmax(
    scores: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in the dtype of the scores [..., queries, keys], made in float32, and `lse`."""
    exact = scores.float() * scale
    if bias is not None:
        exact = exact + bias
    highest, weights, total = _weighed(exact)
    return (weights / total).to(scores.dtype), (highest + total.log())[..., 0]


def by_products(
    query: torch.Tensor,
    keys: Pair,
    bias: torch.Tensor | None,
    scale: float,
    weigh: Callable[..., Pair] = softmax,
) -> Part:
    """`weigh`: `softmax`, or what torch compiles of it."""
    weights, lse = weigh(torch.matmul(query, keys[0].transpose(-1, -2)), bias, scale)
    return Part(torch.matmul(weights, keys[1]), lse)


def join(  # noqa: PLR0913 (two parts)
    a: torch.Tensor,
    a_lse: torch.Tensor,
    at_a: torch.Tensor,
    b: torch.Tensor,
    b_lse: torch.Tensor,
    at_b: torch.Tensor,
    blind: torch.Tensor,
) -> torch.Tensor:
    """By the logarithms of their sums, as flash attention does between its blocks."""
    # Who sees nothing there may be given anybody's place, whose numbers need not be finite.
    difference = a_lse.index_select(0, at_a) - b_lse.index_select(0, at_b)
    share = difference.masked_fill(blind, float("-inf")).sigmoid()[:, None]
    found_a = a.index_select(0, at_a).masked_fill(blind[:, None], 0)
    found_b = b.index_select(0, at_b)
    return torch.lerp(found_b.float(), found_a.float(), share).to(a.dtype)


def few(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of [N, kv_heads, queries, dim], in float32; `bias` [N, 1, 1, keys].

    A query after the other, which torch's compiler makes the faster code of.
    """
    outs, sums = [], []
    for n in range(query.shape[2]):
        exact = (query[:, :, n, None].float() * key.float()).sum(-1) * scale + bias[:, :, 0]
        highest, weights, total = _weighed(exact)
        out = (weights[..., None] * value.float()).sum(-2) / total
        outs.append(out.to(query.dtype))
        sums.append((highest + total.log())[..., 0])
    return torch.stack(outs, 2), torch.stack(sums, 2)


def _weighed(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The highest score of each query, the weights to that, and their sum."""
    # Where all keys are hidden, there is nothing to subtract, and nothing to divide by.
    highest = exact.amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = (exact - highest).exp()
    return highest, weights, weights.sum(-1, keepdim=True).clamp(min=TINY)
