"""A question to a prompt, and a prompt to token ids, as the model's processor makes them.

The half of the processor that reads text. Most jobs ask the same of every image: what was rendered
and tokenised last is kept. Knows nothing of rows and images.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from pipeline.engine.checkpoint import open_checkpoint
from pipeline.engine.family import ImageTokens
from pipeline.engine.load import load_config
from pipeline.formats import FORMATS, IMAGE_TOKEN, format_of, given_template
from pipeline.prompt import messages_for
from pipeline.sources.base import Turn
from schemas.errors import ChoiceUnwritable, PromptError, PromptTooLong, TemplateFailed
from schemas.job import ModelSpec
from schemas.tables import error_of

if TYPE_CHECKING:
    from transformers import LlavaProcessor

PROMPTS_KEPT = 256


@dataclass(frozen=True)
class Choices:
    """Given answers behind a prompt: each is one of `token_ids` behind the first `shared_tokens` of
    the prompt, which tokenise alike whatever follows."""

    shared_tokens: int
    token_ids: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer and an end token."""
        return self.shared_tokens + max(map(len, self.token_ids)) + 1


@dataclass(frozen=True)
class Reading:
    """What a prompt becomes, and given answers behind it, and what there is no room for. Each may
    raise PromptError."""

    ids: Callable[[str], list[int]]
    choices: Callable[[str, tuple[str, ...]], Choices]
    check: Callable[..., None]

    def fill_in(self, entry: dict[str, Any], *, options: tuple[str, ...] | None) -> None:
        """Give a PROMPT entry that is rendered its ids, and those of the answers that it may have;
        it fails where they are too many."""
        try:
            ids = self.ids(entry["prompt"])
            longest = entry["max_new_tokens"]
            if options:
                choices = self.choices(entry["prompt"], options)
                longest = choices.longest - len(ids)
                entry["choices"] = asdict(choices)
            self.check(ids, max_new_tokens=longest)
            entry["token_ids"] = ids
        except PromptError as error:
            entry.update(status="failed", error=error_of(error))


class Tokeniser:
    """`render(question, earlier, shots, images)` gives a prompt with one image token for each of so
    many images, `ids(prompt, places)` its ids, `choices(prompt, texts, places)` those of given
    answers; a `Reading` does both.

    `places`: how many image tokens each image of the prompt takes, in their order; `image_tokens`
    knows that of an image.
    """

    def __init__(self, model: ModelSpec, processor: "LlavaProcessor") -> None:
        self._processor: Any = processor
        self._system_prompt = model.system_prompt
        template = given_template(model.chat_template) or processor.chat_template
        if template is None:
            template = FORMATS[format_of(open_checkpoint(model))]
        self._template = template
        if template in FORMATS.values():
            self._template = template.replace(IMAGE_TOKEN, processor.image_token)
        text = load_config(model).get_text_config()
        self._context: int | None = getattr(text, "max_position_embeddings", None)
        self.render = functools.lru_cache(PROMPTS_KEPT)(self._render)
        self.ids = functools.lru_cache(PROMPTS_KEPT)(self._ids)
        self.choices = functools.lru_cache(PROMPTS_KEPT)(self._choices)

    @functools.cached_property
    def image_tokens(self) -> ImageTokens:
        return ImageTokens(self._processor)

    def placing(self, *places: int) -> "Reading":
        """How prompts are read in which so many image tokens stand for each image."""
        return Reading(
            functools.partial(self.ids, places=places),
            functools.partial(self.choices, places=places),
            self.check,
        )

    def tokens_of(self, text: str) -> int:
        """How many tokens a text has, about: what is around it may change that by a few."""
        return len(self._tokenised(text))

    def check(self, ids: Sequence[int], *, max_new_tokens: int) -> None:
        """Raise PromptTooLong where the model's context has no room for the answer."""
        if self._context is not None and len(ids) + max_new_tokens > self._context:
            of_image = ids.count(self._processor.image_token_id)
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens ({of_image} of them the image) "
                f"and the answer up to {max_new_tokens}: together more than the model's context "
                f"of {self._context}; shorten the question or max_new_tokens"
            )

    def _render(
        self,
        question: str,
        earlier: tuple[Turn, ...] = (),
        shots: tuple[Turn, ...] = (),
        images: int = 1,
    ) -> str:
        """The prompt as text. Raises PromptError."""
        token = self._processor.image_token
        messages = messages_for(
            question,
            system=self._system_prompt,
            conversation=earlier,
            shots=shots,
            image_token=token,
            images=images,
        )
        try:
            prompt: str = self._processor.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise TemplateFailed(
                f"the chat template refuses the conversation: {type(error).__name__}: {error}"
            ) from error
        if (count := prompt.count(token)) != images:
            raise TemplateFailed(
                f"the chat template wrote {token} {count} times for "
                f"{'one image' if images == 1 else f'{images} images'}: give the "
                "checkpoint a template that places {'type': 'image'} parts"
            )
        return prompt

    def _ids(self, prompt: str, places: tuple[int, ...]) -> list[int]:
        """The whole prompt's ids as the processor gives them, image tokens expanded.

        A template that writes the start token itself gets no second one.
        """
        token = self._processor.image_token
        first, *others = prompt.split(token)
        expanded = (token * n + text for n, text in zip(places, others, strict=True))
        ids = self._tokenised(first + "".join(expanded))
        if ids[-1:] == [self._processor.image_token_id]:
            raise TemplateFailed(
                f"the chat template ends the prompt with {token}, and nothing says where the "
                "answer begins: use a template that ends with the assistant's turn"
            )
        return ids

    def _tokenised(self, text: str) -> list[int]:
        tokenizer = self._processor.tokenizer
        bos = tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        ids: list[int] = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
        return ids

    def _choices(self, prompt: str, texts: tuple[str, ...], places: tuple[int, ...]) -> Choices:
        """The image token stands for itself alone here: what follows it is the same."""
        added = len(self.ids(prompt, places)) - len(self._tokenised(prompt))
        return choices_behind(prompt, texts, self._tokenised, added=added)


def choices_behind(
    prompt: str,
    texts: tuple[str, ...],
    tokenised: Callable[[str], Sequence[int]],
    *,
    added: int = 0,
) -> Choices:
    """Each behind the whole prompt, a space between them where the prompt does not end in one.

    `added`: so many tokens the prompt has beyond those that `tokenised` gives. Raises
    ChoiceUnwritable where the tokens do not tell the choices apart.
    """
    space = "" if prompt[-1:].isspace() else " "
    alone = tokenised(prompt)
    whole = [tokenised(f"{prompt}{space}{text}") for text in texts]
    shared = min(alike(alone, ids) for ids in whole)
    given = [ids[shared:] for ids in whole]
    for number, ids in enumerate(given):
        if not ids or ids in given[:number]:
            raise ChoiceUnwritable(
                f"the model's tokens for the choice {texts[number]!r} are those of "
                f"{texts[given.index(ids)]!r}: name it otherwise"
                if ids
                else f"the model has no tokens for the choice {texts[number]!r}"
            )
    return Choices(shared + added, given)


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(a), len(b)))
