"""The CPU step: a sample becomes uint8 pixels and tokenised prompts, or failed ones.

One row in, one row out. What goes wrong with an image or a question is written into its PROMPT
entries and travels on; nothing raised here is about a single row. Knows no ray and no weights.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import pyarrow as pa
from PIL import Image

from pipeline.decode import decode
from pipeline.engine.load import load_config, load_processor
from pipeline.engine.pixels import check_aspect, pixel_table, resized
from pipeline.prompt import IMAGE_TOKEN, LLAVA_1_5_TEMPLATE, messages_for
from pipeline.sources.base import Turn
from schemas.errors import (
    DecodeError,
    PromptError,
    PromptTooLong,
    QuestionsMalformed,
    RowError,
    TemplateFailed,
)
from schemas.job import AskPrompt, JobSpec
from schemas.tables import KEEP, PREPARED, SAMPLE, error_of, table_of, with_keep

_PLACE = [name for name in PREPARED.names if name in SAMPLE.names]
_NO_QUESTIONS = {
    "stage": "prompt",
    "class": "NoQuestions",
    "message": "the row brings no questions of its own: there is nothing to answer",
}
"""Why a row is skipped; no RowError, since nothing is wrong with it."""

Entry = dict[str, Any]
"""One PROMPT struct in the making."""


class Encode:
    """SAMPLE rows (plus kept columns) to PREPARED rows, in their order; end marks pass."""

    def __init__(self, job: JobSpec, keep: Mapping[str, pa.DataType]) -> None:
        self._job, self._keep = job, keep
        self._processor = load_processor(job.model)
        pixel_table(self._processor)
        self._asks = dict(zip(job.units, job.ask, strict=True))
        self._template = self._processor.chat_template or LLAVA_1_5_TEMPLATE.replace(
            IMAGE_TOKEN, self._processor.image_token
        )
        self._tokens_per_image = _tokens_per_image(self._processor)
        text = load_config(job.model).get_text_config()
        self._context: int | None = getattr(text, "max_position_embeddings", None)

    def __call__(self, batch: pa.Table) -> pa.Table:
        samples = batch.select(SAMPLE.names).to_pylist()
        table = table_of([self._row(sample) for sample in samples], PREPARED)
        for name in self._keep:
            table = table.append_column(KEEP + name, batch.column(KEEP + name))
        return table.cast(with_keep(PREPARED, self._keep))

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        row = {name: sample[name] for name in _PLACE}
        if sample["source_index"] is None:
            return row
        data = sample["image"]
        if data is not None:
            row["image_sha256"] = hashlib.sha256(data).hexdigest()
        row["prompts"] = self._asked(sample)
        if waiting := _waiting(row["prompts"]):
            try:
                row |= self._encoded(data or b"", waiting, sample)
            except DecodeError as error:
                for entry in _waiting(waiting):
                    _fail(entry, error_of(error))
        return row

    def _encoded(self, data: bytes, waiting: list[Entry], sample: dict[str, Any]) -> dict[str, Any]:
        """The row's image columns; fills in the prompts that wait. Raises DecodeError."""
        limit = self._job.source.max_image_pixels
        image = decode(data, max_pixels=limit)
        columns: dict[str, Any] = {"image_width": image.width, "image_height": image.height}
        earlier = [Turn(t["role"], t["content"]) for t in sample["conversation"] or ()]
        for entry in waiting:
            try:
                entry["prompt"] = self._render(entry["question"], earlier)
                entry["token_ids"] = self._tokenise(entry["prompt"], entry["max_new_tokens"])
            except PromptError as error:
                _fail(entry, error_of(error))
        if _waiting(waiting):
            check_aspect(self._processor, image, max_pixels=limit)
            pixels = resized(self._processor, image)
            columns |= {"pixels": pixels.tobytes(), "pixels_shape": list(pixels.shape)}
        return columns

    def _asked(self, sample: dict[str, Any]) -> list[Entry]:
        """An entry for each question that the row's wanted units call for; never none."""
        if sample["error"]:
            return [_fail(_entry(), sample["error"])]
        entries = [entry for unit in sample["units"] for entry in self._asked_of(unit, sample)]
        for entry in entries:
            if sample["conversation_error"] and entry["status"] is None:
                _fail(entry, sample["conversation_error"])
        return entries

    def _asked_of(self, unit: str, sample: dict[str, Any]) -> Iterator[Entry]:
        ask = self._asks[unit]
        longest = self._job.max_new_tokens(ask)
        if isinstance(ask, AskPrompt):
            yield _entry(unit, ask.prompt, longest)
        elif sample["questions_error"]:
            yield _fail(_entry(), sample["questions_error"])
        elif not sample["questions"]:
            yield {**_entry(), "status": "skipped", "error": _NO_QUESTIONS}
        elif error := _ids_that_collide(sample["questions"], taken=set(self._asks)):
            yield _fail(_entry(), error_of(error))
        else:
            for own in sample["questions"]:
                yield _entry(own["id"], own["question"], longest)

    def _render(self, question: str, earlier: list[Turn]) -> str:
        """The prompt as text, with one image token. Raises PromptError."""
        token = self._processor.image_token
        messages = messages_for(
            question,
            system=self._job.model.system_prompt,
            conversation=earlier,
            image_token=token,
        )
        try:
            prompt: str = self._processor.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise TemplateFailed(
                f"the chat template refuses the conversation: {type(error).__name__}: {error}"
            ) from error
        if (count := prompt.count(token)) != 1:
            raise TemplateFailed(
                f"the chat template wrote {token} {count} times for one image: give the "
                "checkpoint a template that places {'type': 'image'} parts"
            )
        return prompt

    def _tokenise(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The whole prompt's ids as the processor gives them, image tokens expanded.

        A template that writes the start token itself gets no second one. Raises PromptTooLong.
        """
        processor, tokenizer = self._processor, self._processor.tokenizer
        expanded = prompt.replace(
            processor.image_token, processor.image_token * self._tokens_per_image
        )
        bos = tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        ids: list[int] = tokenizer(expanded, add_special_tokens=not has_bos, verbose=False)[
            "input_ids"
        ]
        if self._context is not None and len(ids) + max_new_tokens > self._context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens ({self._tokens_per_image} of them the image) "
                f"and the answer up to {max_new_tokens}: together more than the model's context "
                f"of {self._context}; shorten the question or max_new_tokens"
            )
        return ids


def _entry(id: str | None = None, question: str | None = None, longest: int | None = None) -> Entry:
    return {
        "question_id": id,
        "question": question,
        "prompt": None,
        "token_ids": None,
        "max_new_tokens": longest,
        "status": None,
        "error": None,
    }


def _waiting(entries: list[Entry]) -> list[Entry]:
    """Those that the model is still to answer."""
    return [entry for entry in entries if entry["status"] is None]


def _fail(entry: Entry, error: Mapping[str, str] | None) -> Entry:
    entry.update(status="failed", error=error)
    return entry


def _ids_that_collide(questions: list[dict[str, str]], *, taken: set[str]) -> RowError | None:
    """Two answers of one row under one id could not be told apart."""
    seen = set(taken)
    for question in questions:
        if question["id"] in seen:
            whose = "the spec's ask" if question["id"] in taken else "the row's questions"
            return QuestionsMalformed(
                f"the question id {question['id']!r} is already used in {whose}: ids of one row "
                "must be distinct"
            )
        seen.add(question["id"])
    return None


def _tokens_per_image(processor: Any) -> int:
    """How many image tokens the processor writes for one image, whatever its size."""
    blank = Image.new("RGB", (64, 64))
    ids: list[int] = processor(text=processor.image_token, images=blank)["input_ids"][0]
    return ids.count(processor.image_token_id)
