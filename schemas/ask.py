"""The part of the job spec that says what is asked, and how answers are decoded."""

import string
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from schemas.base import Spec
from schemas.presets import PRESETS, Preset, PresetName

ROW_QUESTIONS = "questions"
"""The unit of coverage that stands for all questions a row brings itself (`from: questions`)."""


NewTokens = Annotated[int, Field(gt=0, lt=2**31)]
FewestNewTokens = Annotated[int, Field(ge=0, lt=2**31)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=0.01, le=100)]
Samples = Annotated[int, Field(gt=0, lt=2**15)]
Texts = tuple[Annotated[str, Field(min_length=1)], ...]
COLDEST = 0.01


def _is_no_almost_zero(temperature: float | None) -> float | None:
    if temperature and temperature < COLDEST:
        raise ValueError(
            f"{temperature:g} is neither 0 (always the likeliest token) nor {COLDEST} or more"
        )
    return temperature


class GenerateSpec(Spec):
    """How answers are decoded, with the names and the meaning of transformers' `generate`."""

    max_new_tokens: NewTokens = Field(64, description="Longest answer, in tokens.")
    min_new_tokens: FewestNewTokens = Field(
        0, description="Before so many tokens there is no end token."
    )
    temperature: Temperature = Field(
        0.0,
        description="0: always the likeliest token. Above, 1 being the model's own distribution: "
        "tokens are drawn, by chance that comes from `seed` and the row's identity alone.",
    )
    top_p: TopP = Field(
        1.0, description="Draw from the likeliest tokens that have this probability together."
    )
    top_k: TopK = Field(0, description="Draw from so many tokens, the likeliest; 0: from all.")
    repetition_penalty: Penalty = Field(
        1.0, description="Above 1, tokens of the prompt and the answer become less likely."
    )
    stop: Texts = Field((), description="Texts that end an answer; they are cut off.")
    n: Samples = Field(
        1, description="Answers to each question, told apart by `sample_number`; drawn ones only."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Another one draws other answers.")

    @field_validator("temperature")
    @classmethod
    def _temperature_is_no_almost_zero(cls, temperature: float) -> float | None:
        return _is_no_almost_zero(temperature)


class Shot(Spec):
    """An example of a question and its answer, without an image."""

    question: str = Field(min_length=1, description="What is asked in the example.")
    answer: str = Field(min_length=1, description="What a good answer to it is.")


class AskKeys(Spec):
    """What may stand in every entry of `ask`."""

    preset: PresetName | None = Field(
        None,
        description="Words that need not be written. With a question: short-answer, "
        "multiple-choice (lists `choices`, each behind a letter), yes-no. Instead of one: "
        "brief-caption, detailed-caption, instruct-conversation, instruct-detail, "
        "instruct-reasoning; where these have several prompts, one is drawn for each row.",
    )
    when: str | None = Field(
        None,
        description="Condition over earlier answers about the image, by the ids of their entries, "
        "and over the row's columns, as `animal == 'dog' and width >= 512`; where it does not "
        "hold, the question is `skipped`.",
    )
    shots: tuple[Shot, ...] = Field(
        (), description="Examples, {question, answer}, that stand before the image as turns."
    )
    choices: Texts | None = Field(
        None,
        description="The answers that there may be, two or more: the model's probability of each "
        "goes to `choice_probs`, the likeliest is the answer. Nothing is decoded then.",
    )
    length_normalise: bool = Field(
        False,
        description="choices: compare the mean log-probability of a token, not the sum, which "
        "favours short choices.",
    )
    json_schema: dict[str, Any] | None = Field(
        None,
        description="A JSON schema that the answer, a JSON text, has to keep to; one that is cut "
        "off at `max_new_tokens` is a failed row. Needs `lavaflow[json]`.",
    )
    max_new_tokens: NewTokens | None = Field(
        None, description="Longest answer in tokens; null takes generate.max_new_tokens."
    )
    min_new_tokens: FewestNewTokens | None = Field(
        None, description="As in `generate`; null takes that."
    )
    temperature: Temperature | None = Field(None, description="As in `generate`; null takes that.")
    top_p: TopP | None = Field(None, description="As in `generate`; null takes that.")
    top_k: TopK | None = Field(None, description="As in `generate`; null takes that.")
    repetition_penalty: Penalty | None = Field(
        None, description="As in `generate`; null takes that."
    )
    stop: Texts | None = Field(None, description="As in `generate`; null takes that.")
    n: Samples | None = Field(None, description="As in `generate`; null takes that.")

    @field_validator("temperature")
    @classmethod
    def _temperature_is_no_almost_zero(cls, temperature: float | None) -> float | None:
        return _is_no_almost_zero(temperature)

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, choices: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if choices is None:
            return None
        if len(choices) < 2:
            raise ValueError(f"{list(choices)}: give two or more to choose from")
        for number, choice in enumerate(choices):
            if choice in choices[:number]:
                raise ValueError(f"{choice!r} is given twice")
            if choice != choice.strip():
                raise ValueError(f"{choice!r} has a space at an end; take it off")
        return choices

    @model_validator(mode="after")
    def _preset_fills_in(self) -> "AskKeys":
        for name, value in self.words.defaults.items():
            if getattr(self, name) is None:
                # Frozen for everybody else.
                object.__setattr__(self, name, value)
        return self

    @property
    def words(self) -> Preset:
        """Of the preset; without any, where there is none."""
        return Preset() if self.preset is None else PRESETS[self.preset]

    @property
    def options(self) -> tuple[str, ...] | None:
        """What the model is to say for each of `choices`."""
        if self.choices is None or not self.words.lists_choices:
            return self.choices
        return tuple(string.ascii_uppercase[: len(self.choices)])

    @property
    def decoded(self) -> dict[str, Any]:
        """The keys that `generate` has, too, as far as they are given."""
        return {
            name: value
            for name in GenerateSpec.model_fields
            if (value := getattr(self, name, None)) is not None
        }


class AskedOfAll(Spec):
    """What makes a question of the spec's own."""

    id: str = Field(
        min_length=1, max_length=200, description="Name of the question in the answer table."
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="The question: a Jinja template over the row's columns, as `What does "
        "{{ artist }} show here?`, and over earlier answers about the image, as "
        "`{{ answers.animal }}`.",
    )
    turns: Texts = Field(
        (),
        description="Instead of `prompt`: questions (templates, too) that are asked one after the "
        "other, each in view of the answers before; they are told apart by `turn`.",
    )


class AskPrompt(AskKeys, AskedOfAll):
    """One question, or one conversation, about every image."""

    @field_validator("id")
    @classmethod
    def _id_is_not_reserved(cls, value: str) -> str:
        if value == ROW_QUESTIONS:
            raise ValueError(f"`{ROW_QUESTIONS}` stands for the row's own questions; rename it")
        return value

    @property
    def texts(self) -> tuple[str, ...]:
        """The templates that it brings, one a turn; none where its preset has the prompts."""
        return self.turns if self.prompt is None else (self.prompt,)


class AskedOfRow(Spec):
    """What makes questions the row's own."""

    from_: Literal["questions"] = Field(alias="from", description="Always `questions`.")


class AskRow(AskKeys, AskedOfRow):
    """The row's own questions: a list of {id, question} in `columns.questions`."""


def _kind_of_ask(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "row" if "from" in keys or "from_" in keys else "prompt"


Ask = Annotated[
    Annotated[AskPrompt, Tag("prompt")] | Annotated[AskRow, Tag("row")],
    Discriminator(_kind_of_ask),
]

DRAWN = ("top_p", "top_k", "n")
"""Keys that mean something at a temperature above 0 only."""


def default_of(key: str) -> Any:
    return GenerateSpec.model_fields[key].default


def contradiction(ask: Ask, decoding: GenerateSpec) -> str | None:
    """What cannot be meant, with the remedy."""
    if mistake := _unasked(ask):
        return mistake
    if ask.choices:
        given = [*ask.decoded, *(["json_schema"] if ask.json_schema is not None else [])]
        return f"choices are not decoded: {given[0]} has no effect; drop it" if given else None
    if ask.length_normalise:
        return "length_normalise is about choices, and there are none; drop it, or give choices"
    if decoding.min_new_tokens > decoding.max_new_tokens:
        return (
            f"min_new_tokens is {decoding.min_new_tokens}, max_new_tokens "
            f"{decoding.max_new_tokens}: an answer cannot be both; change one"
        )
    if ask.json_schema is not None and (decoding.stop or decoding.min_new_tokens):
        key = "stop" if decoding.stop else "min_new_tokens"
        return f"the answer ends where json_schema says: {key} would cut it or go on; take it off"
    given = [name for name in DRAWN if ask.decoded.get(name, default_of(name)) != default_of(name)]
    if given and not decoding.temperature:
        return (
            f"{given[0]} has no effect at temperature 0, which always takes the likeliest token: "
            "drop it, or set a temperature"
        )
    return None


def _unasked(ask: Ask) -> str | None:
    """What is wrong with the words of a question."""
    is_own = isinstance(ask, AskRow)
    given = [name for name in ("prompt", "turns") if getattr(ask, name, None)]
    has_prompts = bool(ask.words.prompts)
    if has_prompts and (is_own or given):
        what = "the row brings the question" if is_own else f"{given[0]} has no effect; drop it"
        return f"preset {ask.preset} is a prompt of its own: {what}"
    if not is_own and not given and not has_prompts:
        return "there is no question: give prompt, turns, or a preset such as brief-caption"
    if len(given) > 1:
        return "prompt and turns are both given; keep one of them"
    if ask.choices and "turns" in given:
        return "choices are for one question, and turns are several: drop either"
    if ask.words.lists_choices and not is_own and not ask.choices:
        return f"preset {ask.preset} lists choices, and there are none; give choices"
    if ask.words.lists_choices and len(ask.choices or ()) > len(string.ascii_uppercase):
        return f"preset {ask.preset} has a letter for each choice, and there are more than 26"
    return None
