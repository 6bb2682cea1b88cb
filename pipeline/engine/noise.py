"""What chance there is in an answer: numbers that its key decides, and nothing else.

Philox is a generator that counts (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011): numbers of one key have nothing to do with those of another. Only its raw bits are used,
which numpy promises never to change.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

AHEAD = 32


class Noise:
    """`noise[n]`: uniform in [0, 1), of the n-th token of the answer with that 128-bit key."""

    def __init__(self, key: int) -> None:
        self._philox = np.random.Philox(key=key)
        self._drawn: list[float] = []

    def __getitem__(self, number: int) -> float:
        while number >= len(self._drawn):
            bits = self._philox.random_raw(AHEAD) >> np.uint64(11)
            self._drawn += (bits * 2.0**-53).tolist()
        return self._drawn[number]


def noise_key(identity: Sequence[object]) -> int:
    """128 bits for an answer: the same for the same identity, on every machine and in every run."""
    text = json.dumps(identity, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
