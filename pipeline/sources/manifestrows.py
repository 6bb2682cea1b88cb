"""Rows of a manifest to samples: where the image is, what is asked, what cannot be understood.

Reads nothing and fetches nothing. What is understood without any setting, by the shape of a row:

    image           the first of IMAGE_NAMES that a row of the file has, one image or a list; of
                    VQA's questions without any of them, the file that VQA means by image_id:
                    COCO_val2014_000000262148.jpg
    questions       the column `questions`, a list of {id, question} or texts, or one text
    question_id     with `question` or `text`: the row's one question, under this id (VQA, LLaVA's
                    question files); `question` alone is the question `q0`
    conversations   a list of {from, value}: what the human says are the row's questions, each asked
                    by itself, `q0`, `q1`, ...; as `columns.conversation`, it is the talk that each
                    question continues, and where the human has the last word, that is the question

From texts of LLaVA's, image marks are taken out. A row's own name, `__key__`, is its `id`, else its
first image as written.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeGuard

from pipeline.sources.base import KEY, Question, Sample, Turn
from pipeline.sources.jsonvalues import json_text, label
from pipeline.sources.questions import parse_conversation, parse_questions
from pipeline.sources.uris import shown
from schemas.errors import (
    ConversationMalformed,
    ImageMissing,
    ManifestMalformed,
    QuestionsMalformed,
)
from schemas.job import ColumnsSpec, SourceSpec

IMAGE_NAMES = ("image", "image_path", "path", "file", "file_name", "url", "uri", "img", "images")
"""What columns of images are called."""
IMAGE_MARK = "<image>"
TALK = "conversations"
SPEAKERS = {"human": "user", "gpt": "assistant"}
MOST_LISTED = 20
MOST_DIGITS = 18
"""Of a number that is written as text."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A row with its place: its index, and where it is in the file, in words.

    Where it cannot be understood at all, `row` is the reason.
    """

    index: int
    place: str
    row: Row | str


class ManifestRows:
    """The rows of one file. `images`: the columns with the images; none where VQA names them.

    `header`: what VQA's file says of all its rows.
    """

    def __init__(
        self,
        uri: str,
        *,
        spec: SourceSpec,
        images: Sequence[str],
        header: Mapping[str, Any],
        fields: AbstractSet[str],
    ) -> None:
        self._name = shown(uri)
        self._keep, self._columns = spec.keep, spec.columns
        self._fields = fields
        self._images, self._header = images, header

    def images_of(self, line: Line) -> tuple[str, ...]:
        """The images as the row names them; none where it lacks one."""
        try:
            return self._named(line.row) if isinstance(line.row, Mapping) else ()
        except _NoImage:
            return ()

    def sample(self, line: Line, *, beside: Row | None = None) -> Sample:
        """Without its image. `beside`: what else is known of the row, to be kept."""
        subject = f"{self._name}: {line.place}"
        row = line.row
        if not isinstance(row, Mapping):
            error = ManifestMalformed(f"{subject}: {row}; write one JSON object for each row")
            return Sample(line.index, "", error=error)
        images: tuple[str, ...] = ("",)
        missing = None
        try:
            images = self._named(row)
        except _NoImage as reason:
            missing = ImageMissing(f"{subject}: {reason}")
        key = label(row.get("id"), default=shown(images[0]))
        columns = {KEY: key, **(beside or {}), **row}
        return Sample(
            index=line.index,
            sample_id=label(columns.get(self._columns.id), default=key),
            more_images=(None,) * (len(images) - 1),
            image_error=missing,
            questions=self._questions(row, subject=subject),
            conversation=self._conversation(row, subject=subject),
            keep={name: json_text(columns.get(name)) for name in self._keep},
            fields={name: columns.get(name) for name in self._fields},
        )

    def _named(self, row: Row) -> tuple[str, ...]:
        """One at least. Raises _NoImage."""
        if not self._images:
            return (_vqa_name(row, self._header),)
        return tuple(name for column in self._images for name in self._listed(row, column))

    def _listed(self, row: Row, column: str) -> Sequence[str]:
        named = names_in(row.get(column))
        if named and all(isinstance(name, str) and name for name in named):
            return named
        told = "names no image"
        if len(named) > 1:
            told += f" at place {_place(named)} of {len(named)}"
        there = ", ".join(list(row)[:MOST_LISTED]) or "nothing"
        raise _NoImage(
            f"column {column!r} {told} (the row has {there}); name the column that holds the "
            "path or URI of the image, or a list of them, in source.columns.image"
        )

    def _questions(
        self, row: Row, *, subject: str
    ) -> Sequence[Question] | QuestionsMalformed | None:
        name = self._columns.questions
        value = row.get(name)
        if value is None and name == ColumnsSpec().questions:
            name, value = _recognised(row, talk=self._columns.conversation)
        if isinstance(value, str):
            value = [value]
        elif _is_talk(value):
            value = _said_by_the_human(value)
        return parse_questions(value, subject=f"{subject}: column {name!r}")

    def _conversation(
        self, row: Row, *, subject: str
    ) -> Sequence[Turn] | ConversationMalformed | None:
        name = self._columns.conversation
        value = None if name is None else row.get(name)
        if _is_talk(value):
            value = _as_turns(value)
            if _has_open_question(value):
                value = value[:-1]
        return parse_conversation(value, subject=f"{subject}: column {name!r}")


class _NoImage(Exception):
    """Why a row has no image."""


def names_in(value: object) -> Sequence[Any]:
    """What a column says of its images: of one, or of each of a list."""
    return value if isinstance(value, list) else [value]


def _place(named: Sequence[object]) -> int:
    """Of the first that is no name; from 1."""
    return next(n for n, name in enumerate(named, 1) if not (isinstance(name, str) and name))


def image_column(row: Row) -> tuple[str, ...]:
    """The column that holds the image, if this row tells it."""
    return next(((name,) for name in IMAGE_NAMES if row.get(name)), ())


def _vqa_name(row: Row, header: Mapping[str, Any]) -> str:
    """The file of an image of VQA, real (COCO's) or of an abstract scene. Raises _NoImage."""
    number, part = row.get("image_id"), header.get("data_subtype")
    kind = header.get("data_type") or "mscoco"
    if isinstance(number, str) and number.isdecimal() and len(number) <= MOST_DIGITS:
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise _NoImage(f"image_id is {number!r:.40}, no number; name source.columns.image")
    if not isinstance(part, str) or not isinstance(kind, str):
        raise _NoImage(
            "the file does not say which images it means (data_subtype); name the column that "
            "holds the path of the image in source.columns.image"
        )
    if kind == "mscoco":
        # The images of this part are the same as the whole test's.
        part = part.replace("test-dev", "test")
        return f"COCO_{part}_{number:012}.jpg"
    return f"{kind}_{part}_{number:012}.png"


def _recognised(row: Row, *, talk: str | None) -> tuple[str, object]:
    """The questions of a row that calls them otherwise, and what it calls them."""
    name = "question" if "question" in row else "text"
    if "question_id" in row:
        return name, [{"id": row["question_id"], "question": _unmarked(row.get(name))}]
    if name == "question":
        return name, row[name]
    if talk is None:
        return TALK, row.get(TALK)
    value = row.get(talk)
    if _is_talk(value) and _has_open_question(turns := _as_turns(value)):
        return talk, [{"question": turns[-1]["content"]}]
    return talk, None


def _is_talk(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether this is a conversation as LLaVA writes it."""
    return isinstance(value, list) and any(isinstance(t, Mapping) and "from" in t for t in value)


def _as_turns(talk: Sequence[Any]) -> list[Any]:
    """In the form that `parse_conversation` takes; what is none stays as it is."""
    return [
        {"role": _role(turn["from"]), "content": _unmarked(turn.get("value"))}
        if isinstance(turn, Mapping) and "from" in turn
        else turn
        for turn in talk
    ]


def _said_by_the_human(talk: Sequence[Any]) -> list[Any]:
    """In the form that `parse_questions` takes; what is no turn stays as it is."""
    return [
        {"question": _unmarked(turn.get("value"))} if isinstance(turn, Mapping) else turn
        for turn in talk
        if not isinstance(turn, Mapping) or _role(turn.get("from")) == "user"
    ]


def _has_open_question(turns: Sequence[Any]) -> bool:
    return bool(turns) and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "user"


def _role(speaker: object) -> object:
    return SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker


def _unmarked(text: object) -> object:
    if not isinstance(text, str) or IMAGE_MARK not in text:
        return text
    return text.replace(IMAGE_MARK, "").strip()
