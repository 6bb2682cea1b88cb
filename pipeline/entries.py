"""What a row is asked: a PROMPT entry for each question and turn, before anything is tokenised.

What can be said without a model is said here: the questions' words, what is skipped, what cannot be
asked. A question that looks at earlier answers, and every turn but the first, is `is_later`: it is
worded or rendered when these are known (`talk.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.script import Script, with_needed
from schemas.ask import AskRow
from schemas.errors import PromptError, QuestionsMalformed, RowError
from schemas.job import JobSpec
from schemas.tables import NOT_ASKED, PROMPT, error_of

_NO_QUESTIONS = {
    "stage": "prompt",
    "class": "NoQuestions",
    "message": "the row brings no questions of its own: there is nothing to answer",
}
"""Why a row is skipped; no RowError, since nothing is wrong with it."""

_NOTHING = dict.fromkeys(field.name for field in PROMPT)

Entry = dict[str, Any]
"""One PROMPT struct in the making."""
Line = Mapping[str, Any]
"""A SAMPLE_LINE struct."""


class Entries:
    """`of(line, uri)`: the entries of a line; never none."""

    def __init__(self, job: JobSpec, scripts: Mapping[str, Script]) -> None:
        self._scripts = scripts
        self._has_needs = any(script.needs for script in scripts.values())
        self._longest = {
            unit: job.decoding(script.ask).max_new_tokens for unit, script in scripts.items()
        }

    def of(self, line: Line, uri: str) -> list[Entry]:
        if line["error"]:
            return [fail(_entry(), line["error"])]
        entries = [entry for unit in self._units(line) for entry in self._of(unit, line, uri)]
        if line["skip"]:
            for entry in waiting(entries):
                entry.update(status="skipped", error=line["skip"])
        if error := line["image_error"] or line["conversation_error"]:
            for entry in ready(entries):
                fail(entry, error)
        return entries

    def _units(self, line: Line) -> Sequence[str]:
        units: Sequence[str] = line["units"]
        return with_needed(units, self._scripts) if self._has_needs else units

    def _of(self, unit: str, line: Line, uri: str) -> Iterator[Entry]:
        script = self._scripts[unit]
        questions: list[tuple[str, int, str | None]]
        if not isinstance(script.ask, AskRow):
            questions = [(unit, turn, None) for turn in range(len(script.turns))]
        elif line["questions_error"]:
            yield fail(_entry(), line["questions_error"])
            return
        elif not line["questions"]:
            yield {**_entry(), "status": "skipped", "error": _NO_QUESTIONS}
            return
        elif error := _ids_that_collide(line["questions"], taken=set(self._scripts)):
            yield fail(_entry(), error_of(error))
            return
        else:
            own = line["questions"]
            questions = [(each["id"], 0, script.worded(each["question"])) for each in own]
        row = json.loads(line["columns"]) if line["columns"] else {}
        for id, turn, question in questions:
            entry = _entry(
                unit=unit,
                question_id=id,
                turn=turn,
                question=question,
                is_later=bool(script.needs or turn),
                is_extra=unit not in line["units"],
                max_new_tokens=self._longest[unit],
            )
            if not script.needs:
                word(entry, script, row=row, answers={}, place=[uri, line["source_index"]])
            yield entry


def word(
    entry: Entry,
    script: Script,
    *,
    row: Mapping[str, object],
    answers: Mapping[str, str],
    place: Sequence[object],
) -> None:
    """Give an entry its question, once the answers are known that it looks at; or say why it is
    not asked."""
    try:
        # First: a condition may be there to keep the prompt from rows that cannot fill it in.
        if reason := script.unasked(row=row, answers=answers):
            skip(entry, NOT_ASKED, reason)
        elif entry["question"] is None:
            entry["question"] = script.question(
                entry["turn"], row=row, answers=answers, place=place
            )
    except PromptError as error:
        fail(entry, error_of(error))


def _entry(**known: str | int | bool | None) -> Entry:
    return {**_NOTHING, "turn": 0, "is_later": False, "is_extra": False, **known}


def waiting(entries: Sequence[Entry]) -> list[Entry]:
    """Those that the model is still to answer."""
    return [entry for entry in entries if entry["status"] is None]


def ready(entries: Sequence[Entry]) -> list[Entry]:
    """Those of them that wait for nothing but the model."""
    return [entry for entry in waiting(entries) if not entry["is_later"]]


def fail(entry: Entry, error: Mapping[str, str] | None) -> Entry:
    entry.update(status="failed", error=error)
    return entry


def skip(entry: Entry, reason: str, message: str) -> None:
    """Not asked, and nothing is wrong with it."""
    entry.update(status="skipped", error={"stage": "prompt", "class": reason, "message": message})


def _ids_that_collide(questions: list[dict[str, str]], *, taken: set[str]) -> RowError | None:
    """Two answers of one row under one id could not be told apart."""
    seen = set(taken)
    for question in questions:
        if question["id"] in seen:
            return QuestionsMalformed(
                f"the question id {question['id']!r} is used twice, by the row's questions or by "
                "the spec's ask: ids of one row must be distinct"
            )
        seen.add(question["id"])
    return None
