"""VQA's annotation JSON: what is known of the questions of another file, by their ids."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline.sources.grouping import PutAside
from pipeline.sources.jsonrows import NoRow, open_rows
from pipeline.storage import StoredFile
from schemas.errors import ShardUnreadable
from schemas.job import StorageSpec

Row = dict[str, Any]


def is_called(file: StoredFile, word: str) -> bool:
    """Whether the file's own name holds the word, as `v2_mscoco_val2014_annotations.json` does."""
    return word in PurePosixPath(file.uri).name.lower()


def annotations_among(files: Iterable[StoredFile]) -> Sequence[StoredFile]:
    """Those that are annotations by their names."""
    return [file for file in files if is_called(file, "annotations")]


class Annotations:
    """What annotation files say of each question, for some columns. Empty until it is read."""

    def __init__(self, aside: PutAside, columns: Sequence[str]) -> None:
        self._aside, self._columns = aside, columns

    def read(self, uri: str, storage: StorageSpec) -> None:
        """Take in a file, as far as it is whole; one that is no annotations is passed over.

        Raises StoreUnavailable.
        """
        try:
            with open_rows(uri, storage) as file:
                for entry in file.entries() if file.layout == "annotations" else ():
                    try:
                        row = entry.row()
                    except NoRow:
                        continue
                    known = {name: row[name] for name in self._columns if name in row}
                    self._aside.add(_key(row), known)
        except ShardUnreadable:
            # As a file of the source it says so itself, in a row of its own.
            return

    def of(self, row: Mapping[str, Any] | str) -> Row:
        """The columns that are known of a question."""
        if isinstance(row, str) or not len(self._aside):
            return {}
        known: Row | None = self._aside.get(_key(row))
        return known or {}


def _key(row: Mapping[str, Any]) -> str:
    return f"{row.get('question_id')} {row.get('image_id')}"
