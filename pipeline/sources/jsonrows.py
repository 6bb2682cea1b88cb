"""The rows of a JSON file, one after the other, however large the file is.

    lines         one value a line (JSONL); blank lines are no rows
    list          one JSON list; its items are the rows
    questions     VQA's questions: an object with a list of objects under this key
    annotations   VQA's annotations, likewise

What it is, is told from its beginning. In memory are a row, and what is read at once. Knows rows,
not what they mean.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.sources.archive import BUFFER_BYTES, GZIP_MAGIC
from pipeline.sources.jsonvalues import DECODER, is_too_deep, parsed, too_deep
from pipeline.sources.opened import open_file
from pipeline.sources.uris import shown
from schemas.errors import ShardUnreadable
from schemas.job import StorageSpec

MOST_ROW_BYTES = 16 * 2**20
"""A longer line is no row; an item of a list may have as many characters."""
HEADER = ("data_type", "data_subtype")
"""What VQA says of all rows."""

BROKEN = (gzip.BadGzipFile, EOFError, zlib.error)
"""What a damaged file raises."""

Layout = Literal["lines", "list", "questions", "annotations"]


class NoRow(Exception):
    """Why something is no row."""


class Entry(NamedTuple):
    """`number`: of its line, from 1, or of its item, from 0. `value`: a line is bytes still."""

    number: int
    value: Any

    def row(self) -> dict[str, Any]:
        """Raises NoRow."""
        value = _parsed(self.value) if isinstance(self.value, bytes) else self.value
        if isinstance(value, NoRow):
            raise value
        if not isinstance(value, dict):
            raise NoRow(f"it holds {type(value).__name__}, not an object")
        return value


@dataclass
class RowFile:
    """An open file. `header`: what the object says beside its rows, complete when they are over."""

    layout: Layout
    stream: io.BufferedIOBase
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return "line" if self.layout == "lines" else "item"

    def entries(self) -> Iterator[Entry]:
        """Every row; raises NoRow where a list or an object breaks off."""
        if self.layout == "lines":
            yield from _lines(self.stream)
            return
        text = JsonText(self.stream)
        for number, value in enumerate(self._values(text)):
            yield Entry(number, value)
        if text.peek():
            raise NoRow("more follows after the end")

    def _values(self, text: "JsonText") -> Iterator[object]:
        if self.layout == "list":
            return _items(text)
        return (item for name, item in _listed(text, self.header) if name == self.layout)


@contextmanager
def open_rows(uri: str, storage: StorageSpec) -> Iterator[RowFile]:
    """The file at `uri`, plain or compressed by gzip.

    Raises, from inside the `with` block too, ShardUnreadable where the file is broken, gone or
    forbidden, and StoreUnavailable where the store fails.
    """
    try:
        with _stream(uri, storage) as stream:
            layout = _layout(JsonText(stream))
        with _stream(uri, storage) as stream:
            yield RowFile(layout, stream)
    except (NoRow, *BROKEN) as error:
        raise ShardUnreadable(f"{shown(uri)}: cannot be read on: {error}") from error


@contextmanager
def _stream(uri: str, storage: StorageSpec) -> Iterator[io.BufferedIOBase]:
    with open_file(uri, storage) as file:
        stream = io.BufferedReader(file, BUFFER_BYTES)
        is_gzip = stream.peek(len(GZIP_MAGIC))[: len(GZIP_MAGIC)] == GZIP_MAGIC
        yield gzip.GzipFile(fileobj=stream, mode="rb") if is_gzip else stream


def _layout(text: "JsonText") -> Layout:
    """Raises NoRow for one object over several lines that is none of the known."""
    mark = text.peek()
    if mark == "[":
        return "list"
    if mark != "{":
        return "lines"
    text.has_passed_lines = False
    try:
        found = _key_of_rows(text)
    except NoRow:
        return "lines"
    if found is None and text.has_passed_lines:
        raise NoRow(
            "it holds one object, over several lines, without VQA's questions; write one object a "
            "line, or a list of objects"
        )
    return found or "lines"


def _key_of_rows(text: "JsonText") -> Layout | None:
    """Under which key of an object there are VQA's rows."""
    for name, item in _listed(text, {}):
        if isinstance(item, dict) and {"question_id", "image_id"} <= item.keys():
            if name == "questions":
                return "questions"
            if name == "annotations":
                return "annotations"
    return None


def _lines(stream: io.BufferedIOBase) -> Iterator[Entry]:
    number = 0
    while line := stream.readline(MOST_ROW_BYTES + 1):
        number += 1
        value: object = line
        if len(line) > MOST_ROW_BYTES:
            value = NoRow(f"it is longer than {MOST_ROW_BYTES:,} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(MOST_ROW_BYTES)
        elif number == 1:
            value = line.removeprefix(codecs.BOM_UTF8)
        if not isinstance(value, bytes) or value.strip():
            yield Entry(number, value)


def _parsed(line: bytes) -> Any:
    try:
        return parsed(line.decode())
    except json.JSONDecodeError as error:
        return NoRow(f"it is no JSON: {error.msg} at character {error.pos}")
    except UnicodeDecodeError as error:
        return NoRow(f"it is no UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:
        return NoRow(f"it cannot be read: {error}")


def _items(text: "JsonText") -> Iterator[object]:
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        text.take_comma("]")
    text.take("]")


def _listed(text: "JsonText", header: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The items of the lists in an object, each with its key; of the rest, the header is kept."""
    text.take("{")
    while text.peek() != "}":
        name = text.key()
        if text.peek() == "[":
            for item in _items(text):
                yield name, item
        else:
            value = text.value()
            header.update({name: value} if name in HEADER else {})
        text.take_comma("}")
    text.take("}")


_SPACE = re.compile(r"[ \t\n\r]*")
_UNDECODED = re.compile("[\udc80-\udcff]")
"""How `surrogateescape` writes bytes that are no UTF-8."""


class JsonText:
    """The text of a JSON document, of which the part at hand is in memory."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._at = 0
        self._is_over = False
        self.has_passed_lines = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self.has_passed_lines |= "\n" in space[0]
            self._at = space.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, mark: str) -> None:
        """Pass over a mark; raises NoRow where another one stands."""
        if (found := self.peek()) != mark:
            there = f"{found!a} stands" if found else "the file ends"
            raise NoRow(f"{there} where {mark} is due")
        self._at += 1

    def take_comma(self, end: str) -> None:
        """Pass over a comma, unless the end is next."""
        if self.peek() != end:
            self.take(",")

    def key(self) -> str:
        key = self.value()
        self.take(":")
        if not isinstance(key, str):
            raise NoRow("the key of an object is no text")
        return key

    def value(self) -> object:
        """The next value; raises NoRow where none can be read.

        One that holds bytes which are no UTF-8, or is nested too deep, is a NoRow itself: what
        follows it can be read.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                pending = len(self._text) - self._at
                if pending < MOST_ROW_BYTES and self._more(pending):
                    continue
                reason = getattr(error, "msg", None) or str(error)
                raise NoRow(f"no JSON value can be read: {reason}") from error
            # A number may go on after what is in memory.
            if end < len(self._text) or not self._more():
                break
        is_text = _UNDECODED.search(self._text, self._at, end) is None
        self.has_passed_lines |= self._text.find("\n", self._at, end) >= 0
        self._at = end
        if is_too_deep(value):
            return NoRow(f"it cannot be read: {too_deep()}")
        return value if is_text else NoRow("it is no UTF-8")

    def _more(self, least: int = 1) -> bool:
        """Read on, as many characters at least as there are; false at the end of the file."""
        parts = [self._text[self._at :]]
        more = 0
        while more < max(least, 1) and not self._is_over:
            data = self._stream.read1(BUFFER_BYTES)
            self._is_over = not data
            parts.append(self._decoder.decode(data, final=self._is_over))
            more += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return more > 0
