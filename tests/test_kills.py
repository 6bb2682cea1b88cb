"""Runs that really die: nothing is lost, doubled or left. `make soak` has the full counts."""

import uuid
from pathlib import Path

import pytest

from pipeline.storage import Output
from schemas.job import StorageSpec
from tests import soak
from tests.proxy import Proxy
from tests.s3 import S3Server, serve

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_killed_at_random_moments_a_job_ends_whole_and_repeats_little(tmp_path: Path) -> None:
    figures = soak.sigkills(tmp_path, kills=2, images=60, row_s=0.06)
    assert figures["faults"] == []
    assert figures["polls"] > figures["kills"]


def test_workers_that_die_are_replaced_within_the_run(tmp_path: Path) -> None:
    """`write` and `generated` die when rows are durable: what Ray then repeats is there already."""
    figures = soak.worker_deaths(tmp_path, stages=soak.STAGES)
    assert figures["faults"] == []
    assert figures["answered_again"] > 0
    assert figures["written_again"] > 0


def test_a_store_that_dies_and_breaks_off_costs_no_answer(tmp_path: Path) -> None:
    with serve() as server:
        figures = soak.store_failures(tmp_path, server, rounds=1)
    assert figures["faults"] == []
    assert figures["uploads_cut"] > 0
    assert figures["objects_read"] > 0


@pytest.mark.parametrize("after_bytes", [20_000_000, 90_000_000])
def test_an_upload_in_many_pieces_that_is_cut_is_there_whole_or_not_at_all(
    s3_server: S3Server, after_bytes: int
) -> None:
    proxy = Proxy(s3_server.port)
    place = s3_server.url(uuid.uuid4().hex)
    output = Output(place, StorageSpec(endpoint_url=proxy.endpoint_url), retry_s=30)
    large = bytes(101 * 2**20)
    proxy.cut_uploads(3, after_bytes=after_bytes)
    output.publish("answers/a.parquet", large)
    proxy.close()
    direct = Output(place, StorageSpec(endpoint_url=s3_server.endpoint_url))
    assert proxy.cuts == 3
    assert direct.names("answers", suffix="") == ["answers/a.parquet"]
    assert direct.read("answers/a.parquet") == large


def test_of_two_runs_started_at_once_exactly_one_works(tmp_path: Path, s3_server: S3Server) -> None:
    """On an object store; `test_lease.py` races for a lease on a local disk, too."""
    assert soak.duels(tmp_path, times=1, server=s3_server)["faults"] == []


def test_a_complete_output_is_looked_at_in_a_moment_and_no_shard_is_opened(tmp_path: Path) -> None:
    figures = soak.resumes(tmp_path, shards=1000, repeats=1)
    assert figures["faults"] == []
    assert figures["after_start_s"] < 5
