"""An answer in the making: the tokens so far, and what ends it."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from pipeline.engine.request import Answer
from schemas.errors import NonFiniteLogits


@dataclass
class Said:
    """`count`: tokens that the model has given, the end token included."""

    prompt_tokens: int
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    count: int = 0

    def take(
        self, token: int, logprob: float, *, eos: Collection[int]
    ) -> Answer | NonFiniteLogits | None:
        """One more token; gives the outcome with the last one.

        A log-probability that is no number is how broken logits show.
        """
        if not math.isfinite(logprob):
            return NonFiniteLogits(
                f"the model's logits were NaN or infinite after {self.count} tokens of the answer: "
                "try model.dtype float32 or bfloat16"
            )
        self.logprob += logprob
        self.count += 1
        is_end = token in eos
        if not is_end:
            self.tokens.append(token)
        if not is_end and self.count < self.max_new_tokens:
            return None
        return Answer(
            token_ids=tuple(self.tokens),
            finish_reason="stop" if is_end else "length",
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.count,
            mean_logprob=self.logprob / self.count,
        )
