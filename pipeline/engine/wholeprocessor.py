"""A processor taken as a whole, for models of no family: nothing is known of what it does.

What it makes of an image travels as it is, as safetensors; a prompt's token ids are what it writes
for prompt and image together. What else it gives must follow from either alone, or the model cannot
be asked: that is tried out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save

from schemas.errors import ProcessorRefused, SpecError

IDS, MASK = "input_ids", "attention_mask"
NOT_FOR_ANSWERS = frozenset({"labels"})
_PROBES = ("a", "What is to be seen in this image?")

Rule = Callable[[torch.Tensor], torch.Tensor]
"""From ids [1, tokens] what goes beside them, [1, tokens]."""


class WholeProcessor:
    """Raises SpecError for a processor that nothing here can be done with."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        token = getattr(processor, "image_token", None)
        if token is None or getattr(processor, "image_token_id", None) is None:
            raise SpecError(
                f"{type(processor).__name__} names no image_token, which stands for the image in "
                "a prompt: its models are not supported"
            )
        blank = Image.new("RGB", (64, 64))
        self._prompt = f"{token}\n"
        some, more = (self._read(self._prompt + text, blank) for text in _PROBES)
        self._beside = self._rules(some, more)

    def ids(self, prompt: str, image: Image.Image) -> list[int]:
        """Raises ProcessorRefused."""
        found: list[int] = self._read(prompt, image)[IDS][0].tolist()
        return found

    def of_image(self, image: Image.Image) -> bytes:
        """What the model is given beside the text. Raises ProcessorRefused."""
        found = self._read(self._prompt, image)
        tensors = {
            name: each.contiguous() for name, each in found.items() if name not in self._beside
        }
        del tensors[IDS]
        return save(tensors)

    def inputs(self, ids: list[int], of_image: bytes) -> dict[str, torch.Tensor]:
        """All that the model is given, for one prompt."""
        read = torch.tensor([ids])
        beside = {name: rule(read) for name, rule in self._beside.items()}
        return {IDS: read, **beside, **load(of_image)}

    def _read(self, prompt: str, image: Image.Image) -> dict[str, torch.Tensor]:
        bos = self._processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        try:
            found = self._processor(text=prompt, images=image, return_tensors="pt", **options)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ProcessorRefused(
                f"the processor does not take the prompt and its image: {type(error).__name__}: "
                f"{error}"
            ) from error
        return {n: each for n, each in dict(found).items() if n not in NOT_FOR_ANSWERS}

    def _rules(
        self, some: Mapping[str, torch.Tensor], more: Mapping[str, torch.Tensor]
    ) -> dict[str, Rule]:
        """Of what goes with the ids; the rest has to be the image's own."""
        rules: dict[str, Rule] = {MASK: torch.ones_like}
        for name in {*some, *more} - {IDS, MASK}:
            one, other = some.get(name), more.get(name)
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                if one.shape == other.shape and torch.equal(one, other):
                    continue
                known = (torch.zeros_like, torch.ones_like, *self._own_rules())
                fitting = [
                    rule
                    for rule in known
                    if all(_is_same(rule(each[IDS]), each[name]) for each in (some, more))
                ]
                if fitting:
                    rules[name] = fitting[0]
                    continue
            raise SpecError(
                f"{type(self._processor).__name__} gives {name}, which follows neither from the "
                "image alone nor from the token ids: its models are not supported"
            )
        return rules

    def _own_rules(self) -> list[Rule]:
        """Some processors need more than ids to tell."""
        try:
            self._types(torch.tensor([[0]]))
        except (AttributeError, TypeError, IndexError):
            return []
        return [self._types]

    def _types(self, ids: torch.Tensor) -> torch.Tensor:
        """What the processor itself makes of ids: 1 where they stand for an image, as a rule."""
        return torch.tensor(self._processor.create_mm_token_type_ids(ids.tolist()))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))
