"""The Arrow schemas: what a row looks like between the stages, and in the answer table.

    SAMPLE     read -> prepare       one row an image, with its bytes, and its lines
    PREPARED   prepare -> generate   one row an image, with uint8 pixels, and its lines' prompts
    ANSWERED   generate -> write     one row an answer, with what it covers
    answers    the table of the user: ANSWERED without its bookkeeping

A row of the source is a line here: a manifest may have many on one image, which is looked at once;
other formats have one line an image. Source columns that are kept travel as `keep.NAME`, so that no
name can collide with a column of ours; up to ANSWERED, as lists that go with the lines.

A shard's last row is followed by an end mark: a row whose `rows_total` is set and which has neither
lines nor a `source_index`; where the length is known beforehand (a file of one image), the rows
themselves carry it. It travels through the stages untouched, so that the part that carries it can
say how long the shard is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from schemas.errors import RowError

SCHEMA_VERSION = 1
KEEP = "keep."

ERROR = pa.struct([("stage", pa.string()), ("class", pa.string()), ("message", pa.string())])
"""A RowError on its way to the answer table; null when all is well."""

EARLIER_FAILED, NOT_ASKED = "EarlierFailed", "NotAsked"
"""`error_class` of what is skipped: for want of an answer that failed, which a retry may bring; or
because its condition does not hold, or an answer that it looks at was not asked for."""

SHARD = (
    pa.field("source_uri", pa.string()),
    pa.field("shard_identity", pa.string()),
    pa.field("rows_total", pa.int64()),
)
"""What a row says of its shard, from stage to stage; an end mark says nothing else."""
LINE = (
    pa.field("source_index", pa.int64()),
    pa.field("sample_id", pa.string()),
    pa.field("units", pa.list_(pa.string())),
)
"""What a line says of itself. `units`: the units of coverage still to be answered for it."""

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
"""One message of an earlier conversation."""

SAMPLE_LINE = pa.struct(
    [
        *LINE,
        ("questions", pa.list_(pa.struct([("id", pa.string()), ("question", pa.string())]))),
        ("questions_error", ERROR),
        ("conversation", pa.list_(TURN)),
        ("conversation_error", ERROR),
        ("columns", pa.string()),
        ("image_error", ERROR),
        ("skip", ERROR),
        ("error", ERROR),
    ]
)
"""`questions`: the line's own, null where the source has none; `questions_error` says why they
cannot be known, `conversation_error` why no question of the line can be rendered, `image_error` why
it has no image, `skip` why none of its questions is to be answered. `columns`: what prompts and
conditions look at, as a JSON object; null where they look at none. `error`: the line itself cannot
be read."""

SAMPLE = pa.schema(
    [
        *SHARD,
        pa.field("image", pa.large_binary()),
        pa.field("more_images", pa.list_(pa.large_binary())),
        pa.field("lines", pa.list_(SAMPLE_LINE)),
    ]
)
"""`more_images`: what follows the first in the prompts of a row that has several, else null."""

CHOICES = pa.struct([("shared_tokens", pa.int32()), ("token_ids", pa.list_(pa.list_(pa.int32())))])
"""The answers that a prompt may have: so many of its first tokens stay with an answer behind them,
and what follows these."""

PROMPT = pa.struct(
    [
        ("unit", pa.string()),
        ("question_id", pa.string()),
        ("turn", pa.int16()),
        ("is_later", pa.bool_()),
        ("is_extra", pa.bool_()),
        ("question", pa.string()),
        ("prompt", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("choices", CHOICES),
        ("max_new_tokens", pa.int32()),
        ("status", pa.string()),
        ("error", ERROR),
    ]
)
"""One question of a line, rendered and tokenised with its image tokens expanded. `unit`: of
coverage, null where it stands for several. `is_later`: it waits for answers about the line, and
nothing but its question is known yet, at most. `is_extra`: it is asked for the sake of others, and
has an answer already. `choices`: null where answers are free. `status` is null where the model is
to answer, else `failed` or `skipped` with its `error`."""

PREPARED_LINE = pa.struct(
    [
        *LINE,
        ("prompts", pa.list_(PROMPT)),
        ("conversation", pa.list_(TURN)),
        ("columns", pa.string()),
    ]
)
"""`conversation` and `columns`: of SAMPLE_LINE, where a prompt is later; else null."""

MORE_IMAGE = pa.struct(
    [
        ("pixels", pa.large_binary()),
        ("pixels_shape", pa.list_(pa.int32())),
        ("image_sha256", pa.string()),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
    ]
)
"""What a row says of an image behind its first; of the first, PREPARED has these as columns."""

PREPARED = pa.schema(
    [
        *SHARD,
        *MORE_IMAGE,
        pa.field("more_images", pa.list_(MORE_IMAGE)),
        pa.field("lines", pa.list_(PREPARED_LINE)),
    ]
)
"""`pixels`: uint8 of `pixels_shape`, [H, W, 3] or [tiles, H, W, 3], row-major, resized as the
processor does, not yet normalised; null where no prompt of any line needs them. Of a model that
goes the slow path, safetensors of what its processor gives, without a shape. `more_images`: null
where a row has one, or none."""

_ANSWER = [
    pa.field("source_uri", pa.string()),
    pa.field("source_index", pa.int64()),
    pa.field("sample_id", pa.string()),
    pa.field("question_id", pa.string()),
    pa.field("turn", pa.int16()),
    pa.field("sample_number", pa.int16()),
    pa.field("question", pa.string()),
    pa.field("answer", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("error_class", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int16()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("output_tokens", pa.int32()),
    pa.field("mean_logprob", pa.float32()),
    pa.field(
        "choice_probs",
        pa.list_(pa.struct([("choice", pa.string()), ("prob", pa.float32())])),
    ),
    pa.field("image_sha256", pa.string()),
    pa.field("image_width", pa.int32()),
    pa.field("image_height", pa.int32()),
    pa.field("prompt", pa.string()),
    pa.field("model", pa.string()),
    pa.field("run_id", pa.string()),
    pa.field("answered_at", pa.timestamp("us", tz="UTC")),
]

_BOOKKEEPING = [
    pa.field("shard_identity", pa.string()),
    pa.field("rows_total", pa.int64()),
    pa.field("units", pa.list_(pa.string())),
    pa.field("row_answers", pa.int32()),
]
"""What the write step needs and the table does not show: the units that the source row's answers
cover, and how many answers it has, to prove that none was left behind."""


def error_of(error: RowError | None) -> dict[str, str] | None:
    """A row error as an ERROR struct."""
    if error is None:
        return None
    return {"stage": error.stage, "class": type(error).__name__, "message": str(error)}


def with_keep(schema: pa.Schema, keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """SAMPLE or PREPARED plus the kept columns, prefixed: in each row a value for each line."""
    lists = (pa.field(KEEP + name, pa.list_(kind)) for name, kind in keep.items())
    return pa.schema([*schema, *lists])


def answered_schema(keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """The schema of what generate hands to write."""
    kept = (pa.field(KEEP + name, kind) for name, kind in keep.items())
    return pa.schema([*_ANSWER, *_BOOKKEEPING, *kept])


def answer_schema(keep: Mapping[str, pa.DataType], *, prompts: bool) -> pa.Schema:
    """The schema of the answer table; `prompt` is there only with `output.prompts: true`."""
    columns = [field for field in _ANSWER if prompts or field.name != "prompt"]
    return pa.schema([*columns, *(pa.field(name, kind) for name, kind in keep.items())])


RESERVED_COLUMNS = frozenset(field.name for field in _ANSWER)
"""Names that `source.keep` cannot use."""


def table_of(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly `schema`; a key that a row lacks is null.

    Raises KeyError for a key that the schema does not know, which `Table.from_pylist` drops.
    """
    listed: Sequence[Mapping[str, Any]] = list(rows)
    known = set(schema.names)
    for row in listed:
        if unknown := row.keys() - known:
            raise KeyError(f"columns {sorted(unknown)} are not in the schema {schema.names}")
    return pa.Table.from_pylist([dict(row) for row in listed], schema=schema)
