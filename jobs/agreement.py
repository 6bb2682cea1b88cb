"""Whether the engine's answers are those that transformers gives on each prompt alone, unpadded.

In float32 the tokens have to be equal, up to the first tie. In 16 bits rounding decides between
tokens that are nearly as likely: there the engine's tokens are put to transformers, which says how
far each was from the one that it holds for likeliest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jobs.baseline import Baseline, Tokens
from jobs.workload import Row

TIE = 1e-4
"""Two logits this close may fall either way."""
MOST_EXCUSED = 0.01
"""Of the answers; one in any case."""
FEWEST_TOP = 0.8
"""Of the tokens, those that have to be a likeliest one where 16 bits round."""
LARGEST_GAP = 0.15
"""Of the way from the mean logit to the top one, how far below it any token may lie."""

Said = Mapping[int, Tokens]
"""By the row's number."""


def sample(n_rows: int, count: int) -> list[int]:
    """The numbers of `count` rows, evenly spread."""
    count = min(count, n_rows)
    return [(2 * i + 1) * n_rows // (2 * count) for i in range(count)]


def exact(baseline: Baseline, rows: Sequence[Row], said: Said) -> dict[str, Any]:
    """Token for token against `generate` in float32."""
    equal = excused = 0
    different = []
    for number, tokens in said.items():
        alone, logits = baseline.alone(rows[number])
        at = _first_difference(tokens, alone)
        if at is None:
            equal += 1
        elif _is_tie(tokens, logits, at):
            excused += 1
        else:
            different.append(
                {"row": number, "token": at, "engine": tokens[at : at + 1], "alone": alone[at]}
            )
    return {
        "compared_with": "tokens of generate on the single unpadded prompt",
        "answers": len(said),
        "equal": equal,
        "excused_by_a_tie": excused,
        "different": different,
        "ok": not different and excused <= max(1, MOST_EXCUSED * len(said)),
    }


def _first_difference(tokens: Tokens, alone: Tokens) -> int | None:
    pairs = enumerate(zip(tokens, alone, strict=False))
    length = None if len(tokens) == len(alone) else min(len(tokens), len(alone))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), length)


def _is_tie(tokens: Tokens, logits: torch.Tensor, at: int) -> bool:
    """Whether all that is said from there on hangs on two logits that are as good as equal.

    A tie before the first difference went the same way: it excuses nothing.
    """
    if at >= min(len(tokens), len(logits)):
        return False
    return bool(logits[at].max() - logits[at, tokens[at]] <= TIE)


def forced(baseline: Baseline, rows: Sequence[Row], said: Said) -> dict[str, Any]:
    """How likely transformers finds each token, given the prompt alone and the tokens before it.

    The same of `generate`'s own batches shows what is rounding.
    """
    measured = [_gaps(baseline.forced(rows[number], said[number]), said[number]) for number in said]
    gaps = torch.cat([gap for gap, _ in measured])
    shares = torch.cat([share for _, share in measured])
    top, largest = (gaps <= 0).float().mean().item(), shares.max().item()
    return {
        "tokens": len(gaps),
        "top": round(top, 4),
        "largest_gap": round(gaps.max().item(), 4),
        "largest_gap_share": round(largest, 4),
        "ok": top >= FEWEST_TOP and largest <= LARGEST_GAP,
    }


def _gaps(logits: torch.Tensor, said: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """From the top logit down to each token's, [tokens]; the same as a share of the way from the
    top to the mean."""
    top = logits.max(-1).values
    chosen = logits.gather(-1, torch.tensor(said, device=logits.device)[:, None])[:, 0]
    return top - chosen, (top - chosen) / (top - logits.mean(-1))
