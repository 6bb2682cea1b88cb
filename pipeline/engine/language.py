"""The text model over a flat sequence of tokens, with an attention that knows who sees whom."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import TorchDynamoException

from pipeline.engine.attention import Asked, Pass, SlotAttention
from schemas.errors import SpecError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class Language:
    """The text model of a LLaVA; `eager`: as in `Asked`.

    `compiled`: by torch, all but the attention, for any number of tokens but one. Raises SpecError
    where that does not work here.
    """

    def __init__(
        self, model: "LlavaForConditionalGeneration", *, eager: bool, compiled: bool = False
    ) -> None:
        self._model: Any = model
        self._text: Any = model.model.language_model
        self._compiled: Any = None
        self._attention = SlotAttention(eager=eager)
        model.set_attn_implementation({"text_config": self._attention.name})
        self.device: torch.device = model.device
        if compiled:
            self._compile()

    def embedded(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]"""
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        embeds: torch.Tensor = self._model.get_input_embeddings()(ids)
        return embeds

    def run(self, what: Pass, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] in and out; raises what the device raises."""
        text, sequence = self._text, (embeds[None], positions[None])
        # A single token would be compiled again, for itself.
        if self._compiled is not None and len(positions) > 1:
            text = self._compiled
            for each in sequence:
                torch._dynamo.mark_dynamic(each, 1)
        self._attention.current = what
        try:
            out = text(inputs_embeds=sequence[0], position_ids=sequence[1], use_cache=False)
        finally:
            self._attention.current = None
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _compile(self) -> None:
        self._compiled = torch.compile(self._text.forward, dynamic=True, fullgraph=True)
        tokens = torch.zeros(2, dtype=torch.long, device=self.device)
        try:
            self.run(_Nothing(), self.embedded(tokens), tokens)
        except TorchDynamoException as error:
            what = " ".join(str(error).split("\n\n")[0].split())
            raise SpecError(
                f"resources.generate.compile: the text model cannot be compiled here ({what}): "
                "set it to false"
            ) from error

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From [tokens, hidden] float32 [tokens, vocabulary]."""
        logits: torch.Tensor = self._model.lm_head(hidden).float()
        return logits


class _Nothing:
    """A pass without any keys."""

    def attend(self, asked: Asked) -> torch.Tensor:
        return torch.zeros_like(asked.query.transpose(0, 1))
