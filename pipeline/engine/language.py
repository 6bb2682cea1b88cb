"""The text model over a flat sequence of tokens, with an attention that knows who sees whom."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.attention import Pass, SlotAttention

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class Language:
    """The text model of a LLaVA; `eager`: as in `Asked`."""

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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From [tokens, hidden] float32 [tokens, vocabulary]."""
        logits: torch.Tensor = self._model.lm_head(hidden).float()
        return logits
