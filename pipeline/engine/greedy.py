"""Greedy decoding of one left-padded batch over transformers' own cache.

Left padding keeps every row's last token in the last column, where the next one is read. A row
sees neither the padding (mask) nor its width (positions count the row's own tokens), so that it
gets the tokens it would get alone. Knows no images: what stands in the columns comes as embeddings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from pipeline.engine.request import Answer
from pipeline.engine.said import Said
from schemas.errors import NonFiniteLogits

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

COMPACT_BELOW = 0.5
"""Finished rows are taken out of the batch when less than this share of it is still running."""


class Row:
    """One prompt on its way: embeddings [tokens, hidden], and what the model has said so far."""

    def __init__(self, embeds: torch.Tensor, max_new_tokens: int) -> None:
        self.embeds = embeds
        self.said = Said(len(embeds), max_new_tokens)
        self.outcome: Answer | NonFiniteLogits | None = None


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
def decode_rows(
    model: "LlavaForConditionalGeneration", rows: Sequence[Row], *, eos: frozenset[int]
) -> None:
    """Give each row its outcome: prefill, then one token for every running row a step.

    The host waits for the device once a step, to learn the tokens. Raises what the device raises.
    """
    inputs, mask = left_padded([row.embeds for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
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
        tokens, step = _choose(logits)
        for row, token, logprob in zip(running, *step, strict=True):
            if row.outcome is None:
                row.outcome = row.said.take(int(token), logprob, eos=eos)
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
        inputs = model.get_input_embeddings()(tokens[:, None])


def _choose(logits: torch.Tensor) -> tuple[torch.Tensor, list[list[float]]]:
    """From [B, vocabulary]: the likeliest tokens [B] on the device, and both them and their float32
    log-probabilities on the host. float64 carries a token id exactly."""
    tokens = logits.argmax(-1)
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, torch.stack([tokens.double(), logprobs.double()]).tolist()
