"""The text model over a flat sequence of tokens, with an attention that knows who sees whom."""

from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.attention import Asked, Pass, SlotAttention
from pipeline.engine.compiling import compile_once, compiling
from pipeline.engine.flash import Flash
from pipeline.engine.kernels import FEW, Kernels
from pipeline.engine.kv import shape_of
from pipeline.engine.last_layer import LastLayer
from pipeline.engine.sampling import Likeliest, likeliest
from pipeline.engine.step import Decode
from pipeline.engine.threads import Threads
from pipeline.engine.traced import ROWS, TracedStep, example, small_alone

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

WANTED = 31
"""To compile with, of ROWS."""


class Language:
    """The text model of a LLaVA; `attention`: as `model.attention` of a spec.

    `compiled`: by torch, for any number of tokens but one; what reads prompts, without what is read
    and written of keys, and on a CPU steps with that. Raises SpecError where either does not work
    here.
    """

    def __init__(
        self,
        model: "LlavaForConditionalGeneration",
        *,
        attention: str = "auto",
        compiled: bool = False,
    ) -> None:
        self._model: Any = model
        self._text: Any = model.model.language_model
        self._compiled: Any = None
        self._compiled_step: Any = None
        self._compiled_head: Any = None
        self._compiled_likeliest: Likeliest | None = None
        self._kernels = Kernels(
            model.device,
            model.dtype,
            eager=attention == "eager",
            flash=Flash() if attention == "flash_attention_2" else None,
            compiled=compiled,
        )
        self._last_layer = LastLayer(self._text)
        self._attention = SlotAttention(self._kernels, self._last_layer)
        model.set_attn_implementation({"text_config": self._attention.name})
        self.device: torch.device = model.device
        self.threads = Threads(self._text)
        if compiled:
            self._compile()

    def embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """From [tokens], [tokens, hidden]."""
        embeds: torch.Tensor = self._model.get_input_embeddings()(token_ids)
        return embeds

    def run(self, what: Pass, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] in, those of the tokens out that are wanted; raises what the device
        raises."""
        if self._compiled_step is not None and isinstance(what, Decode):
            step = what.traced()
            if step is not None:
                return self._step(step, embeds, positions)
        text, wanted = self._text, what.wanted
        # A single token would be compiled again, for itself.
        if self._compiled is not None and len(positions) > 1:
            text = self._compiled
            if wanted is None:
                wanted = torch.arange(len(positions), device=self.device)
        self._attention.current = what
        try:
            with self._last_layer.of(wanted):
                return _hidden(text, embeds, positions)
        finally:
            self._attention.current = None

    def can_want(self, tokens: int) -> bool:
        """Whether a pass may want so many: a single one would be compiled again, for itself."""
        return tokens > 1 or self._compiled is None

    @property
    def fewest_rows(self) -> int:
        """Of a step, for the same reason."""
        return 1 if self._compiled_step is None else 2

    def _step(
        self, step: TracedStep, embeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        self._attention.traced = step
        try:
            return _hidden(self._compiled_step, embeds, positions)
        finally:
            self._attention.traced = None

    @torch.inference_mode()
    def _compile(self) -> None:
        self._compiled = compile_once(self._text.forward, fullgraph=True)
        if self.device.type == "cpu":
            self._compiled_head = compile_once(self._model.lm_head.forward)
            self._compiled_likeliest = compile_once(likeliest)
        text = self._model.config.get_text_config()
        shape = shape_of(text, dtype=self._model.dtype, device=self.device)
        group = text.num_attention_heads // shape.kv_heads
        if self._kernels.can_be_traced and group <= FEW:
            self._compiled_step = compile_once(self._text.forward, fullgraph=True)
        tokens = torch.zeros(ROWS, dtype=torch.long, device=self.device)
        with compiling(self._model):
            nothing = _Nothing(tokens[:WANTED])
            self.likeliest(self.logits(self.run(nothing, self.embedded(tokens), tokens)))
            self._kernels.warm_up(kv_heads=shape.kv_heads, group=group, dim=shape.head_dim)
            if self._compiled_step is not None:
                with small_alone():
                    self._step(example(shape), self.embedded(tokens), tokens)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From [tokens, hidden], [tokens, vocabulary]."""
        head = self._model.lm_head
        if self._compiled_head is not None and len(hidden) > 1:
            head = self._compiled_head
        logits: torch.Tensor = head(hidden)
        return logits

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As that of `sampling.py`."""
        if self._compiled_likeliest is not None and len(logits) > 1:
            return self._compiled_likeliest(logits)
        return likeliest(logits)


def _hidden(text: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    out = text(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


class _Nothing:
    """A pass without any keys."""

    def __init__(self, wanted: torch.Tensor) -> None:
        self.wanted = wanted

    def attend(self, asked: Asked) -> torch.Tensor:
        return torch.zeros_like(asked.query.transpose(0, 1))
