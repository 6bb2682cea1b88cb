"""What a step is told: its outline, and the numbers that it is about, which are sent at once.

Steps of one outline differ in nothing but these numbers, so that a device can do them again as they
were recorded (`replays.py`). For that, lengths are rounded up: what is added looks at nothing of
anybody's, and nobody looks at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOKENS_STEP = 64


@dataclass(frozen=True)
class Outline:
    """`rows`, and the most tokens of one, the new one included; `slots` that they look at, the most
    rows at one of them, and the most tokens in one."""

    rows: int
    longest_own: int
    slots: int = 0
    abreast: int = 0
    longest_prefix: int = 0


@dataclass(frozen=True)
class Numbers:
    """int64, on the host or on the device.

    Of each row [rows]: `own_tokens`, the new one included, and the `positions` of these. Of the
    slots, where there are any: their `prefix_tokens` [slots], the `table` [slots, abreast] of the
    rows at each, where a row is in that, `place_of` [rows] (as in `Grid`), and `is_alone` [rows]: 1
    for a row that looks at none.
    """

    own_tokens: torch.Tensor
    positions: torch.Tensor
    prefix_tokens: torch.Tensor
    table: torch.Tensor
    place_of: torch.Tensor
    is_alone: torch.Tensor


def flat_of(outline: Outline, numbers: Sequence[np.ndarray]) -> torch.Tensor:
    """As in Numbers, in that order, as far as there are any; missing rows and slots are added."""
    own, positions, *of_slots = numbers
    o = outline
    flat = [_longer(own, o.rows, by=1), _longer(positions, o.rows)]
    if of_slots:
        prefix_tokens, table, place_of, is_alone = of_slots
        wide = np.zeros((o.slots, o.abreast), dtype=np.int64)
        wide[: len(table), : table.shape[1]] = table
        # A padded place repeats a row of its own slot.
        wide[: len(table), table.shape[1] :] = table[:, :1]
        place_of = place_of // table.shape[1] * o.abreast + place_of % table.shape[1]
        flat += [_longer(prefix_tokens, o.slots), wide.ravel(), _longer(place_of, o.rows)]
        flat.append(_longer(is_alone, o.rows, by=1))
    return torch.from_numpy(np.concatenate(flat))


def numbers_of(outline: Outline, flat: torch.Tensor) -> Numbers:
    o = outline
    looking = o.rows if o.slots else 0
    sizes = [o.rows, o.rows, o.slots, o.slots * o.abreast, looking, looking]
    own, positions, prefix_tokens, table, *rest = torch.split(flat, sizes)
    return Numbers(own, positions, prefix_tokens, table.view(o.slots, o.abreast), *rest)


def rounded_up(outline: Outline, *, most: Outline) -> Outline:
    """`most`: of what there are places for."""
    o = outline
    rows, own = min(_size(o.rows), most.rows), -(-o.longest_own // TOKENS_STEP) * TOKENS_STEP
    own = min(own, most.longest_own)
    if not o.slots:
        return Outline(rows, own)
    slots = min(_size(o.slots), most.slots)
    return Outline(rows, own, slots, min(_size(o.abreast), rows), most.longest_prefix)


def _size(count: int) -> int:
    """Powers of two, and half-way between these."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def _longer(numbers: np.ndarray, count: int, *, by: int = 0) -> np.ndarray:
    longer = np.full(count, by)
    longer[: len(numbers)] = numbers
    return longer
