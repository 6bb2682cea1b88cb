"""The step that makes answers durable: a batch of answers in, one staged part out.

It returns only when the part is there, whole, under a name made from what it covers, so that a
write that is tried again lands on itself. It buffers nothing and decides nothing: which parts count
is the committer's business (`commit.py`).
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION, Fingerprint, Footer
from pipeline.parts import RECEIPT, STAGING, SUFFIX, part_bytes, read_info, tally_of
from pipeline.storage import Output, store_errors
from schemas.errors import JobError
from schemas.job import OutputSpec
from schemas.tables import KEEP, answer_schema, answered_schema, table_of

Row = Mapping[str, Any]

PLACE_COLUMNS = (
    "source_uri",
    "shard_identity",
    "source_index",
    "rows_total",
    "units",
    "row_answers",
    "question_id",
)


def write_part(
    answered: pa.Table,
    *,
    output: OutputSpec,
    keep: Mapping[str, pa.DataType],
    fingerprint: Fingerprint,
    again: bool = False,
) -> pa.Table:
    """Stage a batch of `answered_schema(keep)` rows as one part; returns its one RECEIPT row.

    `again`: they take the place of failed rows. A batch without rows gives no receipt. Raises
    JobError for a source row that is not whole, and where the store has failed for
    `output.retry_s`.
    """
    if not answered.num_rows:
        return RECEIPT.empty_table()
    _check_columns(answered, wanted=answered_schema(keep))
    shards = coverage_of(answered.select(list(PLACE_COLUMNS)).to_pylist())
    answers = _answers(answered, keep=keep, prompts=output.prompts)
    footer = Footer(
        shards=shards,
        fingerprint=fingerprint,
        run_ids=tuple(sorted(pc.unique(answers["run_id"]).drop_null().to_pylist())),
        tally=tally_of(answers),
        again=again,
    )
    store = Output(output.path, output.storage, retry_s=output.retry_s)
    with store_failures_as_job_errors(store):
        return _stage(answers, footer, output=store)


@contextlib.contextmanager
def store_failures_as_job_errors(output: Output) -> Iterator[None]:
    try:
        yield
    except store_errors() as error:
        raise JobError(
            f"{output.uri}: the store failed: {error}; run the same command again: it goes on "
            "from here"
        ) from error


def coverage_of(rows: Iterable[Row]) -> tuple[ShardCoverage, ...]:
    """What answered rows and end marks cover, a shard at a time.

    Raises JobError for a source row that has not as many answers as it says.
    """
    places: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        shard = (row["source_uri"], row["shard_identity"])
        answers = places[shard]
        if row["rows_total"] is not None:
            totals[shard] = row["rows_total"]
        if row["source_index"] is not None:
            answers[row["source_index"]].append(row)
    return tuple(
        ShardCoverage(
            uri, identity, totals.get((uri, identity)), _units(uri, places[uri, identity])
        )
        for uri, identity in sorted(places)
    )


def _units(uri: str, places: Mapping[int, Sequence[Row]]) -> dict[str, Ranges]:
    indexes: dict[str, list[int]] = defaultdict(list)
    for index, rows in places.items():
        _check_whole(rows, place=f"{uri} row {index}")
        for unit in rows[0]["units"] or ():
            indexes[unit].append(index)
        if any(row["question_id"] is None for row in rows):
            indexes[NULL_QUESTION].append(index)
    return {unit: Ranges.of_indexes(indexes[unit]) for unit in sorted(indexes)}


def _check_whole(rows: Sequence[Row], *, place: str) -> None:
    promised = {row["row_answers"] for row in rows}
    if promised != {len(rows)}:
        raise JobError(
            f"write: {place}: {len(rows)} answers came where {sorted(promised, key=str)} were "
            "promised (row_answers); a source row's answers must come in one batch"
        )
    if any(row["units"] != rows[0]["units"] for row in rows):
        raise JobError(f"write: {place}: its answers do not agree on the units that they cover")


def _check_columns(answered: pa.Table, *, wanted: pa.Schema) -> None:
    if missing := [name for name in wanted.names if name not in answered.column_names]:
        raise JobError(
            f"write: columns {missing} are missing; wants {wanted.names}, "
            f"got {answered.column_names}"
        )


def _answers(answered: pa.Table, *, keep: Mapping[str, pa.DataType], prompts: bool) -> pa.Table:
    """The rows that a user sees, in exactly the schema of the answer table."""
    schema = answer_schema(keep, prompts=prompts)
    rows = answered.filter(pc.is_valid(answered["source_index"]))
    inner = [KEEP + name if name in keep else name for name in schema.names]
    return rows.select(inner).rename_columns(schema.names).cast(schema).combine_chunks()


def _stage(answers: pa.Table, footer: Footer, *, output: Output) -> pa.Table:
    name = f"{STAGING}/{footer.key}{SUFFIX}"
    if not output.publish(name, part_bytes(answers, footer)):
        footer = _footer_there(output, name, ours=footer)
    return table_of([{"part": name, "footer": footer.to_bytes().decode()}], RECEIPT)


def _footer_there(output: Output, name: str, *, ours: Footer) -> Footer:
    """The footer of the attempt that came first: it covers the same, but may differ in outcome."""
    try:
        return read_info(output, name).footer
    except FileNotFoundError:
        # Folded since: the committer, which knows it by what it covers, drops this receipt.
        return ours
