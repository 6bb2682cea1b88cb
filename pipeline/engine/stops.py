"""Stop strings, found in the text of the tokens as transformers' `generate` finds them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from schemas.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """One set of strings, held against a vocabulary. Make one for all branches that share it.

    `most_tokens`: of the end of a text, so many decide. Raises SpecError where no token can end any
    of the strings, or transformers does not know how the tokenizer writes.
    """

    def __init__(self, strings: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        from transformers import StopStringCriteria

        self.strings = tuple(strings)
        try:
            self._criteria = StopStringCriteria(tokenizer, list(strings))
        except ValueError as error:
            raise SpecError(
                f"stop: {list(strings)} cannot be found in what this model's tokenizer writes: "
                f"{error}"
            ) from error
        self.most_tokens: int = self._criteria.maximum_token_len

    def ended(self, latest: Sequence[Sequence[int]]) -> list[bool]:
        """Of the last tokens of texts, as many of each: does the last one complete a string?"""
        import torch

        found: list[bool] = self._criteria(torch.tensor(latest), None).tolist()
        return found

    def cut(self, text: str) -> str:
        """The text up to the first of the strings."""
        places = [text.find(each) for each in self.strings]
        return text[: min((place for place in places if place >= 0), default=len(text))]
