"""Answers that are JSON of a schema, by llguidance: which tokens may come next.

llguidance is an extra (`lavaflow[json]`), imported where a job has a schema.
"""

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import SpecError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

COMPACT = {"whitespace_flexible": False}
"""No white space but in texts: a model that is unsure can go on with it for ever."""


class JsonGrammar:
    """One schema over one vocabulary. Make one for all branches that share it.

    `vocabulary`: how many logits the model gives. Raises SpecError where llguidance is not there,
    or knows the schema or the tokenizer not.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        vocabulary: int,
        eos: Collection[int],
    ) -> None:
        check_schema(schema)
        from llguidance.hf import from_tokenizer

        self._grammar = _grammar(schema)
        self._words = -(-vocabulary // 32)
        try:
            self._tokenizer = from_tokenizer(tokenizer, vocabulary, sorted(eos) or None)
        except ValueError as error:
            raise SpecError(
                f"json_schema: llguidance does not know the tokenizer of this model: {error}"
            ) from error

    def matcher(self) -> "LLMatcher":
        """For one answer: it takes its tokens, one by one."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, self._grammar)

    def allowed(self, matchers: Sequence["LLMatcher"]) -> np.ndarray:
        """int32 [matchers, vocabulary / 32]: a bit for each token that may come next."""
        from llguidance.numpy import fill_next_token_bitmask

        bits = np.zeros((len(matchers), self._words), dtype=np.int32)
        for number, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, bits, number)
        return bits


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise SpecError where no answer can be held to the schema."""
    if not importlib.util.find_spec("llguidance"):
        raise SpecError("json_schema needs llguidance: pip install 'lavaflow[json]'")
    from llguidance import LLMatcher

    if said := LLMatcher.validate_grammar(_grammar(schema)):
        reason = said.splitlines()[0].partition("JSON schema: ")[2] or said
        raise SpecError(f"json_schema: llguidance cannot hold an answer to it: {reason}")


def _grammar(schema: Mapping[str, Any]) -> str:
    """As a tokenizer may have it: a space in front."""
    return f'start: " "? json\njson: %json {json.dumps({**schema, "x-guidance": COMPACT})}'
