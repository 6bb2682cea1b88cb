"""What many tokens look at: prefixes in slots, the first of the two parts of their attention."""

from dataclasses import dataclass

import torch

from pipeline.engine.attention import Asked, bias_of
from pipeline.engine.grid import Grid
from pipeline.engine.kernels import Part
from pipeline.engine.kv import KVArena, rounded


@dataclass(frozen=True)
class _Hidden:
    """What of prefixes is hidden, the same for all layers with one window.

    `bias` [slots, 1, 1 or width * group, prefix] and `lengths` as in `Kernels.attend`. `blind`
    [tokens * heads]: for which all is.
    """

    bias: torch.Tensor
    lengths: torch.Tensor | None
    blind: torch.Tensor


class Shared:
    """Prefixes that tokens look at, those of a slot together.

    `slots`: where they are in the arena. `tokens` [slots], `longest` the most of them. `grid`:
    which tokens look at which, [slots, width]; `behind` [slots, width]: so many tokens behind its
    prefix each of these is. `alone` [tokens]: which look at none; null where there is none.
    """

    def __init__(  # noqa: PLR0913 (by name)
        self,
        arena: KVArena,
        *,
        slots: slice | torch.Tensor,
        tokens: torch.Tensor,
        longest: int,
        grid: Grid,
        behind: torch.Tensor,
        alone: torch.Tensor | None = None,
    ) -> None:
        self._arena, self._slots = arena, slots
        self._tokens = tokens
        # Where that is all the width, matrix products take the slots as they are, without a copy.
        self._columns = min(rounded(longest), arena.width)
        self._grid, self._behind, self._alone = grid, behind, alone
        self._hidden: dict[int | None, _Hidden] = {}

    def joined(self, asked: Asked, own: Part, at_own: torch.Tensor) -> torch.Tensor:
        """[tokens * heads, dim]: attention over prefixes and, as in `own`, what is behind them;
        `at_own` [tokens * heads]: where each token and head is in that, flat."""
        if asked.window not in self._hidden:
            self._hidden[asked.window] = self._hides(asked)
        hidden = self._hidden[asked.window]
        keys, values = (
            kept[self._slots, :, : self._columns] for kept in self._arena.layers[asked.layer]
        )
        prefix = asked.kernels.attend(
            self._grid.spread(asked.query, asked.kv_heads),
            (keys, values),
            hidden.bias,
            scale=asked.scale,
            lengths=hidden.lengths,
        )
        at_prefix = self._grid.places(asked.kv_heads, asked.group)
        return asked.kernels.join(prefix, at_prefix, own, at_own, blind=hidden.blind)

    def _hides(self, asked: Asked) -> _Hidden:
        columns = torch.arange(self._columns, device=self._tokens.device)
        seen, lengths = (columns < self._tokens[:, None])[:, None], None
        if asked.window is None:
            lengths = self._tokens.int()
        else:
            position = self._tokens[:, None] + self._behind
            seen = seen & (position[:, :, None] - columns < asked.window)
            seen = seen.repeat_interleave(asked.group, 1)
        slots, width = self._grid.table.shape
        blind = ~seen.any(-1)[:, None].expand(slots, asked.kv_heads, width * asked.group)
        blind = blind.flatten().index_select(0, self._grid.places(asked.kv_heads, asked.group))
        if self._alone is not None:
            blind = blind | self._alone.repeat_interleave(asked.query.shape[0])
        return _Hidden(bias_of(seen[:, None], asked.query.dtype), lengths, blind)
