"""The text model over a flat sequence of tokens, with an attention that knows who sees whom."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.attention import Pass, SlotAttention

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class Language:
    """The text model of a LLaVA, and its choice of the next token; `eager`: as in `Asked`."""

    def __init__(self, model: "LlavaForConditionalGeneration", *, eager: bool) -> None:
        self._model: Any = model
        self._attention = SlotAttention(eager=eager)
        model.set_attn_implementation({"text_config": self._attention.name})
        self.device: torch.device = model.device

    def embedded(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]"""
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        embeds: torch.Tensor = self._model.get_input_embeddings()(ids)
        return embeds

    def run(self, what: Pass, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] in and out; raises what the device raises."""
        self._attention.current = what
        try:
            out = self._model.model.language_model(
                inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False
            )
        finally:
            self._attention.current = None
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, list[list[float]]]:
        """From [rows, hidden]: the likeliest tokens [rows] on the device; on the host both them and
        their log-probabilities (float32). The one time that the host waits for the device."""
        logits = self._model.lm_head(hidden).float()
        best, tokens = logits.max(-1)
        logprobs = best - logits.logsumexp(-1)
        # float64 carries a token id exactly.
        return tokens, torch.stack([tokens.double(), logprobs.double()]).T.tolist()
