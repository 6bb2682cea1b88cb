"""Laws of what people and programs write, and cases for them made by hypothesis.

rows         any JSON ends as tables, and as prompts
specs        a job, or a SpecError
conditions   hold, do not hold or fail, each row for itself; or a SpecError
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from jobs import yaml12
from jobs.load import build_spec, dump_spec, load_spec
from pipeline.coverage import ShardCoverage
from pipeline.encode import Encode
from pipeline.read import ReadTask, ShardWork, read_shards
from pipeline.sources import open_source
from pipeline.sources.base import Shard
from pipeline.where import parse_where
from schemas.errors import FilterFailed, SpecError
from schemas.job import JobSpec
from schemas.tables import KEEP
from tests.damage import BYTES, Edit, damage, damaged
from tests.fuzz import folder
from tests.shards import image_bytes, tar_bytes

# Rows of any JSON

TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["", "\0", "\ud800", "a\udfffb", "<image>", "{}", "\u2028", "e\u0301", "😀", "  "]
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**63, -(2**63) - 1, math.inf, -0.0, 5e-324]),
)
DEPTHS = (50, 99, 100, 101, 300, 600, 900, 970)
DIGITS = (400, 4300, 5000)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4),
    max_leaves=8,
)
RAW = st.one_of(
    st.builds(json.dumps, VALUES, ensure_ascii=st.booleans()),
    st.sampled_from(["1e999", "-1e999", "NaN", "-Infinity", '{"a": 1, "a": [2]}', '"\\ud800"']),
    st.builds("{}{}".format, st.sampled_from(["", "-"]), st.sampled_from(DIGITS).map("9".__mul__)),
    st.sampled_from(DIGITS).map(lambda n: json.dumps("9" * n)),
    st.sampled_from(DEPTHS).map(lambda n: "[" * n + "]" * n),
    st.sampled_from(DEPTHS).map(lambda n: '{"a":' * n + "1" + "}" * n),
)
"""Texts of JSON, some of which no program that follows the standard would write."""
ASKED = st.one_of(
    RAW,
    st.builds("[{}]".format, RAW),
    st.builds('[{{"id": {}, "question": {}}}]'.format, RAW, RAW),
    st.builds('[{{"from": {}, "value": {}}}]'.format, RAW, RAW),
    st.builds('[{{"role": {}, "content": {}}}]'.format, RAW, RAW),
    st.builds('[{{"from": "human", "value": {}}}]'.format, RAW),
    st.builds('[{{"role": "user", "content": {}}}]'.format, RAW),
)
COLUMNS = {
    "image": RAW | st.just('"a.png"'),
    "id": RAW,
    "question_id": RAW,
    "image_id": RAW,
    "text": RAW,
    "width": RAW,
    "questions": ASKED,
    "conversations": ASKED,
}
LINES = st.fixed_dictionaries({}, optional=COLUMNS).map(
    lambda row: "{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}"
)
WHERES = (
    None,
    "width >= 0",
    "len(text) > 0 or width is None",
    "image_id.a + 1 < 3",
    'conversations == "x" and id in [1, 2]',
)


class RowsCase(NamedTuple):
    lines: list[str]
    where: str | None
    talk: bool


ROWS = st.builds(
    RowsCase, st.lists(LINES, min_size=1, max_size=4), st.sampled_from(WHERES), st.booleans()
)


def tar(lines: Sequence[bytes]) -> bytes:
    image = image_bytes()
    pairs = ([(f"{n}.png", image), (f"{n}.json", line)] for n, line in enumerate(lines))
    return tar_bytes([member for pair in pairs for member in pair])


def questions(lines: Sequence[bytes]) -> bytes:
    """As VQA has them; the first row has to tell that it is one of VQA's."""
    first = b'{"question_id": 0, "image_id": 1, "question": "what?"}'
    rows = b", ".join([first, *lines])
    return b'{"data_subtype": "val2014", "questions": [' + rows + b'], "data_type": "mscoco"}'


FORMS: dict[str, Callable[[Sequence[bytes]], bytes]] = {
    "rows.tar": tar,
    "rows.jsonl": lambda lines: b"".join(line + b"\n" for line in lines),
    "list.json": lambda lines: b"[" + b",\n".join(lines) + b"]",
    "questions.json": questions,
}


def rows_become_tables(case: RowsCase) -> None:
    """Each row once, whatever it holds; a list may break off at what no parser takes."""
    for name in FORMS:
        indexes = [line["source_index"] for line in lines_of(tables_of(name, case))]
        assert sorted(indexes) == [*range(len(indexes))]
        assert len(indexes) == len(case.lines) or name.endswith(".json")


def expect_strict_json(table: pa.Table) -> None:
    for name in (name for name in table.column_names if name.startswith(KEEP)):
        for text in table[name].combine_chunks().flatten().drop_null().to_pylist():
            json.loads(text, parse_constant=refuse)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def tables_of(name: str, case: RowsCase) -> list[pa.Table]:
    path = folder() / name
    path.write_bytes(FORMS[name]([line.encode("utf-8", "surrogatepass") for line in case.lines]))
    job = rows_job(path, case)
    keep = open_source(job.source).keep_types()
    work = ShardWork(Shard(str(path), "1"), ShardCoverage(str(path), "1"))
    tables = list(read_shards(job, ReadTask([work]), keep=keep, on_failure=pytest.fail))
    for table in tables:
        table.validate(full=True)
        expect_strict_json(table)
    return tables


def rows_job(path: Path, case: RowsCase) -> JobSpec:
    source: dict[str, Any] = {"path": str(path), "where": case.where}
    source["format"] = "webdataset" if path.suffix == ".tar" else "manifest"
    source["keep"] = ["width", "image_id", "questions"]
    source["columns"] = {"id": "id", "conversation": "conversations" if case.talk else None}
    ask = [{"id": "what", "prompt": "what is this?"}, {"from": "questions"}]
    return JobSpec.model_validate({"source": source, "ask": ask, "output": {"path": "/nowhere"}})


def rows_become_prompts(case: RowsCase) -> None:
    """As members of a tar, since their images are there."""
    for table in tables_of("rows.tar", case._replace(where=None)):
        prepared = encoder(case.talk)(table)
        prepared.validate(full=True)
        lines = lines_of([prepared])
        assert len(lines) == len(lines_of([table]))
        for line in lines:
            statuses = [prompt["status"] for prompt in line["prompts"]]
            assert statuses
            assert {*statuses} <= {None, "failed", "skipped"}


@functools.cache
def encoder(talk: bool) -> Encode:
    job = rows_job(folder() / "rows.tar", RowsCase([], None, talk))
    return Encode(job, open_source(job.source).keep_types())


def lines_of(tables: Sequence[pa.Table]) -> list[dict[str, Any]]:
    rows = (row for table in tables for row in table["lines"].to_pylist())
    return [line for lines in rows for line in lines or ()]


# Specs

SPEC: dict[str, Any] = {
    "name": "shapes",
    "source": {
        "format": "webdataset",
        "path": ["/data/{000..003}.tar", "s3://bucket/x/"],
        "columns": {"image": "jpg", "id": "__key__"},
        "keep": ["url"],
        "where": "width >= 512",
        "max_image_pixels": 1000,
        "storage": {"anon": True},
    },
    "ask": [
        {"id": "caption", "prompt": "what?", "max_new_tokens": 5},
        {"from": "questions"},
    ],
    "model": {"path": "embedded", "dtype": "float32"},
    "output": {"path": "/data/out", "rows_per_file": 10, "retry_s": 1.5},
    "resources": {"preprocess": {"actors": [1, 2]}, "generate": {"gpus": 0.5, "batch_size": 4}},
    "max_failed_fraction": 0.5,
}
ODD = st.one_of(
    VALUES,
    st.sampled_from(["~\0", "~", "a::b", "file://", "{", "\0", "s3://", 2**200, 1e308]),
)
PLACES = st.lists(st.integers(0, 12), max_size=4)


class SpecCase(NamedTuple):
    """Each edit: the way to a place in the spec, as positions, and what is put there.

    None takes away what is there.
    """

    edits: list[tuple[list[int], str, Any]]
    overrides: list[str]


KEYS = st.sampled_from(["path", "image", "id", "from", "actors", "x", "gpus", "where", ""]) | TEXTS
OVERRIDES = st.builds(
    "{}{}{}".format,
    st.lists(st.sampled_from([*SPEC, "0", "1", "path", "9" * 30, "²"]) | TEXTS).map(".".join),
    st.sampled_from(["=", "=", "", "=="]),
    st.text(max_size=5)
    | st.sampled_from(["[a]", "{a: 1}", "!!binary x", "&a [*a]", "0x" + "f" * 9]),
)
SPECS = st.builds(
    SpecCase,
    st.lists(st.tuples(PLACES, KEYS, ODD | st.none()), max_size=3),
    st.lists(OVERRIDES, max_size=2),
)


def specs_are_jobs_or_mistakes(case: SpecCase) -> None:
    spec = json.loads(json.dumps(SPEC))
    for way, key, value in case.edits:
        change(spec, way, key, value)
    expect_job_or_mistake(lambda: build_spec(spec, case.overrides, origin="spec"))


def change(inside: Any, way: Sequence[int], key: str, value: Any) -> None:
    """Go as far as the way leads; change, add or take away something there."""
    for position in way:
        names = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
        if not names:
            break
        name = names[position % len(names)]
        if not isinstance(inside[name], dict | list):
            inside[name] = value
            return
        inside = inside[name]
    if isinstance(inside, list):
        inside.append(value)
    elif value is None and inside:
        inside.pop(next(iter(inside)))
    else:
        inside[key] = value


def expect_job_or_mistake(load: Callable[[], JobSpec]) -> None:
    try:
        job = load()
    except SpecError:
        return
    assert build_spec(yaml12.load(dump_spec(job)), origin="spec") == job


TOKENS = (": ", "- ", "\n", "\n  ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!binary ", "? ")
TOKENS += (
    "<<: ",
    "~",
    "0x" + "f" * 5000,
    "'",
    '"',
    "#",
    "%YAML 1.1\n",
    "---\n",
    "|\n ",
    ">-\n",
    "\t",
)
ODD_VALUES = ("!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!null x", "!!binary x", "*a")
ODD_VALUES += (
    "1" * 5000,
    "0x" + "f" * 5000,
    "[" * 600,
    "? [a]\n: b",
    "&a [*a]",
    "!!set {a}",
    "<<: 1",
)
YAML_TEXTS = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.builds("source: {}".format, st.sampled_from(ODD_VALUES)),
    st.lists(st.sampled_from(TOKENS) | st.sampled_from(["source", "ask", "1"]) | TEXTS).map(
        "".join
    ),
)


class YamlCase(NamedTuple):
    """A valid spec with damage, or any text."""

    text: str
    edits: list[Edit]
    overrides: list[str]


YAMLS = st.builds(
    YamlCase,
    st.just(yaml12.dump(SPEC)) | YAML_TEXTS,
    damage(BYTES) | st.just([]),
    st.lists(OVERRIDES, max_size=1),
)


def files_are_jobs_or_mistakes(case: YamlCase) -> None:
    path = folder() / "job.yaml"
    path.write_bytes(damaged(case.text.encode("utf-8", "surrogatepass"), case.edits, BYTES))
    expect_job_or_mistake(lambda: load_spec(str(path), case.overrides))


# Conditions

PIECES = ["width", "meta.a", "1", "2.5", "1e999", '"x"', "'('", "None", "True", "(", ")", "[", "]"]
PIECES += ["len(", "lower(", "contains(", "matches(", ",", ".", "-", "not ", " == ", " < ", " in "]
PIECES += [
    " is ",
    " is not ",
    " not in ",
    " and ",
    " or ",
    " + ",
    " / ",
    " * ",
    "10" * 20,
    "\\",
    "\0",
]
CELLS = st.one_of(VALUES, st.binary(max_size=3), st.datetimes(), st.dates(), st.decimals())


class WhereCase(NamedTuple):
    text: str
    rows: list[dict[str, Any]]


CONDITIONS = st.builds(
    WhereCase,
    st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=8).map("".join)
    | st.sampled_from([where for where in WHERES if where]),
    st.lists(
        st.fixed_dictionaries({}, optional={"width": CELLS, "text": CELLS, "meta": CELLS}),
        max_size=4,
    ),
)


def conditions_hold_or_not(case: WhereCase) -> None:
    """Whatever the rows are that are asked together."""
    try:
        where = parse_where(case.text)
    except SpecError:
        return
    held = where.holds(case.rows)
    assert all(type(value) in (bool, FilterFailed) for value in held)
    alone = [value for row in case.rows for value in where.holds([row])]
    assert [*map(str, held)] == [*map(str, alone)]
