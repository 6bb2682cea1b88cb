"""Decoding of one left-padded batch over transformers' own cache.

Left padding keeps every row's last token in the last column, where the next one is read. A row
sees neither the padding (mask) nor its width (positions count the row's own tokens), so that it
gets the tokens it would get alone. Knows no images: what stands in the columns comes as embeddings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from pipeline.engine.request import Branch, Score
from pipeline.engine.said import Ended, Said, take
from pipeline.engine.sampling import Chooser
from pipeline.engine.score import scores_of

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

COMPACT_BELOW = 0.5
"""Finished rows are taken out of the batch when less than this share of it is still running."""


class Row:
    """One prompt on its way: embeddings [tokens, hidden], and what the model has said so far.

    `branch` follows the token ids of `prefix`.
    """

    def __init__(self, embeds: torch.Tensor, prefix: Sequence[int], branch: Branch) -> None:
        self.embeds, self.branch = embeds, branch
        self.said = Said(prefix, branch)
        self.outcome: Ended | Score | None = None


def left_padded(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of [tokens, hidden] as [B, L, hidden] with zeros on the left, and int64 mask [B, L]."""
    longest = max(len(row) for row in embeds)
    padded = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[-1])
    mask = torch.zeros(len(embeds), longest, dtype=torch.long, device=padded.device)
    for i, row in enumerate(embeds):
        padded[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return padded, mask


@torch.inference_mode()
def score_rows(
    model: "LlavaForConditionalGeneration", rows: Sequence[Row], *, eos: frozenset[int]
) -> None:
    """Give each row its Score, from one pass over all. Raises what the device raises."""
    inputs, mask = left_padded([row.embeds for row in rows])
    scored = [row.branch.scored for row in rows]
    hidden = model.model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=_positions(mask), use_cache=False
    ).last_hidden_state.to(mask.device)
    scores = scores_of(
        [row.branch for row in rows],
        torch.cat([states[-1 - count :] for states, count in zip(hidden, scored, strict=True)]),
        logits_of=lambda states: model.lm_head(states).to(states.device),
        eos=eos,
        prompt_tokens=[row.said.prompt_tokens - row.branch.scored for row in rows],
    )
    for row, score in zip(rows, scores, strict=True):
        row.outcome = score


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.inference_mode()
def decode_rows(
    model: "LlavaForConditionalGeneration", rows: Sequence[Row], *, eos: frozenset[int]
) -> None:
    """Give each row its outcome: prefill, then one token for every running row a step.

    The host waits for the device once a step, to learn the tokens. Raises what the device raises.
    """
    inputs, mask = left_padded([row.embeds for row in rows])
    positions = _positions(mask)
    chooser = Chooser(eos=eos, device=mask.device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    running = list(rows)
    while True:
        logits = model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens, chosen = chooser.choose(logits, [row.said for row in running])
        going = [i for i, row in enumerate(running) if row.outcome is None]
        saids = [running[i].said for i in going]
        outcomes = take(saids, [chosen[i] for i in going], eos=eos)
        for i, outcome in zip(going, outcomes, strict=True):
            running[i].outcome = outcome
        alive = [i for i, row in enumerate(running) if row.outcome is None]
        if not alive:
            return
        positions = positions[:, -1:] + 1
        if len(alive) <= COMPACT_BELOW * len(running):
            kept = torch.tensor(alive, device=mask.device)
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            running = [running[i] for i in alive]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        inputs = model.get_input_embeddings()(tokens[:, None]).to(mask.device)
