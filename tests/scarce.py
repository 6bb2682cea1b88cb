"""An engine in a process of its own whose memory is limited; prints one JSON object.

    python -m tests.scarce limited    answers where allocations of some size fail

Linux only: reads /proc, and limits the address space as `ulimit -v` does.
"""

import json
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, ImagePixels, Outcome, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from tests.models import SIDE, tiny_model, tiny_processor

IMAGE_TOKEN, IMAGE_TOKENS = 4, 16
BUDGET_BYTES = 128 * 2**20
"""So large that what is freed goes back to the system."""
MARGIN_BYTES = 96 * 2**20
"""That may still be allocated under the limit: enough for short prompts, not for the long one."""
LONG = 12_000
WIDE = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
}


def requests(count: int) -> list[Request]:
    """Of one to three questions each, every image another one."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        prefix = Prefix([1, *[IMAGE_TOKEN] * IMAGE_TOKENS], [ImagePixels(pixels, str(number))])
        questions = [
            Branch(rng.integers(10, 250, rng.integers(5, 40)).tolist(), int(rng.integers(2, 12)))
            for _ in range(1 + number % 3)
        ]
        found.append(Request(prefix, questions))
    return found


def engine() -> SlotsEngine:
    return SlotsEngine(
        tiny_model(context=LONG + 100, **WIDE),
        eos_token_ids=[],
        table=pixel_table(tiny_processor()),
        kv_budget_bytes=BUDGET_BYTES,
    )


def in_status(key: str) -> int:
    """Bytes, of /proc/self/status."""
    told = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert told
    return int(told[1]) * 1024


def told(answered: Sequence[Sequence[Outcome]]) -> list[list[int]]:
    outcomes = [outcome for outcomes in answered for outcome in outcomes]
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    return [list(outcome.token_ids) for outcome in outcomes if isinstance(outcome, Answer)]


def limited() -> dict[str, object]:
    asked, short = engine(), requests(40)
    free = told(asked.submit(short))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_status("VmSize") + MARGIN_BYTES, hard))
    rng = np.random.default_rng(1)
    long = Request(Prefix([1]), [Branch(rng.integers(10, 250, LONG).tolist(), 2)])
    *scarce, [refused] = asked.submit([*short, long])
    return {
        "equal": told(scarce) == free,
        "long": [type(refused).__name__, str(refused)],
        "after": told(asked.submit(short)) == free,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["limited"]:
        sys.stdout.write(json.dumps(limited()) + "\n")
