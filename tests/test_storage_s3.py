import uuid

import pytest

from pipeline.storage import Output, list_files
from schemas.errors import SpecError
from schemas.job import StorageSpec
from tests.s3 import S3Server


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
    with output.open("answers/a.parquet") as file:
        file.seek(2)
        assert file.read() == b"23"


def test_a_taken_name_is_not_replaced(output: Output) -> None:
    """This server's 412 reaches s3fs as OSError(EINVAL)."""
    assert output.publish("answers/a.parquet", b"first")
    assert not output.publish("answers/a.parquet", b"second")
    assert output.read("answers/a.parquet") == b"first"


def test_a_taken_name_is_not_replaced_by_an_upload_in_many_pieces(output: Output) -> None:
    large = bytes(101 * 2**20)
    assert output.publish("answers/a.parquet", large)
    assert not output.publish("answers/a.parquet", b"1" + large)
    with output.open("answers/a.parquet") as file:
        assert file.read(1) == b"\0"


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


def test_preparing_leaves_nothing_behind(output: Output) -> None:
    output.prepare()
    assert output.names(".tmp", suffix="") == []


def test_an_output_that_may_not_be_written_is_a_mistake_of_the_spec(
    url: str, storage: StorageSpec
) -> None:
    nobody = storage.model_copy(update={"anon": True})
    with pytest.raises(SpecError, match=r"s3://.* cannot be written .* credentials"):
        Output(url, nobody).prepare()


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
