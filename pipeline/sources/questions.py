"""A row's own questions and earlier turns: from what JSON held to Question and Turn, or the reason.

Knows neither where the values come from nor how they are asked: `subject` names the column for the
messages, and what cannot be understood is returned as the row's error.
"""

from collections.abc import Mapping

from pipeline.sources.base import Question, Turn, valid_text
from schemas.errors import ConversationMalformed, QuestionsMalformed

ROLES = ("system", "user", "assistant")


def parse_questions(
    value: object, *, subject: str
) -> tuple[Question, ...] | QuestionsMalformed | None:
    """A list of {id, question} or of strings; an id left out is `q` and the position.

    None, as a column that is absent gives it, stays None: the row has no questions of its own.
    """
    if value is None:
        return None
    try:
        return _questions(value)
    except _Malformed as reason:
        return QuestionsMalformed(f"{subject}: {reason}; wants a list of {{id, question}}")


def parse_conversation(
    value: object, *, subject: str
) -> tuple[Turn, ...] | ConversationMalformed | None:
    """A list of {role, content}: at most one system turn, first, then user and assistant in turn.

    The last turn is the assistant's, since the question comes next. An empty list is no
    conversation; None stays None.
    """
    if value is None:
        return None
    try:
        return _turns(value)
    except _Malformed as reason:
        return ConversationMalformed(f"{subject}: {reason}; wants a list of {{role, content}}")


class _Malformed(Exception):
    """Why a value cannot be understood."""


def _questions(value: object) -> tuple[Question, ...]:
    questions: list[Question] = []
    seen: set[str] = set()
    for position, item in enumerate(_list(value)):
        question = _question(item, position=position)
        if question.id in seen:
            raise _Malformed(f"the id {question.id!r} is given twice")
        seen.add(question.id)
        questions.append(question)
    return tuple(questions)


def _question(item: object, *, position: int) -> Question:
    if isinstance(item, str):
        item = {"question": item}
    if not isinstance(item, Mapping):
        raise _Malformed(f"item {position} is {_kind(item)}")
    if "question" not in item:
        raise _Malformed(f"item {position} has no `question`")
    text = item["question"]
    if not isinstance(text, str) or not text.strip():
        raise _Malformed(f"`question` of item {position} is {_kind(text)}")
    return Question(_question_id(item.get("id"), position=position), valid_text(text))


def _question_id(value: object, *, position: int) -> str:
    if value is None:
        return f"q{position}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return valid_text(value)
    raise _Malformed(f"`id` of item {position} is {_kind(value)}")


def _turns(value: object) -> tuple[Turn, ...]:
    turns = tuple(_turn(item, position=position) for position, item in enumerate(_list(value)))
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    for position, turn in enumerate(talk, start=len(turns) - len(talk)):
        wanted = "user" if (position - (len(turns) - len(talk))) % 2 == 0 else "assistant"
        if turn.role != wanted:
            raise _Malformed(f"item {position} is of the {turn.role} where the {wanted} is due")
    if turns and turns[-1].role != "assistant":
        raise _Malformed(f"the last turn is of the {turns[-1].role}, not of the assistant")
    return turns


def _turn(item: object, *, position: int) -> Turn:
    if not isinstance(item, Mapping):
        raise _Malformed(f"item {position} is {_kind(item)}")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise _Malformed(
            f"`role` of item {position} is {role!r:.40}, not one of {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise _Malformed(f"`content` of item {position} is {_kind(content)}")
    return Turn(str(role), valid_text(content))


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _Malformed(f"it is {_kind(value)}")
    return value


def _kind(value: object) -> str:
    """What a value is in the words of JSON."""
    if value is None:
        return "null or missing"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"
