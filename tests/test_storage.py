"""Listing and publishing on local disks and in memory; S3 is in test_storage_s3.py."""

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.storage import Output, StoredFile, identity_of, list_files
from schemas.errors import OutputHeld, SpecError
from schemas.job import StorageSpec

HERE = StorageSpec()


def files_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def listed(*paths: Path | str) -> list[StoredFile]:
    return list_files([str(path) for path in paths], HERE, suffixes=[".tar"])


def names(files: list[StoredFile]) -> list[str]:
    return [Path(file.uri).name for file in files]


class TestListing:
    def test_a_folder_is_searched_through_for_the_suffixes(self, tmp_path: Path) -> None:
        files_in(tmp_path, "b.tar", "deep/er/a.TAR", "c.txt")
        assert names(listed(tmp_path)) == ["b.tar", "a.TAR"]

    def test_a_file_is_taken_whatever_its_suffix(self, tmp_path: Path) -> None:
        files_in(tmp_path, "c.txt")
        assert names(listed(tmp_path / "c.txt")) == ["c.txt"]

    def test_globs_and_brace_ranges_are_expanded(self, tmp_path: Path) -> None:
        files_in(tmp_path, *(f"{number:02}.tar" for number in range(12)))
        assert names(listed(f"{tmp_path}/{{09..11}}.tar")) == ["09.tar", "10.tar", "11.tar"]
        assert names(listed(f"{tmp_path}/1*.tar")) == ["10.tar", "11.tar"]

    def test_a_file_named_twice_is_listed_once_and_all_are_sorted(self, tmp_path: Path) -> None:
        files_in(tmp_path, "b.tar", "a.tar")
        files = listed(tmp_path / "b.tar", tmp_path, tmp_path / "*.tar")
        assert names(files) == ["a.tar", "b.tar"]

    def test_a_name_with_glob_characters_that_exists_is_itself(self, tmp_path: Path) -> None:
        files_in(tmp_path, "a[1].tar", "a1.tar")
        assert names(listed(tmp_path / "a[1].tar")) == ["a[1].tar"]

    def test_local_uris_are_plain_absolute_paths(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(files_in(tmp_path, "a.tar"))
        assert [file.uri for file in listed("a.tar")] == [str(tmp_path / "a.tar")]

    def test_other_stores_keep_their_protocol(self) -> None:
        fsspec.filesystem("memory").pipe_file("/listing/a.tar", b"123")
        [file] = listed("memory://listing")
        assert (file.uri, file.size) == ("memory:///listing/a.tar", 3)

    def test_the_identity_changes_with_the_content(self, tmp_path: Path) -> None:
        files_in(tmp_path, "a.tar")
        [before] = listed(tmp_path)
        assert listed(tmp_path) == [before]
        os.utime(tmp_path / "a.tar", (1, 1))
        [touched] = listed(tmp_path)
        (tmp_path / "a.tar").write_bytes(b"longer than before")
        os.utime(tmp_path / "a.tar", (1, 1))
        [longer] = listed(tmp_path)
        assert len({before.identity, touched.identity, longer.identity}) == 3

    def test_an_etag_is_the_identity_where_there_is_one(self) -> None:
        assert identity_of({"ETag": '"abc"', "size": 3, "mtime": 1}) == "abc"
        assert identity_of({"size": 3, "mtime": 1}) == "3-1"


class Web(ThreadingHTTPServer):
    """A web server of a few files, which lists them by name. `status`: of every answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebAnswer)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/shards"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class WebAnswer(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        files = self.server.files
        links = "".join(f'<a href="{name}">{name}</a>' for name in files)
        data = links.encode() if self.path == "/shards/" else files.get(Path(self.path).name)
        self.send_response(404 if data is None else self.server.status)
        data = data or b""
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.shutdown()
    server.server_close()


class TestWebListing:
    @pytest.mark.parametrize("path", ["/*.tar", "/a.tar", "/{a,b,c,d,e,f,g,h,i}.tar"])
    def test_a_file_is_known_by_its_size_and_what_the_server_says_of_it(
        self, web: Web, path: str
    ) -> None:
        web.files = {f"{name}.tar": b"123" for name in ("abcdefghi" if "{" in path else "a")}
        web.headers = {"Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}
        [before, *more] = listed(web.url + path)
        assert (before.uri, before.size) == (f"{web.url}/a.tar", 3)
        assert listed(web.url + path) == [before, *more]
        web.headers = {"Last-Modified": "Mon, 02 Nov 2026 10:00:01 GMT"}
        [after, *_] = listed(web.url + path)
        assert after.identity != before.identity
        web.headers |= {"ETag": '"one"'}
        assert {file.identity for file in listed(web.url + path)} == {"one"}

    def test_a_server_that_fails_is_not_told_as_a_file_that_is_not_there(self, web: Web) -> None:
        web.files = {"a.tar": b"123"}
        web.status = 503
        with pytest.raises(SpecError, match=r"a.tar' cannot be listed: 503"):
            listed(f"{web.url}/a.tar")
        web.status = 404
        with pytest.raises(SpecError, match=r"a.tar' does not exist"):
            listed(f"{web.url}/a.tar")
        with pytest.raises(SpecError, match=r"a.tar' cannot be listed: Cannot connect"):
            listed("http://127.0.0.1:1/a.tar")


class TestListingErrors:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("no.tar", "does not exist; check the spelling"),
            ("*.tar", r"holds no file that ends in one of: \.tar"),
            ("empty", r"holds no file that ends in one of: \.tar"),
            ("{a,b.tar", "unbalanced braces"),
        ],
    )
    def test_a_path_without_files_names_the_path_and_the_remedy(
        self, tmp_path: Path, path: str, message: str
    ) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(SpecError, match=message) as error:
            listed(tmp_path / path)
        assert path in str(error.value)

    def test_an_unknown_protocol_names_the_url(self) -> None:
        with pytest.raises(SpecError, match="nonsense://x: cannot open this kind of URL"):
            listed("nonsense://x")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_a_folder_that_may_not_be_read_says_so(self, tmp_path: Path) -> None:
        folder = files_in(tmp_path / "closed", "a.tar")
        folder.chmod(0)
        try:
            with pytest.raises(SpecError, match="may not be read"):
                listed(folder / "a.tar")
        finally:
            folder.chmod(0o700)

    def test_a_name_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.tar")).write_bytes(b"")
        with pytest.raises(SpecError, match="not valid UTF-8"):
            listed(tmp_path)


MakeOutput = Callable[[], Output]


@pytest.fixture(params=["local", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeOutput:
    """Opens one and the same output, as several writers do."""
    path = str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return lambda: Output(path, HERE)


def read_from_2(file: Any) -> bytes:
    file.seek(2)
    return bytes(file.read())


class TestOutput:
    def test_a_published_file_is_read_back(self, make: MakeOutput) -> None:
        output = make()
        assert output.publish("answers/a.parquet", b"0123")
        assert output.read("answers/a.parquet") == b"0123"
        assert output.use("answers/a.parquet", read_from_2) == b"23"

    def test_publishing_never_replaces(self, make: MakeOutput) -> None:
        assert make().publish("answers/a.parquet", b"first")
        assert not make().publish("answers/a.parquet", b"second")
        assert make().read("answers/a.parquet") == b"first"

    def test_replacing_takes_the_place_of_what_is_there_or_not(self, make: MakeOutput) -> None:
        for data in (b"first", b"second"):
            make().replace("runs/a.json", data)
            assert make().read("runs/a.json") == data
        assert make().names(".tmp", suffix="") == []

    def test_names_are_sorted_and_of_one_folder_and_suffix(self, make: MakeOutput) -> None:
        output = make()
        assert output.names("answers", suffix=".parquet") == []
        for name in ("b.parquet", "a.parquet", "c.txt", "deep/d.parquet"):
            output.publish(f"answers/{name}", b"")
        assert make().names("answers", suffix=".parquet") == [
            "answers/a.parquet", "answers/b.parquet"
        ]  # fmt: skip

    def test_removing_makes_room_and_forgives_what_is_gone(self, make: MakeOutput) -> None:
        output = make()
        output.publish("a", b"1")
        output.remove("a")
        output.remove("a")
        assert output.publish("a", b"2")

    def test_the_identity_of_a_file_changes_when_it_is_replaced(self, make: MakeOutput) -> None:
        output = make()
        for name in ("answers/a", "answers/b"):
            output.publish(name, b"first")
        before = output.identities("answers", suffix="")
        assert make().identities("answers", suffix="") == before
        # Local disks tell times in steps of some milliseconds.
        time.sleep(0.02)
        output.replace("answers/a", b"other")
        after = make().identities("answers", suffix="")
        assert list(after) == ["answers/a", "answers/b"]
        assert after["answers/a"] != before["answers/a"]
        assert after["answers/b"] == before["answers/b"]

    def test_reading_what_is_not_there_raises(self, make: MakeOutput) -> None:
        with pytest.raises(FileNotFoundError):
            make().read("answers/a.parquet")


class TestLocalOutput:
    def test_of_many_writers_one_wins_and_its_file_is_whole(self, tmp_path: Path) -> None:
        results: dict[int, bool] = {}
        start = threading.Barrier(8)

        def write(number: int) -> None:
            output = Output(str(tmp_path), HERE)
            start.wait()
            results[number] = output.publish("answers/a", bytes([number]) * 100_000)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = [number for number, won in results.items() if won]
        assert len(results) == 8
        assert (tmp_path / "answers/a").read_bytes() == bytes([winner]) * 100_000

    def test_nothing_unfinished_stays(self, tmp_path: Path) -> None:
        output = Output(str(tmp_path), HERE)
        output.publish("answers/a", b"1")
        output.publish("answers/a", b"2")
        assert list((tmp_path / ".tmp").iterdir()) == []
        assert [path.name for path in (tmp_path / "answers").iterdir()] == ["a"]


class RefusingStore(MemoryFileSystem):
    """Files in memory; every request is refused with the next of `refusals` while there is one."""

    protocol = "refusing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals: ClassVar[list[Exception]] = []
    requests = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("refusing://")))

    def _ask(self) -> None:
        type(self).requests += 1
        if self.refusals:
            raise self.refusals.pop(0)

    def pipe_file(self, *args: Any, **options: Any) -> None:
        self._ask()
        super().pipe_file(*args, **options)

    def cat_file(self, *args: Any, **options: Any) -> bytes:
        self._ask()
        return bytes(super().cat_file(*args, **options))

    def rm_file(self, path: str) -> None:
        self._ask()
        super().rm_file(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._ask()
        return super().ls(path, detail=detail, **options)


FULL = OSError(errno.ENOSPC, "No space left on device")
FORBIDDEN = PermissionError(errno.EACCES, "Forbidden")
DOES: dict[str, Callable[[Output], object]] = {
    "publish": lambda output: output.publish("new", b"1"),
    "replace": lambda output: output.replace("a/there", b"1"),
    "read": lambda output: output.read("a/there"),
    "names": lambda output: output.names("a", suffix=""),
    "remove": lambda output: output.remove("a/there"),
}


class TestRetries:
    @pytest.fixture(autouse=True)
    def _store(self) -> Iterator[None]:
        fsspec.register_implementation("refusing", RefusingStore, clobber=True)
        RefusingStore.store = {}
        Output("refusing://out", HERE).publish("a/there", b"0")
        RefusingStore.requests = 0
        yield
        RefusingStore.refusals = []

    @pytest.mark.parametrize("do", DOES.values(), ids=DOES)
    def test_what_may_pass_is_tried_again(self, do: Callable[[Output], object]) -> None:
        RefusingStore.refusals = [FULL]
        do(Output("refusing://out", HERE, retry_s=30))
        assert RefusingStore.requests == 2

    @pytest.mark.parametrize("do", DOES.values(), ids=DOES)
    def test_without_patience_a_refusal_is_final(self, do: Callable[[Output], object]) -> None:
        RefusingStore.refusals = [FULL]
        with pytest.raises(OSError, match="No space left"):
            do(Output("refusing://out", HERE))
        assert RefusingStore.requests == 1

    def test_a_store_that_never_gives_in_is_given_up_in_time(self) -> None:
        RefusingStore.refusals = [FORBIDDEN] * 100
        start = time.monotonic()
        with pytest.raises(PermissionError, match="Forbidden"):
            Output("refusing://out", HERE, retry_s=1.5).publish("new", b"1")
        assert time.monotonic() - start < 2.0
        assert RefusingStore.requests > 1

    @pytest.mark.parametrize(
        "error", [FileNotFoundError("gone"), NotADirectoryError("file"), ValueError("odd name")]
    )
    def test_what_stays_wrong_is_raised_at_once(self, error: Exception) -> None:
        RefusingStore.refusals = [error]
        with pytest.raises(type(error), match=str(error)):
            Output("refusing://out", HERE, retry_s=30).read("a/there")
        assert RefusingStore.requests == 1

    def test_a_name_that_is_taken_is_no_refusal(self) -> None:
        output = Output("refusing://out", HERE, retry_s=30)
        assert not output.publish("a/there", b"1")
        assert RefusingStore.requests == 1

    def test_patience_is_changed_for_one_caller_only(self) -> None:
        patient = Output("refusing://out", HERE, retry_s=30)
        hasty = patient.with_patience(0)
        RefusingStore.refusals = [FULL]
        with pytest.raises(OSError, match="No space left"):
            hasty.read("a/there")
        RefusingStore.refusals = [FULL]
        assert patient.read("a/there") == b"0"


class TestRewriting:
    """One file in the place of another, whatever else happens meanwhile."""

    @pytest.fixture
    def output(self, tmp_path: Path) -> Output:
        output = Output(str(tmp_path), HERE)
        output.publish("answers/a", b"old")
        return output

    @staticmethod
    def was(output: Output) -> str:
        return output.identities("answers", suffix="")["answers/a"]

    def test_it_takes_the_place(self, output: Output, tmp_path: Path) -> None:
        assert output.rewrite("answers/a", b"new", was=self.was(output), check=lambda: None)
        assert output.read("answers/a") == b"new"
        assert list((tmp_path / ".tmp").iterdir()) == []

    def test_another_file_is_left_alone(self, output: Output, tmp_path: Path) -> None:
        was = self.was(output)
        output.replace("answers/a", b"other")
        assert not output.rewrite("answers/a", b"new", was=was, check=lambda: None)
        assert output.read("answers/a") == b"other"

    def test_a_file_that_is_gone_stays_gone(self, output: Output) -> None:
        was = self.was(output)
        output.remove("answers/a")
        assert not output.rewrite("answers/a", b"new", was=was, check=lambda: None)
        assert output.names("answers", suffix="") == []

    def test_who_holds_the_output_next_puts_an_end_to_it(self, output: Output) -> None:
        """The file is as it was: nothing but its leftovers could tell."""
        check = output.remove_leftovers
        assert not output.rewrite("answers/a", b"new", was=self.was(output), check=check)
        assert output.read("answers/a") == b"old"

    def test_what_check_raises_leaves_all_as_it_was(self, output: Output) -> None:
        def lost() -> None:
            raise OutputHeld("another has it")

        with pytest.raises(OutputHeld):
            output.rewrite("answers/a", b"new", was=self.was(output), check=lost)
        assert output.read("answers/a") == b"old"
