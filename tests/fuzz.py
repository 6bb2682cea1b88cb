"""Laws of files that are read, whatever is in them, and cases for them made by hypothesis.

Every row has one outcome, what lies before any damage is read, and a resume gives exactly what is
left. `tests/test_fuzz.py` tries some cases, always the same; `make soak` others, for minutes.
"""

import atexit
import dataclasses
import functools
import gzip
import io
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard
from pipeline.sources.fetch import Unfetched
from schemas.errors import RowError
from schemas.job import SourceSpec
from tests.damage import BYTES, TAR, Edit, common, damage, damaged
from tests.shards import image_bytes, json_bytes, tar_bytes

Law = Callable[[Any], None]


def tried(
    law: Law, cases: st.SearchStrategy[Any], *, examples: int, seed: int | None = None
) -> None:
    """Raises what the law raises for the smallest case found that breaks it."""
    found = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(hypothesis.given(cases)(law))
    (found if seed is None else hypothesis.seed(seed)(found))()


@functools.cache
def folder() -> Path:
    """Of the files that are read; it goes with the process."""
    made = tempfile.TemporaryDirectory(prefix="lavaflow-fuzz-")
    folder.made = made  # type: ignore[attr-defined]
    return Path(made.name)


# What any source owes for any file


class Read(NamedTuple):
    """What came of reading a file: each row's outcome, in the order in which they came."""

    outcomes: dict[int, tuple[Any, ...]]
    total: int


def outcomes_of(spec: SourceSpec, *, skip: Ranges | None = None) -> Read:
    shard = Shard(spec.paths[0], "1")
    keep = {"meta": pa.struct([("a", pa.list_(pa.int64())), ("b", pa.string())])}
    source = open_source(spec, keep=keep, fetcher=Unfetched(spec))
    reading = source.read(shard, skip=skip or Ranges())
    outcomes = {}
    while True:
        try:
            sample = next(reading)
        except StopIteration as end:
            return Read(outcomes, end.value)
        assert sample.index not in outcomes, f"row {sample.index} came twice"
        outcomes[sample.index] = outcome_of(sample)


def outcome_of(sample: Sample) -> tuple[Any, ...]:
    """All that a sample says; of an error, the kind, since its words tell where it was met."""
    parts = (getattr(sample, part.name) for part in dataclasses.fields(sample))
    return tuple(type(part) if isinstance(part, RowError) else repr(part) for part in parts)


def expect_one_outcome_each(spec: SourceSpec, skipped: Sequence[int]) -> Read:
    """Read a file whole and with rows left out; both have to fit together."""
    read = outcomes_of(spec)
    assert type(read.total) is int
    assert sorted(read.outcomes) == [*range(read.total)]
    skip = Ranges.of_indexes(skipped)
    resumed = outcomes_of(spec, skip=skip)
    left = {index: told for index, told in read.outcomes.items() if index not in skip}
    assert resumed.outcomes == left
    assert resumed.total == read.total
    return read


# Tars

TAR_KEEP = ("width", "txt", "nested")
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "tar.gz": functools.partial(gzip.compress, mtime=0),
    "tar.zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
SAMPLES = 5


class TarCase(NamedTuple):
    """`inner`: what happens to the tar, `outer`: to what it is compressed to."""

    suffix: str
    inner: list[Edit]
    outer: list[Edit]
    skipped: list[int]


TARS = st.builds(
    TarCase,
    st.sampled_from([*COMPRESSIONS]),
    damage(TAR) | st.just([]),
    damage(BYTES) | st.just([]),
    st.lists(st.integers(0, 2 * SAMPLES), max_size=SAMPLES),
)


@functools.cache
def whole_tar() -> bytes:
    members = []
    for n in range(SAMPLES):
        columns = {"width": n, "nested": {"a": [n]}, "questions": [f"what is {n}?"]}
        members += [(f"{n:03}.png", image_bytes(color=(n, 0, 0)))]
        members += [(f"{n:03}.json", json_bytes(columns)), (f"{n:03}.txt", b"text %d" % n)]
    return tar_bytes(members)


def tar_spec(path: Path) -> SourceSpec:
    keys = {"format": "webdataset", "path": str(path), "where": "width >= 0", "keep": TAR_KEEP}
    return SourceSpec.model_validate(keys)


def tars_are_read(case: TarCase) -> None:
    path = folder() / f"a.{case.suffix}"
    tar = damaged(whole_tar(), case.inner, TAR)
    path.write_bytes(damaged(COMPRESSIONS[case.suffix](tar), case.outer, BYTES))
    read = expect_one_outcome_each(tar_spec(path), case.skipped)
    if case.suffix == "tar":
        tar = path.read_bytes()
    elif case.outer:
        return
    whole = whole_outcomes()
    for index in range(samples_before(common(tar, whole_tar()))):
        assert read.outcomes[index] == whole[index], f"row {index} lies before the damage"


@functools.cache
def whole_outcomes() -> dict[int, tuple[Any, ...]]:
    path = folder() / "whole.tar"
    path.write_bytes(whole_tar())
    return outcomes_of(tar_spec(path)).outcomes


def samples_before(end: int) -> int:
    """How many samples are known to be whole from the first bytes of the tar.

    Where one ends is told by the header after it.
    """
    header = whole_tar().find
    starts = [header(f"{n:03}.png".encode()) for n in range(1, SAMPLES)]
    return sum(start + 512 <= end for start in starts)


# Manifests

MANIFEST_KEEP = ("width", "answer", "a.b")
IMAGES = ("a.png", "b.png", "c/d.jpg")


def jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(json_bytes(row) + b"\n" for row in rows)


def plain_rows() -> list[dict[str, Any]]:
    return [
        {"image": IMAGES[n % 3], "questions": [f"what is {n}?"], "width": n, "id": n}
        for n in range(6)
    ]


def vqa_rows() -> list[dict[str, Any]]:
    return [{"question_id": n, "image_id": n % 3, "question": f"what {n}?"} for n in range(6)]


def llava_rows() -> list[dict[str, Any]]:
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    return [{"id": f"x{n}", "image": IMAGES[n % 3], "conversations": said * 2} for n in range(4)]


def vqa_file(key: str, rows: Sequence[Any]) -> bytes:
    header = {"info": {"year": 2014}, "data_type": "mscoco", "data_subtype": "val2014"}
    return json_bytes({**header, key: rows, "license": {"name": "x"}})


MANIFEST_KINDS: dict[str, Callable[[], bytes]] = {
    "lines": lambda: jsonl(plain_rows()),
    "lines of LLaVA": lambda: jsonl(llava_rows()),
    "lines of questions": lambda: jsonl([{**row, "image": "a.png"} for row in vqa_rows()]),
    "list": lambda: json.dumps(llava_rows(), indent=1).encode(),
    "questions": lambda: vqa_file("questions", vqa_rows()),
    "annotations": lambda: vqa_file("annotations", vqa_rows()),
    "gzip": lambda: gzip.compress(jsonl(plain_rows()), mtime=0),
}
MOST_ROWS = 6


class ManifestCase(NamedTuple):
    kind: str
    edits: list[Edit]
    talk: bool
    skipped: list[int]


MANIFESTS = st.builds(
    ManifestCase,
    st.sampled_from([*MANIFEST_KINDS]),
    damage(BYTES),
    st.booleans(),
    st.lists(st.integers(0, 2 * MOST_ROWS), max_size=MOST_ROWS),
)


def manifest_spec(path: Path, *, talk: bool) -> SourceSpec:
    keys = {"format": "manifest", "path": str(path), "where": "width >= 0", "keep": MANIFEST_KEEP}
    columns = {"conversation": "conversations"} if talk else {}
    return SourceSpec.model_validate({**keys, "columns": columns})


def manifests_are_read(case: ManifestCase) -> None:
    path = folder() / "a_questions.json"
    whole = MANIFEST_KINDS[case.kind]()
    data = damaged(whole, case.edits, BYTES)
    spec = manifest_spec(path, talk=case.talk)
    path.write_bytes(whole)
    before = outcomes_of(spec)
    path.write_bytes(data)
    read = expect_one_outcome_each(spec, case.skipped)
    if case.kind.startswith("lines"):
        for index in range(whole[: common(whole, data)].count(b"\n")):
            assert read.outcomes[index] == before.outcomes[index], f"line {index} is whole"


# Tables

TABLE_ROWS = 12
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TABLE_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "snappy": {"compression": "snappy"},
    "checked": {"compression": "zstd", "write_page_checksum": True, "data_page_version": "2.0"},
}


class TableCase(NamedTuple):
    kind: str
    edits: list[Edit]
    skipped: list[int]


TABLES = st.builds(
    TableCase,
    st.sampled_from([*TABLE_KINDS]),
    damage(BYTES),
    st.lists(st.integers(0, 2 * TABLE_ROWS), max_size=TABLE_ROWS),
)


@functools.cache
def whole_table(kind: str) -> bytes:
    columns = {
        "image": pa.array([{"bytes": image_bytes(), "path": None}] * TABLE_ROWS, IMAGE),
        "width": pa.array(range(TABLE_ROWS)),
        "questions": pa.array([[{"id": str(n), "question": "what?"}] for n in range(TABLE_ROWS)]),
        "meta": pa.array([{"a": [n, None], "b": f"text {n % 3}"} for n in range(TABLE_ROWS)]),
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=5, **TABLE_KINDS[kind])
    return file.getvalue()


def tables_are_read(case: TableCase) -> None:
    """In a process beside this one, which must not end of it."""
    path = folder() / "a.parquet"
    path.write_bytes(damaged(whole_table(case.kind), case.edits, BYTES))
    told = reader().ask({"path": str(path), "skipped": case.skipped})
    assert told == "well", told


class Reader:
    """A process that reads tables."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.fuzz import read_tables; read_tables()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, case: dict[str, Any]) -> str:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        requests.write(json.dumps(case) + "\n")
        requests.flush()
        if not (said := replies.readline()):
            reader.cache_clear()
            return f"the process that reads has ended with {self._process.wait()}"
        return str(json.loads(said))


@functools.cache
def reader() -> Reader:
    return Reader()


def read_tables() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        keys = {"format": "parquet", "path": case["path"], "where": "width >= 0", "keep": ["meta"]}
        try:
            expect_one_outcome_each(SourceSpec.model_validate(keys), case["skipped"])
            told = "well"
        except Exception:  # noqa: BLE001 (told to who has asked)
            told = traceback.format_exc()
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
