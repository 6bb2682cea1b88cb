"""The lease, held by real processes on local disks, in memory and on a real S3 server.

Run as a module this file is such a process: it holds and leaves as the lines on its stdin say.
"""

import contextlib
import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.lease import Lease, hold
from pipeline.storage import Output
from schemas.errors import OutputHeld, SpecError
from schemas.job import StorageSpec
from tests.s3 import S3Server

LONG_S = 60.0
SOON_S = 30.0
"""Longer than any step here takes on a busy machine, and shorter than `LONG_S`."""
REMEDY = "let it end, or stop it; the same command goes on from there"
STORAGE = "LEASE_TEST_STORAGE"


def listen() -> None:
    """What the other process does: one answer for each line it is sent."""
    storage = StorageSpec.model_validate_json(os.environ[STORAGE])
    held = contextlib.ExitStack()
    lease: Lease | None = None
    for line in sys.stdin:
        message = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if message["do"] == "hold":
                said: list[str] = []
                output = Output(message["url"], storage)
                host = message["host"] or socket.gethostname()
                socket.gethostname = lambda host=host: host
                time.sleep(max(0.0, message["at"] - time.time()))
                context = hold(
                    output, run_id=message["run_id"], timeout_s=message["timeout_s"],
                    say=said.append,
                )  # fmt: skip
                lease = held.enter_context(context)
                answer = {"number": lease.number, "said": said}
            elif message["do"] == "leave":
                held.close()
            elif lease is not None:
                answer = {"lost": str(lease.lost) if lease.lost else None}
                lease.check()
        except OutputHeld as error:
            answer["refused"] = str(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class OtherProcess:
    """A real process that holds outputs."""

    def __init__(self, storage: StorageSpec) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.test_lease"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, STORAGE: storage.model_dump_json()},
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, do: str, **values: Any) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.popen.stdout
        answer: dict[str, Any] = json.loads(self.popen.stdout.readline())
        return answer

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.send(do, **values)
        return self.answer()

    def begin(self, url: str, **values: Any) -> None:
        known = {"run_id": "theirs", "timeout_s": LONG_S, "host": None, "at": 0.0}
        self.send("hold", url=url, **(known | values))

    def hold(self, url: str, **values: Any) -> dict[str, Any]:
        self.begin(url, **values)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Place:
    """One output, opened as often as there are runs."""

    def __init__(self, url: str, storage: StorageSpec | None = None) -> None:
        self.url = url
        self.storage = storage or StorageSpec()
        self.said: list[str] = []

    def output(self) -> Output:
        return Output(self.url, self.storage, retry_s=LONG_S)

    def hold(
        self, run_id: str = "ours", timeout_s: float = LONG_S
    ) -> contextlib.AbstractContextManager[Lease]:
        return hold(self.output(), run_id=run_id, timeout_s=timeout_s, say=self.said.append)

    def other(self) -> OtherProcess:
        return OtherProcess(self.storage)

    def files(self) -> list[str]:
        return self.output().names("lease", suffix="")

    def record(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.output().read(f"lease/{number:08}.json"))
        return record

    def write(self, number: int, data: bytes) -> None:
        self.output().replace(f"lease/{number:08}.json", data)

    def leave_behind(self, number: int, /, **changes: Any) -> dict[str, Any]:
        """A lease file as a run on another machine leaves it; `changes` replace its values."""
        record = {
            "number": number,
            "run_id": "theirs",
            "token": uuid.uuid4().hex,
            "host": "elsewhere",
            "boot_id": "another",
            "pid": 4242,
            "pid_start": 17,
            "pid_namespace": "pid:[1]",
            "since": "2026-01-02T03:04:05+00:00",
            "beat": 3,
            "timeout_s": LONG_S,
            "released": None,
            **changes,
        }
        self.write(number, json.dumps(record).encode())
        return record


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "out"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}")
    server: S3Server = request.getfixturevalue("s3_server")
    return Place(server.url(uuid.uuid4().hex), StorageSpec(endpoint_url=server.endpoint_url))


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "out"))


shared_places = pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
"""Those that another process can reach."""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def faster_than(limit_s: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < limit_s


class TestHolding:
    def test_a_fresh_output_is_held_under_the_first_number(self, place: Place) -> None:
        with place.hold("r-1", timeout_s=42) as lease:
            assert (lease.number, lease.is_exclusive, lease.lost) == (1, True, None)
            assert place.files() == ["lease/00000001.json"]
            lease.check()
        record = place.record(1)
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        assert record | {"token": "", "since": "", "released": ""} == {
            "number": 1,
            "run_id": "r-1",
            "token": "",
            "host": socket.gethostname(),
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pid": os.getpid(),
            "pid_start": int(stat[19]),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
            "since": "",
            "beat": 0,
            "timeout_s": 42,
            "released": "",
        }
        assert place.said == []

    def test_numbers_grow_and_lower_files_go(self, place: Place) -> None:
        for number in range(1, 6):
            with place.hold() as lease:
                assert lease.number == number
                assert place.files() == [f"lease/{number:08}.json"]
            assert place.files() == [f"lease/{number:08}.json"]
            assert place.record(number)["released"]

    def test_a_block_that_fails_releases_and_its_error_is_the_one_raised(self, here: Place) -> None:
        with pytest.raises(ZeroDivisionError), here.hold():
            raise ZeroDivisionError
        assert here.record(1)["released"]

    def test_several_outputs_are_held_at_once(self, here: Place, tmp_path: Path) -> None:
        with here.hold() as one, Place(str(tmp_path / "more")).hold() as other:
            one.check()
            other.check()

    def test_other_files_in_the_folder_are_left_alone(self, here: Place) -> None:
        for name in ("lease/notes.json", "lease/7.json", "lease/00000009.json.bak"):
            here.output().replace(name, b"?")
        with here.hold() as lease:
            assert lease.number == 1
            assert len(here.files()) == 4


class TestRefusing:
    def test_a_second_run_in_the_same_process_is_refused_at_once(self, place: Place) -> None:
        with place.hold("r-1") as lease:
            since = place.record(1)["since"]
            with faster_than(SOON_S), pytest.raises(OutputHeld) as error, place.hold("r-2"):
                pass
            lease.check()
        assert str(error.value) == (
            f"output.path {place.output().uri!r} is held by run r-1 on {socket.gethostname()} "
            f"(pid {os.getpid()}, since {since}); {REMEDY}"
        )

    @shared_places
    def test_a_living_process_is_named(self, place: Place) -> None:
        with place.other() as other:
            other.hold(place.url, run_id="r-1")
            since = place.record(1)["since"]
            with faster_than(SOON_S), pytest.raises(OutputHeld) as error, place.hold():
                pass
        holder = f"run r-1 on {socket.gethostname()} (pid {other.pid}, since {since})"
        assert holder in str(error.value)
        assert REMEDY in str(error.value)
        assert place.said == []

    @shared_places
    def test_another_machine_that_gives_signs_of_life_is_refused(self, place: Place) -> None:
        with place.other() as other:
            other.hold(place.url, run_id="r-1", host="elsewhere", timeout_s=2.0)
            with pytest.raises(OutputHeld, match="held by run r-1 on elsewhere"), place.hold():
                pass
        [said] = place.said
        assert f"run r-1 on elsewhere (pid {other.pid}, since " in said
        assert said.endswith("); waiting up to 2 s for a sign of life")

    @pytest.mark.parametrize(
        "elsewhere", [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}]
    )
    def test_a_pid_that_means_another_process_says_nothing(
        self, here: Place, elsewhere: dict[str, str]
    ) -> None:
        with here.hold():
            record = here.record(1)
        record |= {"pid": 2**22 + 1, "released": None, "timeout_s": 0.3}
        here.leave_behind(2, **(record | elsewhere))
        with here.hold() as lease:
            assert lease.number == 3
        assert "waiting up to 0 s" in here.said[0]


class TestTakingOver:
    @shared_places
    def test_a_killed_process_of_this_machine_is_followed_at_once(self, place: Place) -> None:
        with place.other() as other:
            assert other.hold(place.url)["number"] == 1
            other.popen.send_signal(signal.SIGKILL)
            other.popen.wait()
            with faster_than(SOON_S), place.hold() as lease:
                assert lease.number == 2
        assert place.said == []

    def test_a_killed_process_that_nobody_has_waited_for_is_dead_too(self, here: Place) -> None:
        with here.other() as other:
            other.hold(here.url)
            other.popen.send_signal(signal.SIGKILL)
            stat = Path(f"/proc/{other.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
            with faster_than(SOON_S), here.hold() as lease:
                assert lease.number == 2

    def test_a_pid_that_was_given_to_another_process_is_dead(self, here: Place) -> None:
        with here.other() as other:
            other.hold(here.url)
            record = here.record(1)
            here.leave_behind(2, **(record | {"pid_start": record["pid_start"] - 1}))
            with faster_than(SOON_S), here.hold() as lease:
                assert lease.number == 3

    def test_a_silent_run_elsewhere_is_followed_after_its_own_time(self, place: Place) -> None:
        place.leave_behind(7, timeout_s=1.0)
        start = time.monotonic()
        with place.hold(timeout_s=LONG_S) as lease:
            assert 1.0 <= time.monotonic() - start < SOON_S
            assert lease.number == 8
            assert place.files() == ["lease/00000008.json"]
        [said] = place.said
        assert said == (
            f"output.path {place.output().uri!r} is held by run theirs on elsewhere (pid 4242, "
            "since 2026-01-02T03:04:05+00:00); waiting up to 1 s for a sign of life"
        )

    def test_a_lease_released_meanwhile_is_followed_at_once(self, here: Place) -> None:
        record = here.leave_behind(7, timeout_s=SOON_S)
        release = threading.Timer(0.3, here.leave_behind, [7], record | {"released": "now"})
        release.start()
        with faster_than(SOON_S / 2), here.hold() as lease:
            assert lease.number == 8
        release.join()

    @pytest.mark.parametrize(
        "rubbish",
        [b"", b"{", b"\xff\xfe", b"[]", b'{"number": 7}', b"NaN"],
        ids=["empty", "open", "bytes", "list", "keys", "nan"],
    )
    def test_a_file_that_makes_no_sense_is_watched_too(self, here: Place, rubbish: bytes) -> None:
        here.write(7, rubbish)
        start = time.monotonic()
        with here.hold(timeout_s=0.3) as lease:
            assert time.monotonic() - start >= 0.3
            assert lease.number == 8
        assert "a run that lease/00000007.json does not name" in here.said[0]

    @pytest.mark.parametrize(
        "changes",
        [{"pid": -1}, {"pid": 10**30}, {"timeout_s": 0}, {"timeout_s": float("inf")}],
        ids=str,
    )
    def test_values_that_make_no_sense_are_rubbish(
        self, here: Place, changes: dict[str, Any]
    ) -> None:
        here.leave_behind(7, **changes)
        with here.hold(timeout_s=0.3) as lease:
            assert lease.number == 8

    def test_rubbish_that_changes_is_a_sign_of_life(self, here: Place) -> None:
        here.write(7, b"one")
        change = threading.Timer(0.2, here.write, [7, b"two"])
        change.start()
        with pytest.raises(OutputHeld, match=r"00000007.json does not name; let it end"):
            here.hold(timeout_s=SOON_S).__enter__()
        change.join()

    @pytest.mark.slow
    def test_the_time_in_which_nobody_could_watch_does_not_count(self, here: Place) -> None:
        """Both machines sleep and wake up: the watcher first, then the holder."""
        here.leave_behind(7, timeout_s=2.0)
        with here.other() as watcher:
            watcher.ask("look")
            watcher.begin(here.url)
            time.sleep(0.5)
            watcher.popen.send_signal(signal.SIGSTOP)
            time.sleep(2.5)
            watcher.popen.send_signal(signal.SIGCONT)
            for beat in range(4, 8):
                time.sleep(0.4)
                here.leave_behind(7, timeout_s=2.0, beat=beat)
            assert "refused" in watcher.answer()


class TestBeating:
    def test_the_file_is_renewed_until_it_is_released(self, place: Place) -> None:
        with place.hold(timeout_s=0.6):
            until(lambda: place.record(1)["beat"] >= 3)
        last = place.record(1)
        time.sleep(0.3)
        assert place.record(1) == last
        assert last["released"]

    def test_no_beat_comes_after_the_release(self, here: Place) -> None:
        for number in range(1, 101):
            with here.hold(timeout_s=0.006):
                time.sleep(0.001 * (number % 5))
            assert here.record(number)["released"]

    def test_a_store_that_comes_back_finds_the_thread_alive(
        self, here: Place, tmp_path: Path
    ) -> None:
        out, away = Path(here.url), tmp_path / "away"
        with here.hold(timeout_s=0.3) as lease:
            out.rename(away)
            out.touch()
            with pytest.raises(NotADirectoryError):
                lease.check()
            time.sleep(0.3)
            out.unlink()
            away.rename(out)
            beat = here.record(1)["beat"]
            until(lambda: here.record(1)["beat"] > beat)
            lease.check()

    def test_a_store_that_fails_at_the_end_hides_nothing_and_locks_nobody_out(
        self, here: Place, tmp_path: Path
    ) -> None:
        out, away = Path(here.url), tmp_path / "away"

        def run_into_trouble() -> None:
            with here.hold():
                out.rename(away)
                out.touch()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_into_trouble()
        out.unlink()
        away.rename(out)
        assert here.record(1)["released"] is None
        with faster_than(SOON_S), here.hold() as lease:
            assert lease.number == 2


class FullStore(MemoryFileSystem):
    """Files in memory, until it is full."""

    protocol = "full"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    is_full = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("full://")))

    def pipe_file(self, *args: Any, **options: Any) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().pipe_file(*args, **options)


class TestKeepingTime:
    """What the output waits for patiently, the lease does not."""

    @pytest.fixture(autouse=True)
    def _store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fsspec.register_implementation("full", FullStore, clobber=True)
        monkeypatch.setattr(FullStore, "is_full", False)

    def test_leaving_does_not_wait_for_the_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with faster_than(SOON_S), Place(f"full://{uuid.uuid4().hex}").hold():
            monkeypatch.setattr(FullStore, "is_full", True)

    def test_a_full_store_is_told_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FullStore, "is_full", True)
        with faster_than(SOON_S), pytest.raises(SpecError, match="No space left"):
            Place(f"full://{uuid.uuid4().hex}").hold().__enter__()


class TestLosing:
    def test_the_heartbeat_and_a_check_see_who_took_over(self, place: Place) -> None:
        with place.hold(timeout_s=0.6) as lease:
            place.leave_behind(2)
            until(lambda: lease.lost)
            with pytest.raises(OutputHeld) as error:
                lease.check()
        assert str(error.value) == str(lease.lost)
        assert str(error.value) == (
            "run theirs on elsewhere (pid 4242, since 2026-01-02T03:04:05+00:00) has taken the "
            f"output {place.output().uri!r} over; this run stops; what it has answered is kept"
        )

    def test_a_check_sees_it_before_the_next_beat(self, place: Place) -> None:
        with place.hold() as lease:
            lease.check()
            place.leave_behind(2)
            assert lease.lost is None
            with pytest.raises(OutputHeld, match="has taken the output"):
                lease.check()
            assert lease.lost is not None

    def test_who_has_lost_writes_nothing_more(self, place: Place) -> None:
        with place.hold(timeout_s=0.3) as lease:
            theirs = place.leave_behind(2)
            until(lambda: lease.lost)
            until(lambda: "lavaflow-lease" not in {t.name for t in threading.enumerate()})
            ours = place.record(1)
        assert place.record(1) == ours
        assert place.record(2) == theirs

    def test_releasing_before_any_beat_leaves_the_new_holder_alone(self, place: Place) -> None:
        with place.hold():
            ours = place.record(1)
            theirs = place.leave_behind(2)
        assert place.record(1) == ours
        assert place.record(2) == theirs

    @shared_places
    def test_a_frozen_run_that_thaws_sees_that_it_was_followed(self, place: Place) -> None:
        with place.other() as other:
            other.hold(place.url, host="elsewhere", timeout_s=1.0)
            other.popen.send_signal(signal.SIGSTOP)
            with place.hold("ours") as lease:
                assert lease.number == 2
                other.popen.send_signal(signal.SIGCONT)
                until(lambda: other.ask("look")["lost"])
                answer = other.ask("look")
                assert "run ours on" in answer["refused"]
                assert "has taken the output" in answer["refused"]
                other.ask("leave")
                lease.check()
                assert place.record(2)["released"] is None


class MeddledOutput(Output):
    """An output where other runs come in between, just before its first request of a kind."""

    before: ClassVar[dict[str, Callable[[], None]]] = {}
    answer_is_lost = False

    def publish(self, name: str, data: bytes) -> bool:
        self.before.pop("publish", lambda: None)()
        return super().publish(name, data) and not self.answer_is_lost

    def read(self, name: str) -> bytes:
        self.before.pop("read", lambda: None)()
        return super().read(name)


def start_both(one: OtherProcess, two: OtherProcess, url: str, run_id: str) -> list[dict[str, Any]]:
    """Let both take an output at the same moment; the answers."""
    at = time.time() + 0.1
    for process in (one, two):
        process.begin(url, run_id=run_id, at=at)
    return [one.answer(), two.answer()]


class TestRaces:
    @pytest.mark.slow
    @pytest.mark.parametrize(("place", "rounds"), [("local", 20), ("s3", 5)], indirect=["place"])
    def test_of_two_runs_that_start_together_exactly_one_holds(
        self, place: Place, rounds: int
    ) -> None:
        with place.other() as one, place.other() as two:
            for number in range(1, rounds + 1):
                fresh = f"{place.url}/{number}"
                for url, next_number in ((place.url, number), (fresh, 1)):
                    answers = start_both(one, two, url, f"r-{number}")
                    [winner] = [answer for answer in answers if "number" in answer]
                    [loser] = [answer for answer in answers if "refused" in answer]
                    assert winner == {"number": next_number, "said": []}
                    assert f"held by run r-{number} on" in loser["refused"]
                    for process in (one, two):
                        process.ask("leave")

    def test_an_old_number_that_is_free_again_does_not_win(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A has looked; B holds and leaves, C holds and removes B's file; then A creates it."""
        with contextlib.ExitStack() as held:
            leases = []

            def others_hold() -> None:
                with place.hold("b"):
                    pass
                leases.append(held.enter_context(place.hold("c")))
                assert place.files() == ["lease/00000002.json"]

            monkeypatch.setitem(MeddledOutput.before, "publish", others_hold)
            late = MeddledOutput(place.url, place.storage)
            with pytest.raises(OutputHeld, match="held by run c on"):
                hold(late, run_id="a", timeout_s=LONG_S, say=place.said.append).__enter__()
            assert place.files() == ["lease/00000001.json", "lease/00000002.json"]
            leases[0].check()

    def test_who_loses_to_a_run_that_has_already_left_tries_again(
        self, here: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def another_holds() -> None:
            with here.hold("b"):
                pass

        monkeypatch.setitem(MeddledOutput.before, "publish", another_holds)
        late = MeddledOutput(here.url, here.storage)
        with hold(late, run_id="a", timeout_s=LONG_S, say=here.said.append) as lease:
            assert lease.number == 2
            assert here.files() == ["lease/00000002.json"]

    def test_a_file_that_went_before_it_was_read_was_followed(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with place.hold("b"):
            pass
        with contextlib.ExitStack() as held:
            follow = functools.partial(held.enter_context, place.hold("c"))
            monkeypatch.setitem(MeddledOutput.before, "read", follow)
            late = MeddledOutput(place.url, place.storage)
            with pytest.raises(OutputHeld, match="held by run c on"):
                hold(late, run_id="a", timeout_s=LONG_S, say=place.said.append).__enter__()

    def test_a_run_that_failed_while_it_took_the_lease_locks_nobody_out(
        self, here: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setitem(MeddledOutput.before, "read", fail)
        output = MeddledOutput(here.url, here.storage)
        with pytest.raises(SpecError, match="Input/output error"):
            hold(output, run_id="a", timeout_s=LONG_S, say=here.said.append).__enter__()
        with here.hold() as lease:
            assert lease.number == 2

    def test_an_upload_that_meets_its_own_first_try_has_won(self, here: Place) -> None:
        output = MeddledOutput(here.url, here.storage)
        output.answer_is_lost = True
        with hold(output, run_id="a", timeout_s=LONG_S, say=here.said.append) as lease:
            assert (lease.number, lease.is_exclusive) == (1, True)


class OverwritingStore(MemoryFileSystem):
    """A store that knows no exclusive creation: what comes last stays."""

    protocol = "overwriting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("overwriting://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "", **options: Any) -> None:
        super().pipe_file(path, value, mode="overwrite")


class TestStoreWithoutExclusiveCreation:
    @pytest.fixture
    def careless(self) -> Place:
        fsspec.register_implementation("overwriting", OverwritingStore, clobber=True)
        return Place(f"overwriting://{uuid.uuid4().hex}")

    @pytest.mark.slow
    def test_it_is_said_and_works(self, careless: Place) -> None:
        for number in (1, 2):
            with careless.hold(timeout_s=0.6) as lease:
                assert (lease.number, lease.is_exclusive) == (number, False)
                until(lambda: careless.record(lease.number)["beat"] > 0)
                with pytest.raises(OutputHeld):
                    careless.hold().__enter__()
                lease.check()
            assert careless.record(number)["released"]
        assert len(careless.said) == 2
        assert "cannot create files exclusively" in careless.said[0]
        assert "start one at a time" in careless.said[0]

    @pytest.mark.slow
    def test_runs_that_overwrite_each_other_in_time_see_it(self, careless: Place) -> None:
        entered, refused = [], []
        start = threading.Barrier(4)

        def run(number: int) -> None:
            context = careless.hold(f"r-{number}")
            start.wait()
            try:
                with context as lease:
                    entered.append(lease)
                    time.sleep(2.0)
                    lease.check()
            except OutputHeld as error:
                refused.append(error)

        threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(entered), len(refused)) == (1, 3)

    def test_a_file_that_was_overwritten_is_lost_and_left_alone(self, careless: Place) -> None:
        with careless.hold(timeout_s=0.6) as lease:
            theirs = careless.leave_behind(1)
            until(lambda: lease.lost)
            with pytest.raises(OutputHeld, match="run theirs on elsewhere"):
                lease.check()
        assert careless.record(1) == theirs

    def test_an_overwritten_file_is_not_released(self, careless: Place) -> None:
        with careless.hold():
            theirs = careless.leave_behind(1)
        assert careless.record(1) == theirs


class TestOutputsThatCannotBeWritten:
    def refused(self, output: Output) -> str:
        """The message of the SpecError, which comes without the output's patience."""
        with faster_than(SOON_S), pytest.raises(SpecError) as error:
            hold(output, run_id="r", timeout_s=LONG_S, say=lambda text: None).__enter__()
        assert str(error.value).startswith(f"output.path {output.uri!r} cannot be written (")
        assert "check the path, its permissions and the credentials" in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("path", ["file", "file/out", "a\0b", "x" * 300, "\udcff" * 300])
    def test_odd_paths(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        self.refused(Output(f"{tmp_path}/{path}", StorageSpec(), retry_s=LONG_S))

    def test_a_place_where_nobody_may_write(self) -> None:
        self.refused(Output("/proc/out", StorageSpec(), retry_s=LONG_S))

    @pytest.mark.parametrize("name", ["lease", "lease/00000007.json"])
    def test_something_else_under_a_name_of_the_lease(self, here: Place, name: str) -> None:
        for number in range(1, 8):
            with here.hold() as lease:
                assert lease.number == number
        path = Path(here.url) / name
        for file in Path(here.url, "lease").iterdir():
            file.unlink()
        if name == "lease":
            path.rmdir()
            path.touch()
        else:
            path.mkdir()
            here.leave_behind(6, released="then")
        self.refused(here.output())

    def test_credentials_that_are_missing_or_wrong(
        self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nobody = StorageSpec(endpoint_url=s3_server.endpoint_url, anon=True)
        self.refused(Output(s3_server.url("x"), nobody, retry_s=LONG_S))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        somebody = StorageSpec(endpoint_url=f"{s3_server.endpoint_url}/")
        self.refused(Output(s3_server.url("x"), somebody, retry_s=LONG_S))

    def test_a_bucket_that_cannot_be(self, s3_server: S3Server) -> None:
        storage = StorageSpec(endpoint_url=s3_server.endpoint_url)
        self.refused(Output("s3://no such bucket!/x", storage, retry_s=LONG_S))

    @pytest.mark.slow
    def test_a_server_that_is_not_there(self, s3_server: S3Server) -> None:
        storage = StorageSpec(endpoint_url="http://127.0.0.1:9")
        self.refused(Output(s3_server.url("x"), storage, retry_s=LONG_S))


if __name__ == "__main__":
    listen()
