"""Answered rows for tests: what the generate step would hand to the write step."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.footer import Fingerprint
from schemas.tables import answered_schema, table_of

FINGERPRINT = Fingerprint(
    model={"weights": "w1", "dtype": "float32"},
    questions={"caption": "c1", "colour": "k1", "questions": "q1"},
)
IDENTITY = "etag-1"


class FreeLease:
    """A lease that nobody contends for; each has the next number."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(FreeLease._numbers)

    def check(self) -> None:
        return


def row(
    index: int,
    ids: Sequence[str | None] = ("caption",),
    *,
    uri: str = "a.tar",
    units: Sequence[str] | None = None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """A source row with one answer for each id, which cover `units` (the ids, where left out)."""
    place = {
        "source_uri": uri,
        "source_index": index,
        "shard_identity": IDENTITY,
        "sample_id": f"{uri}-{index}",
        "units": list(units if units is not None else [i for i in ids if i]),
        "row_answers": len(ids),
    }
    answer = {"turn": 0, "sample_number": 0, "status": "ok", "attempts": 1, "run_id": "run-1"}
    answer |= {"question": "what?", "answer": f"answer {index}"}
    return [{**place, **answer, "question_id": each, **columns} for each in ids]


def failed(index: int, ids: Sequence[str | None] = (None,), **columns: Any) -> list[dict[str, Any]]:
    error = {
        "error_stage": "decode",
        "error_class": "ImageCorrupt",
        "error_message": f"bad {index}",
    }
    columns = {"status": "failed", "answer": None, "units": ["caption"], **error, **columns}
    return row(index, ids, **columns)


def end(rows_total: int, *, uri: str = "a.tar") -> list[dict[str, Any]]:
    """The end mark of a shard."""
    return [{"source_uri": uri, "shard_identity": IDENTITY, "rows_total": rows_total}]


def answered(*rows: Iterable[dict[str, Any]], **keep: pa.DataType) -> pa.Table:
    return table_of([each for group in rows for each in group], answered_schema(keep))


def identities(path: object, folder: str = "answers") -> list[tuple[str, int, str | None]]:
    """The (uri, index, question id) of each row of the table, in the order in which it lies."""
    table = ds.dataset(f"{path}/{folder}", format="parquet").to_table()
    return [(r["source_uri"], r["source_index"], r["question_id"]) for r in table.to_pylist()]
