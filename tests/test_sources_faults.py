"""Every source over a real S3 server whose connections are cut, slowed and black-holed at random.

`make soak` has whole jobs of every format; here one of them, and what each source reads.
"""

import contextlib
import functools
import random
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.domain import warning_of
from pipeline.coverage import Ranges, ShardCoverage
from pipeline.read import ShardWork
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard, Source
from pipeline.sources.fetch import Unfetched
from schemas.errors import StoreUnavailable
from schemas.job import SourceSpec, StorageSpec
from tests.formats import KINDS, source_of, write_sources
from tests.proxy import Faults, Proxy
from tests.s3 import S3Server
from tests.scenes import s3_of
from tests.storms import Storm, storms
from tests.whole_jobs import job_of

TIMEOUT_S = 0.3
CALM_TIMEOUT_S = 30.0
IMAGES = 36
FAULTS = 8
MOST_SHARDS = 10
"""Of the 37 of `images`."""
MOST_PASSES = 30

Row = tuple[object, ...]
Read = Mapping[str, tuple[dict[int, Row], int | None]]
"""Of each shard, the rows and how many it says there are."""


@pytest.fixture(scope="module")
def place(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sources of noise on the server: images of 1 KB to 4 MB."""
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    write_sources(folder, [rng.randbytes(int(10 ** rng.uniform(3, 6.6))) for _ in range(IMAGES)])
    place = s3_server.url(uuid.uuid4().hex)
    s3_of(s3_server).put(str(folder), place, recursive=True)
    return place


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(s3_server.port)
    yield proxy
    proxy.close()


def source_at(
    endpoint_url: str, kind: str, place: str, *, fetches: bool = True, timeout_s: float
) -> Source:
    storage = StorageSpec(endpoint_url=endpoint_url, timeout_s=timeout_s)
    keys = source_of(kind, place, storage=storage, image_timeout_s=2 * timeout_s)
    spec = SourceSpec.model_validate(keys)
    keep = open_source(spec).keep_types()
    return open_source(spec, keep=keep, fetcher=None if fetches else Unfetched(spec))


def seen(sample: Sample) -> Row:
    """A sample, its errors by what they say."""
    errors = (sample.error, sample.image_error)
    texts = [repr(sample.questions), repr(sample.keep)]
    said = [error and f"{type(error).__name__}: {error}" for error in errors]
    return (sample.sample_id, sample.image, *texts, *said)


@dataclass
class Reading:
    """What was read of a shard, pass by pass, as a run does; `rows_total` once its end was."""

    source: Source
    shard: Shard
    rows: dict[int, Row] = field(default_factory=dict)
    rows_total: int | None = None

    def go_on(self) -> None:
        """The rows that are missing, to the end or to where the store fails."""
        samples = self.source.read(self.shard, skip=Ranges.of([(i, i + 1) for i in self.rows]))
        with contextlib.suppress(StoreUnavailable):
            self.rows_total = yield_into(self.rows, samples)


def yield_into(rows: dict[int, Row], samples: Generator[Sample, None, int]) -> int:
    """Read to the end; raises StoreUnavailable."""
    while True:
        try:
            sample = next(samples)
        except StopIteration as end:
            return int(end.value)
        assert sample.index not in rows
        rows[sample.index] = seen(sample)


def read_to_the_end(readings: list[Reading]) -> Read:
    """The rows of each shard, and how many it says there are, in as many passes as it takes."""
    for _ in range(MOST_PASSES):
        for reading in readings:
            if reading.rows_total is None:
                reading.go_on()
    return {reading.shard.uri: (reading.rows, reading.rows_total) for reading in readings}


@pytest.fixture(scope="module")
def calm(s3_server: S3Server, place: str) -> Callable[[str], Read]:
    """What there is to be read of a kind of source."""

    @functools.cache
    def read(kind: str) -> Read:
        calm = readings_at(s3_server.endpoint_url, kind, place, timeout_s=CALM_TIMEOUT_S)
        return read_to_the_end(calm)

    return read


def readings_at(
    endpoint_url: str, kind: str, place: str, *, fetches: bool = True, timeout_s: float = TIMEOUT_S
) -> list[Reading]:
    """Listed while nothing is wrong with the store, however busy this machine is."""
    patient = source_at(endpoint_url, kind, place, timeout_s=CALM_TIMEOUT_S)
    source = source_at(endpoint_url, kind, place, fetches=fetches, timeout_s=timeout_s)
    return [Reading(source, shard) for shard in patient.list()[:MOST_SHARDS]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_through_a_storm_is_what_is_there(
    proxy: Proxy, place: str, calm: Callable[[str], Read], kind: str
) -> None:
    readings = readings_at(proxy.endpoint_url, kind, place)
    proxy.faults = Faults(seed=1, share=0.3, slow_s=TIMEOUT_S)
    while proxy.faults.happened.total() < FAULTS:
        stormy = read_to_the_end([Reading(each.source, each.shard) for each in readings])
        assert stormy == calm(kind)


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "images", "manifest"])
def test_a_store_that_falls_silent_fails_no_row_and_is_read_on_when_it_is_back(
    proxy: Proxy, place: str, calm: Callable[[str], Read], kind: str
) -> None:
    first, second = readings_at(proxy.endpoint_url, kind, place)[:2]
    under_way = first.source.read(first.shard, skip=Ranges())
    if kind in {"webdataset", "parquet"}:
        sample = next(under_way)
        first.rows[sample.index] = seen(sample)
    proxy.faults = Faults(seed=1, share=1, kinds=("hole",))
    with pytest.raises(StoreUnavailable):
        yield_into(first.rows, under_way)
    second.go_on()
    assert not second.rows
    proxy.faults = None
    assert read_to_the_end([first, second]).items() <= calm(kind).items()


@pytest.mark.parametrize(
    ("kind", "most"), [("webdataset", 2 * 2**20), ("parquet", 2 * 2**20), ("manifest", 1500)]
)
def test_an_answer_that_breaks_off_is_never_taken_for_the_end_of_a_file(
    s3_server: S3Server, proxy: Proxy, place: str, kind: str, most: int
) -> None:
    """Where nearly all break off behind their head, no retry hides what a file looks like then."""
    well = readings_at(s3_server.endpoint_url, kind, place, fetches=False, timeout_s=CALM_TIMEOUT_S)
    calm = read_to_the_end(well)
    readings = readings_at(proxy.endpoint_url, kind, place, fetches=False)
    kinds = ("cut", "reset")
    proxy.faults = Faults(seed=1, share=0.9, kinds=kinds, between_bytes=(500, most))
    for reading in readings:
        reading.go_on()
        rows, rows_total = calm[reading.shard.uri]
        assert reading.rows.items() <= rows.items()
        assert reading.rows_total in {rows_total, None}
    assert any(reading.rows_total is None for reading in readings)


class Refusal(BaseHTTPRequestHandler):
    """Answers every request with the status that its path names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def read_at(url: str, format_: str) -> Reading:
    source = open_source(SourceSpec.model_validate({"format": format_, "path": url}), keep={})
    reading = Reading(source, Shard(url, "x"))
    reading.go_on()
    return reading


@pytest.mark.parametrize("format_", ["webdataset", "parquet"])
def test_a_web_server_that_fails_or_is_gone_has_not_lost_its_files(
    refusing_url: str, format_: str
) -> None:
    """fsspec says of all of these that there is no such file."""
    url = "http://127.0.0.1:1/a" if format_ == "webdataset" else f"{refusing_url}/503/a"
    reading = read_at(url, format_)
    assert (reading.rows, reading.rows_total) == ({}, None)
    reading = read_at(f"{refusing_url}/404/a", format_)
    assert reading.rows_total == 1
    assert "gone since it was listed" in str(reading.rows[0])


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_look_at_the_first_images_does_not_end_a_run(
    s3_server: S3Server, proxy: Proxy, place: str, kind: str
) -> None:
    storage = StorageSpec(endpoint_url=proxy.endpoint_url, timeout_s=TIMEOUT_S)
    job = job_of("in", "out", source=source_of(kind, place, storage=storage))
    shards = open_source(job.source).list()
    work = [ShardWork(shard, ShardCoverage(shard.uri, shard.identity)) for shard in shards]
    proxy.faults = Faults(seed=1, share=1, kinds=("hole",))
    assert warning_of(job, work) is None


@pytest.mark.slow
def test_a_job_through_a_storm_has_the_table_that_it_has_in_calm(
    tmp_path: Path, s3_server: S3Server
) -> None:
    storm = Storm(share=0.2, timeout_s=1.0)
    figures = storms(tmp_path, s3_server, images=9, storm=storm, kinds=["parquet-uris"])
    assert figures["faults"] == []
    [job] = figures["jobs"].values()
    assert sum(job["hit"].values()) > 5
    assert job["runs"][-1] == "complete"
    assert (job["ok"], job["failed"]) == (18, 6)
