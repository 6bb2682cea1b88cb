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
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights or what they make, and of each query the highest score and the total of its weights
relative to that."""


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys: `out` [..., queries, dim] over `total` [..., queries].

    `highest` and `total` are float32. Dividing at the end, there is less to divide than weights.
    """

    out: torch.Tensor
    highest: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of_lse(cls, out: torch.Tensor, lse: torch.Tensor) -> "Part":
        """Of what is divided already, and logarithms of what by."""
        return cls(out, lse, torch.ones_like(lse))

    @property
    def attention(self) -> torch.Tensor:
        return divided(self.out, self.total)

    @property
    def flat(self) -> Sums:
        """[places, dim], [places] and [places]"""
        out = self.out.reshape(-1, self.out.shape[-1])
        return out, self.highest.reshape(-1), self.total.reshape(-1)


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
        self._few: Callable[..., Sums] = few
        self._weigh: Callable[..., Sums] = weigh
        self._taken: Callable[..., torch.Tensor] = taken
        self._join: Callable[..., torch.Tensor] = join
        if self.are_compiled:
            self._few, self._weigh = compile_once(few), compile_once(weigh)
            self._taken, self._join = compile_once(taken), compile_once(join)

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
        all it says is how many first keys a sequence sees. Of a query that sees no key all is
        finite, and may be anything.
        """
        if self.flash is not None and lengths is not None:
            return self.flash.attend(query, keys, lengths, scale)
        sequences, columns = len(query), keys[0].shape[2]
        # Lengths of one would be compiled again, each for itself.
        if self.are_compiled and sequences > 1 and columns > 1:
            if query.shape[2] == self._few_queries and bias.shape[:3] == (sequences, 1, 1):
                return Part(*self._few(query, *keys, bias, scale))
            return by_products(query, keys, bias, scale, weigh=self._weigh)
        if self._has_cpu_flash:
            return _by_cpu_flash(query, keys, bias, scale)
        return by_products(query, keys, bias, scale)

    def taken(self, part: Part, at: torch.Tensor) -> torch.Tensor:
        """[queries, dim]: attention of a part that is all there is; `at` as in `join`."""
        out, _, total = part.flat
        return self._taken(out, total, at)

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
        other = Part(*(each[1:].clone() for each in (part.out, part.highest, part.total)))
        self.taken(part, places)
        self.join(part, places, other, places.clone(), blind=places > 0)


def _by_cpu_flash(query: torch.Tensor, keys: Pair, bias: torch.Tensor, scale: float) -> Part:
    return Part.of_lse(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *keys, attn_mask=bias, scale=scale
        )
    )


def weigh(scores: torch.Tensor, bias: torch.Tensor | None, scale: float) -> Sums:
    """Weights in the dtype of the scores [..., queries, keys], made in float32."""
    exact = scores.float() * scale
    if bias is not None:
        exact = exact + bias
    highest, weights = _weighed(exact)
    if scores.dtype == torch.float16:
        # Undivided, what is made of many values may be too large for it.
        lse, total = _logged(highest, weights)
        return (weights / total[..., None]).to(scores.dtype), lse, torch.ones_like(lse)
    # Nothing else is written down by torch's compiler, as what is summed is what is multiplied.
    weights = weights.to(scores.dtype)
    return weights, highest[..., 0], weights.sum(-1, dtype=torch.float32)


def by_products(
    query: torch.Tensor,
    keys: Pair,
    bias: torch.Tensor | None,
    scale: float,
    weigh: Callable[..., Sums] = weigh,
) -> Part:
    """`weigh`: that of this module, or what torch compiles of it."""
    weights, *sums = weigh(torch.matmul(query, keys[0].transpose(-1, -2)), bias, scale)
    return Part(torch.matmul(weights, keys[1]), *sums)


def divided(out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return (out / total.clamp(min=TINY)[..., None]).to(out.dtype)


def taken(out: torch.Tensor, total: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return divided(out.index_select(0, at), total.index_select(0, at))


def join(  # noqa: PLR0913 (two parts)
    a: torch.Tensor,
    highest_a: torch.Tensor,
    total_a: torch.Tensor,
    at_a: torch.Tensor,
    b: torch.Tensor,
    highest_b: torch.Tensor,
    total_b: torch.Tensor,
    at_b: torch.Tensor,
    blind: torch.Tensor,
) -> torch.Tensor:
    """By their sums, as flash attention does between its blocks."""
    # Who sees nothing there may be given anybody's place, whose numbers need not be finite.
    difference = highest_a.index_select(0, at_a) - highest_b.index_select(0, at_b)
    difference = difference.masked_fill(blind, float("-inf"))
    # Relative to the higher one.
    share_a, share_b = difference.clamp(max=0).exp(), (-difference).clamp(max=0).exp()
    found_a = a.index_select(0, at_a).masked_fill(blind[:, None], 0)
    sums_a = total_a.index_select(0, at_a).masked_fill(blind, 0)
    found = found_a * share_a[:, None] + b.index_select(0, at_b) * share_b[:, None]
    total = sums_a * share_a + total_b.index_select(0, at_b) * share_b
    return (found / total[:, None]).to(a.dtype)


def few(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> Sums:
    """A Part of [N, kv_heads, queries, dim], made in float32 and divided already.

    `bias` [N, 1, 1, keys].

    A query after the other, which torch's compiler makes the faster code of.
    """
    outs, sums = [], []
    for n in range(query.shape[2]):
        exact = (query[:, :, n, None].float() * key.float()).sum(-1) * scale + bias[:, :, 0]
        highest, weights = _weighed(exact)
        lse, total = _logged(highest, weights)
        out = (weights[..., None] * value.float()).sum(-2) / total[..., None]
        outs.append(out.to(query.dtype))
        sums.append(lse)
    lse = torch.stack(sums, 2)
    return torch.stack(outs, 2), lse, torch.ones_like(lse)


def _weighed(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest score of each query, and the weights relative to that."""
    # Where all keys are hidden, there is nothing to subtract.
    highest = exact.amax(-1, keepdim=True).clamp(min=LOWEST)
    return highest, (exact - highest).exp()


def _logged(highest: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithm of a query's sum, and its weights' total."""
    # Of nothing that is seen there is nothing to divide by.
    total = weights.sum(-1).clamp(min=TINY)
    return highest[..., 0] + total.log(), total
