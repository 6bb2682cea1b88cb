import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing

import pytest

from pipeline.storage import Output, list_files, store_errors
from schemas.errors import SpecError
from schemas.job import StorageSpec
from tests.proxy import Faults, Proxy
from tests.s3 import S3Server, serve


@pytest.fixture
def storage(s3_server: S3Server) -> StorageSpec:
    return StorageSpec(endpoint_url=s3_server.endpoint_url)


@pytest.fixture
def url(s3_server: S3Server) -> str:
    """A folder of the bucket that no other test uses."""
    return s3_server.url(uuid.uuid4().hex)


@pytest.fixture
def output(url: str, storage: StorageSpec) -> Output:
    return Output(url, storage)


def test_a_published_file_is_read_back(output: Output) -> None:
    assert output.publish("answers/a.parquet", b"0123")
    assert output.read("answers/a.parquet") == b"0123"
    assert output.use("answers/a.parquet", lambda file: (file.seek(2), file.read())) == (2, b"23")


def test_a_taken_name_is_not_replaced(output: Output) -> None:
    """This server's 412 reaches s3fs as OSError(EINVAL)."""
    assert output.publish("answers/a.parquet", b"first")
    assert not output.publish("answers/a.parquet", b"second")
    assert output.read("answers/a.parquet") == b"first"


def test_a_taken_name_is_not_replaced_by_an_upload_in_many_pieces(output: Output) -> None:
    large = bytes(101 * 2**20)
    assert output.publish("answers/a.parquet", large)
    assert not output.publish("answers/a.parquet", b"1" + large)
    assert output.use("answers/a.parquet", lambda file: file.read(1)) == b"\0"


@pytest.mark.parametrize("size", [10, 101 * 2**20])
def test_a_file_is_rewritten_while_it_is_the_one_that_it_was(output: Output, size: int) -> None:
    """Whoever changes it after the last look is noticed by the server."""
    output.publish("answers/a", b"old")
    was = output.identities("answers", suffix="")["answers/a"]
    assert output.rewrite("answers/a", bytes(size), was=was, check=lambda: None)
    assert output.use("answers/a", lambda file: file.read(1)) == b"\0"
    now = output.identities("answers", suffix="")["answers/a"]

    def change() -> None:
        output.replace("answers/a", b"other")

    assert not output.rewrite("answers/a", b"new", was=now, check=change)
    assert output.read("answers/a") == b"other"
    output.remove("answers/a")
    assert not output.rewrite("answers/a", b"new", was=now, check=lambda: None)


def test_what_another_client_publishes_or_removes_is_seen(
    output: Output, url: str, storage: StorageSpec
) -> None:
    other = Output(url, storage)
    assert output.names("answers", suffix=".parquet") == []
    other.publish("answers/a.parquet", b"")
    other.publish("answers/b.txt", b"")
    other.publish("answers/deeper/c.parquet", b"")
    assert output.names("answers", suffix=".parquet") == ["answers/a.parquet"]
    other.remove("answers/a.parquet")
    assert output.names("answers", suffix=".parquet") == []


def test_removing_what_is_gone_is_fine(output: Output) -> None:
    output.publish("a", b"")
    output.remove("a")
    output.remove("a")


def test_an_output_that_may_not_be_written_is_told(url: str, storage: StorageSpec) -> None:
    nobody = storage.model_copy(update={"anon": True})
    with pytest.raises(PermissionError):
        Output(url, nobody).publish("a", b"")


def test_the_identity_of_a_file_changes_when_it_is_replaced(output: Output) -> None:
    output.publish("answers/a", b"first")
    before = output.identities("answers", suffix="")
    assert output.identities("answers", suffix="") == before
    output.replace("answers/a", b"other")
    assert output.identities("answers", suffix="").keys() == before.keys()
    assert output.identities("answers", suffix="") != before


@pytest.mark.parametrize(
    ("ask", "most_requests"),
    [
        (lambda output: output.names("answers", suffix=""), 2),
        (lambda output: output.publish("a", b"1"), 2),
        (lambda output: output.remove("a"), 2),
        (lambda output: output.use("a", lambda file: file.read()), 2),
        (lambda output: output.fs.cat_file(f"{output.root}/a", start=0, end=9), 6),
    ],
    ids=["list", "upload", "remove", "open", "read"],
)
def test_a_server_that_takes_requests_and_says_nothing_is_given_up(
    s3_server: S3Server, ask: Callable[[Output], object], most_requests: int
) -> None:
    """What s3fs alone does 25 and 125 times, and waits for without end before an upload."""
    proxy = Proxy(s3_server.port)
    proxy.faults = Faults(seed=0, share=1, kinds=("hole",))
    storage = StorageSpec(endpoint_url=proxy.endpoint_url, timeout_s=0.3)
    output = Output(s3_server.url("silent"), storage)
    start = time.monotonic()
    with closing(proxy), pytest.raises(store_errors(), match="Read timeout on endpoint"):
        ask(output)
    assert proxy.faults.happened["hole"] == most_requests
    assert time.monotonic() - start < 0.3 * most_requests + 3


@pytest.mark.slow
def test_a_server_that_comes_back_in_time_is_waited_for() -> None:
    with serve() as server:
        storage = StorageSpec(endpoint_url=server.endpoint_url)
        output = Output(server.url("out"), storage, retry_s=60)
        assert output.publish("answers/a", b"1")
        server.kill()
        with pytest.raises(store_errors()):
            output.with_patience(0).publish("answers/b", b"2")
        restart = threading.Timer(1.0, server.restart)
        restart.start()
        # What it says is not asked: a server that is just starting may keep an upload and fail.
        output.publish("answers/b", b"2")
        restart.join()
        assert output.read("answers/b") == b"2"
        assert output.names("answers", suffix="") == ["answers/a", "answers/b"]


def test_listing_takes_folders_globs_and_braces(
    output: Output, url: str, storage: StorageSpec
) -> None:
    for name in ("00.tar", "01.tar", "notes.txt", "more/02.tar"):
        output.publish(name, name.encode())

    def names(path: str) -> list[str]:
        found = list_files([f"{url}/{path}"], storage, suffixes={".tar"})
        return [file.uri.removeprefix(f"{url}/") for file in found]

    assert names("") == ["00.tar", "01.tar", "more/02.tar"]
    assert names("*.tar") == ["00.tar", "01.tar"]
    assert names("{00..01}.tar") == ["00.tar", "01.tar"]
    assert names("more/02.tar") == ["more/02.tar"]


def test_a_changed_file_has_another_identity(
    output: Output, url: str, storage: StorageSpec
) -> None:
    def identity() -> str:
        (file,) = list_files([url], storage, suffixes={".tar"})
        return file.identity

    output.publish("a.tar", b"one")
    before = identity()
    assert identity() == before
    output.remove("a.tar")
    output.publish("a.tar", b"two")
    assert identity() != before


def test_a_path_that_is_not_there_is_named(url: str, storage: StorageSpec) -> None:
    with pytest.raises(SpecError, match=r"gone.tar' does not exist"):
        list_files([f"{url}/gone.tar"], storage, suffixes={".tar"})
