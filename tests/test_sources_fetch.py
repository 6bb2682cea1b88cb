"""Images by URI: from a real web server that fails in every way, from S3, from files."""

import itertools
import os
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.sources.fetch import AHEAD, Fetcher, Unfetched
from pipeline.sources.uris import shown
from pipeline.storage import filesystem
from schemas.errors import (
    ImageMissing,
    ImageTooLarge,
    ImageUnreachable,
    RowError,
    StoreUnavailable,
)
from schemas.job import SourceSpec
from tests.s3 import S3Server

HANG_S = 20.0


class Web(ThreadingHTTPServer):
    """A web server whose paths say how it behaves. `asked`: how often for each of them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Answer(BaseHTTPRequestHandler):
    """Answers `KIND/...` as the method of that name says, anything else with its own path."""

    server: Web

    def do_GET(self) -> None:
        self.name = self.path.partition("?")[0].strip("/")
        with self.server.lock:
            self.server.asked[self.name] += 1
            self.is_first = self.server.asked[self.name] == 1
        kind, *rest = self.name.split("/")
        try:
            getattr(self, f"answer_{kind}", self.answer_name)(*rest)
        except OSError:
            self.close_connection = True

    def answer_name(self, *_: str) -> None:
        self.send(200, self.name.encode())

    def answer_status(self, status: str, *_: str) -> None:
        self.send(int(status), b"no")

    def answer_once(self, status: str, *_: str) -> None:
        self.send(int(status) if self.is_first else 200, b"at last")

    def answer_hang(self, *_: str) -> None:
        self.server.closing.wait(HANG_S)

    def answer_hangonce(self, *_: str) -> None:
        if self.is_first:
            self.server.closing.wait(HANG_S)
        self.send(200, b"late")

    def answer_hangpng(self, name: str) -> None:
        if name.endswith(".png"):
            self.server.closing.wait(HANG_S)
        self.send(404, b"")

    def answer_drip(self, *_: str) -> None:
        self.send(200, b"x", length=100)
        self.wfile.flush()
        self.server.closing.wait(HANG_S)

    def answer_cut(self, *_: str) -> None:
        self.send(200, b"half", length=8)
        self.close_connection = True

    def answer_endless(self, *_: str) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.closing.is_set():
            self.wfile.write(b"\0" * 65536)

    def answer_slow(self, seconds: str, *_: str) -> None:
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(float(seconds))
        with self.server.lock:
            self.server.at_once -= 1
        self.send(200, self.name.encode())

    def answer_to(self, *rest: str) -> None:
        self.send_response(302)
        self.send_header("Location", "/" + "/".join(rest))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, status: int, data: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def fetcher_of(path: str = "/rows", **options: Any) -> Fetcher:
    return Fetcher(SourceSpec.model_validate({"format": "parquet", "path": path, **options}))


def one(uri: str, **options: Any) -> bytes | RowError:
    [image] = fetcher_of(**options).fetch([uri])
    return image


def dead_url(path: str = "x.png") -> str:
    """A URL that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}/{path}"


class TestWeb:
    def test_images_come_in_order_though_servers_answer_out_of_order(self, web: Web) -> None:
        waits = [0.2, 0.0, 0.1, 0.0, 0.05] * 4
        uris = [web.url(f"slow/{wait}/{n}") for n, wait in enumerate(waits)]
        web.most_at_once = 0
        images = list(fetcher_of().fetch(uris))
        assert images == [f"slow/{wait}/{n}".encode() for n, wait in enumerate(waits)]
        assert web.most_at_once > 4

    def test_what_is_ahead_is_bounded(self, web: Web) -> None:
        taken = itertools.count()
        uris = (web.url(f"ahead/{next(taken)}") for _ in range(500))
        fetching = fetcher_of().fetch(uris)
        next(fetching)
        assert next(taken) <= AHEAD + 1
        fetching.close()

    def test_large_images_are_asked_for_one_by_one(
        self, web: Web, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.sources.fetch.AHEAD_BYTES", 3)
        web.most_at_once = 0
        assert len(list(fetcher_of().fetch(web.url(f"slow/0.02/{n}") for n in range(6)))) == 6
        assert web.most_at_once == 1

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_a_server_that_fails_once_is_asked_again(self, web: Web, status: int) -> None:
        assert one(web.url(f"once/{status}/x")) == b"at last"

    def test_a_server_that_hangs_once_is_asked_again(self, web: Web) -> None:
        assert one(web.url("hangonce/x"), image_timeout_s=0.3) == b"late"

    def test_redirections_are_followed(self, web: Web) -> None:
        assert one(web.url("to/images/a.png")) == b"images/a.png"

    @pytest.mark.parametrize("status", [404, 410, 401, 403, 451, 400])
    def test_a_final_answer_is_not_asked_for_again(self, web: Web, status: int) -> None:
        error = one(web.url(f"status/{status}/x?token=secret"))
        known = status in (404, 410, 401, 403)
        assert isinstance(error, ImageMissing if known else ImageUnreachable)
        assert f"127.0.0.1:{web.server_address[1]}/status/{status}/x: " in str(error)
        assert "secret" not in str(error)
        assert web.asked[f"status/{status}/x"] == 1

    def test_a_server_that_fails_for_good_is_a_row_error(self, web: Web) -> None:
        error = one(web.url("status/500/always"))
        assert isinstance(error, ImageUnreachable)
        assert "the server answers 500" in str(error)
        assert web.asked["status/500/always"] == 3

    @pytest.mark.parametrize("kind", ["hang", "drip"])
    def test_a_server_that_hangs_costs_no_more_than_the_timeouts(self, web: Web, kind: str) -> None:
        start = time.monotonic()
        error = one(web.url(f"{kind}/x"), image_timeout_s=0.2)
        assert isinstance(error, ImageUnreachable)
        assert "source.image_timeout_s" in str(error)
        assert time.monotonic() - start < 5

    def test_an_answer_that_is_cut_off_is_no_image(self, web: Web) -> None:
        assert isinstance(one(web.url("cut/x")), ImageUnreachable)

    def test_an_image_without_end_is_not_read_to_its_end(self, web: Web) -> None:
        error = one(web.url("endless/x"), max_image_bytes=1_000_000)
        assert isinstance(error, ImageTooLarge)
        assert "1,000,000" in str(error)
        assert web.asked["endless/x"] == 1

    def test_a_server_that_is_gone_costs_its_own_rows(self, web: Web) -> None:
        dead = dead_url("x.png?key=secret")
        uris = [web.url("a"), *[dead] * (AHEAD + 8), web.url("b")]
        images = list(fetcher_of().fetch(uris))
        assert (images[0], images[-1]) == (b"a", b"b")
        assert {type(image) for image in images[1:-1]} == {ImageUnreachable}
        assert "secret" not in str(images[1])

    def test_where_nothing_is_ever_answered_the_store_is_at_fault(self) -> None:
        fetching = fetcher_of().fetch([dead_url("x.png?key=secret")] * 10)
        with pytest.raises(StoreUnavailable) as error:
            next(fetching)
        assert "none of 10 images in a row was answered" in str(error.value)
        assert "secret" not in str(error.value)

    def test_a_single_dead_link_is_a_row_error(self) -> None:
        assert isinstance(one(dead_url()), ImageUnreachable)

    def test_a_host_of_the_spec_that_is_gone_is_an_unavailable_store(self) -> None:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            one(f"{(root := dead_url('images'))}/x.png", image_root=root)

    def test_a_host_that_went_silent_is_an_unavailable_store(self, web: Web) -> None:
        uris = [web.url("a"), *[web.url(f"hang/{n}") for n in range(AHEAD)]]
        with pytest.raises(StoreUnavailable):
            list(fetcher_of(image_timeout_s=0.1).fetch(uris))

    def test_a_host_of_the_spec_that_answers_else_is_not_at_fault(self, web: Web) -> None:
        root = web.url("hangpng")
        error = one(f"{root}/x.png", image_root=root, image_timeout_s=0.1)
        assert isinstance(error, ImageUnreachable)

    def test_a_store_that_answers_all_but_images_is_unavailable(self, web: Web) -> None:
        """As where a network loses large packets and lets small ones through."""
        root = web.url("hangpng")
        uris = [f"{root}/{n}.png" for n in range(10)]
        with pytest.raises(StoreUnavailable, match="none of 10 images in a row was answered"):
            list(fetcher_of(image_root=root, image_timeout_s=0.1).fetch(uris))

    def test_closing_ends_what_is_under_way(self, web: Web) -> None:
        fetching = fetcher_of().fetch([web.url("a"), *[web.url("hang/closed")] * 4])
        start = time.monotonic()
        next(fetching)
        fetching.close()
        assert time.monotonic() - start < 2


class TestFiles:
    def test_files_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "a b#c?.png").write_bytes(b"a")
        (tmp_path / "empty.png").write_bytes(b"")
        uris = [f"{tmp_path}/a b#c?.png", f"{tmp_path}/empty.png", f"file://{tmp_path}/empty.png"]
        assert list(fetcher_of().fetch(uris)) == [b"a", b"", b""]

    def test_a_file_of_just_the_limit_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"123")
        assert one(str(tmp_path / "a.png"), max_image_bytes=3) == b"123"
        assert isinstance(one(str(tmp_path / "a.png"), max_image_bytes=2), ImageTooLarge)

    def test_a_small_file_costs_no_memory_for_the_largest_that_may_be(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"123")
        fetcher = fetcher_of(max_image_bytes=2**30)
        tracemalloc.start()
        try:
            assert list(fetcher.fetch([str(tmp_path / "a.png")] * AHEAD)) == [b"123"] * AHEAD
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 10_000_000

    def test_a_file_that_is_larger_than_it_says_is_read_to_its_end_or_the_limit(self) -> None:
        """As one that grows while it is read: of those below /proc, no size is known before."""
        whole = Path("/proc/self/smaps").read_bytes()
        assert os.stat("/proc/self/smaps").st_size == 0
        image = one("/proc/self/smaps")
        assert isinstance(image, bytes)
        assert abs(len(image) - len(whole)) < len(whole) / 2
        assert isinstance(one("/proc/self/smaps", max_image_bytes=1000), ImageTooLarge)

    def test_what_is_no_regular_file_is_missing(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        for name in ("no.png", "", "pipe.png", "x" * 300, "a\0b"):
            error = one(f"{tmp_path}/{name}")
            assert isinstance(error, ImageMissing), name

    def test_memory_is_a_store_like_others(self) -> None:
        fsspec.filesystem("memory").pipe_file("/fetched/a.png", b"a")
        assert one("memory://fetched/a.png") == b"a"
        assert isinstance(one("memory://fetched/b.png"), ImageMissing)

    @pytest.mark.parametrize(
        ("uri", "reason"),
        [
            ("data:image/png;base64,iVBORw0KGgo" + "A" * 500, "data: URLs are not read"),
            ("simplecache::https://example.com/a.png", "chained URLs are not read"),
            ("nosuch://a/b", "cannot open this kind of URL"),
            ("http://", "cannot be the name of an image"),
            ("http://[::1/a.png", "cannot be the name of an image"),
        ],
    )
    def test_what_is_no_file_is_refused_clearly(self, uri: str, reason: str) -> None:
        error = one(uri)
        assert isinstance(error, ImageMissing)
        assert reason in str(error)
        assert len(str(error)) < 200

    @settings(max_examples=80, deadline=None)
    @given(st.text(max_size=30), st.sampled_from(["", "/", "file://", "s3://", "memory://", "a::"]))
    def test_any_text_has_an_outcome(self, text: str, scheme: str) -> None:
        fetcher = fetcher_of("/nowhere/rows.parquet")
        uri = fetcher.resolve(scheme + text, beside="/nowhere/rows.parquet")
        if not uri.startswith(("s3", "http")):
            [image] = fetcher.fetch([uri])
            assert isinstance(image, RowError)
        shown(uri).encode()


class TestS3:
    def test_objects_are_read(self, s3_server: S3Server) -> None:
        storage = {"endpoint_url": s3_server.endpoint_url}
        spec = SourceSpec.model_validate({"format": "parquet", "path": "x", "storage": storage})
        fs, folder = filesystem(s3_server.url("fetch"), spec.storage)
        for n in range(40):
            fs.pipe_file(f"{folder}/{n}.png", b"%d" % n)
        fs.pipe_file(f"{folder}/empty.png", b"")
        uris = [s3_server.url(f"fetch/{n}.png") for n in ("empty", *range(40), "no")]
        *images, missing = Fetcher(spec).fetch(uris)
        assert images == [b"", *(b"%d" % n for n in range(40))]
        assert isinstance(missing, ImageMissing)

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.text(max_size=20))
    def test_any_name_has_an_outcome(self, s3_server: S3Server, name: str) -> None:
        storage = {"endpoint_url": s3_server.endpoint_url}
        for uri in (s3_server.url(name), f"s3://{name}"):
            assert isinstance(one(uri, storage=storage), RowError)

    def test_a_store_that_is_gone_is_unavailable(self) -> None:
        storage = {"endpoint_url": dead_url("")}
        with pytest.raises(StoreUnavailable, match="s3://bucket does not answer"):
            one("s3://bucket/a.png", storage=storage, image_timeout_s=0.3)


@pytest.mark.parametrize(
    ("path", "root", "uri"),
    [
        ("a.png", None, "/data/rows/a.png"),
        ("../a.png", None, "/data/rows/../a.png"),
        ("a.png", "/images/", "/images/a.png"),
        ("/other/a.png", "/images", "/other/a.png"),
        ("s3://bucket/a.png", "/images", "s3://bucket/a.png"),
        ("c/a.png", "s3://bucket/images", "s3://bucket/images/c/a.png"),
        ("a.png", "https://host/c?sig=x", "https://host/c/a.png?sig=x"),
        ("data:image/png;base64,AA==", "/images", "data:image/png;base64,AA=="),
    ],
)
def test_a_path_is_below_the_root_or_beside_its_file(path: str, root: str | None, uri: str) -> None:
    fetcher = fetcher_of(image_root=root)
    assert fetcher.resolve(path, beside="/data/rows/1.parquet") == uri


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        ("https://me:pass@host/a.png?X-Amz-Signature=s#f", "https://host/a.png"),
        ("HTTPS://host?x=1", "HTTPS://host"),
        ("s3://key:secret@bucket/a?b.png", "s3://bucket/a?b.png"),
        ("/data/a?b#c@d.png", "/data/a?b#c@d.png"),
        ("a\ud800", "a\ufffd"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, seen: str) -> None:
    assert shown(uri) == seen


def test_items_come_back_with_their_images(web: Web) -> None:
    asked = [(1, web.url("slow/0.1/a")), (2, None), (3, web.url("b")), (4, None)]
    assert list(fetcher_of().fetch_for(asked)) == [
        (1, b"slow/0.1/a"),
        (2, None),
        (3, b"b"),
        (4, None),
    ]


def test_who_only_counts_fetches_nothing(web: Web) -> None:
    spec = SourceSpec.model_validate({"format": "parquet", "path": "x"})
    assert list(Unfetched(spec).fetch([web.url("never"), "data:"])) == [b"", b""]
    assert not web.asked["never"]
