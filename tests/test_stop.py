"""Stopping a run: the first signal finishes what is in flight, a second one insists."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.exits import Terminated, terminate
from jobs.stop import Stop
from tests.kills import read_log
from tests.processes import LiveRun
from tests.scenes import BATCH_SIZE, QUESTIONS, Scene, scene
from tests.watch import wait_until

pytestmark = pytest.mark.slow

ENDED = {130: "interrupted", 143: "terminated"}
TOLD = {130: "Interrupted", 143: "Terminated"}


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore SIGINT, and their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(event: str, drawn: Scene, live: LiveRun) -> None:
    def is_there() -> bool:
        return any(line.event == event for line in read_log(drawn.log))

    wait_until(lambda: live.process.poll() is not None or is_there(), timeout_s=120)
    assert live.process.poll() is None, live.said


def record_of(drawn: Scene) -> dict[str, Any]:
    (file,) = (drawn.folder / "out/runs").iterdir()
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def is_released(drawn: Scene) -> bool:
    (file,) = (drawn.folder / "out/lease").iterdir()
    return json.loads(file.read_text())["released"] is not None


def test_a_signal_makes_durable_what_was_begun_and_begins_nothing(tmp_path: Path) -> None:
    """Ctrl-C; `test_submit.py` stops a job by SIGTERM."""
    drawn = scene(tmp_path, shards=3, images=8, commit_interval_s=600)
    with drawn.run(row_s=0.2) as live:
        wait_for("answered", drawn, live)
        stopped_at = time.time()
        # As Ctrl-C does: to the driver, and to what Ray has started.
        os.killpg(live.process.pid, signal.SIGINT)
        ended, said = live.wait(timeout_s=60)
    assert ended == 130, said
    lines = read_log(drawn.log)
    begun = {line.identity for line in lines if line.event == "begun"}
    assert begun == {line.identity for line in lines if line.event == "durable"}
    late = [line for line in lines if line.event == "begun" and line.at > stopped_at]
    assert len(late) <= 2 * BATCH_SIZE * QUESTIONS
    assert len(begun) < drawn.answers

    assert f"{TOLD[ended]}: finishing what is in flight, for 1 min 0 s at most" in said
    assert re.search(rf"^{len(begun)} answers are durable$", said, re.MULTILINE)
    assert f"{TOLD[ended]}; the same command goes on from here." in said
    record = record_of(drawn)
    assert (record["ended"], record["new"]["ok"]) == (ENDED[ended], len(begun))
    assert is_released(drawn)


@pytest.mark.parametrize(
    ("signals", "grace_s", "status"),
    [((signal.SIGINT, signal.SIGINT), 600, 130), ((signal.SIGTERM,), 1, 143)],
    ids=["a second signal", "the end of the grace period"],
)
def test_a_run_that_is_still_at_work_is_stopped_by(
    tmp_path: Path, signals: Sequence[signal.Signals], grace_s: float, status: int
) -> None:
    drawn = scene(tmp_path, shards=1, images=8)
    job = drawn.job.model_copy(update={"grace_period_s": grace_s})
    drawn = dataclasses.replace(drawn, job=job)
    # A batch would take minutes.
    with drawn.run(row_s=60) as live:
        wait_for("begun", drawn, live)
        for signum in signals:
            live.process.send_signal(signum)
            time.sleep(1)
        ended, said = live.wait(timeout_s=30)
    assert ended == status, said
    assert f"{TOLD[status]}: finishing what is in flight" in said
    assert "0 answers are durable" in said
    assert record_of(drawn)["ended"] == ENDED[status]
    assert is_released(drawn)


def test_without_a_grace_period_one_signal_is_enough_even_while_ray_starts(tmp_path: Path) -> None:
    drawn = scene(tmp_path, shards=1, images=2)
    with LiveRun(drawn.spec()) as live:
        wait_until(lambda: "starting Ray" in live.said, timeout_s=60)
        live.process.send_signal(signal.SIGTERM)
        ended, said = live.wait(timeout_s=30)
    assert ended == 143, said
    assert "in flight" not in said
    assert is_released(drawn)


def test_a_signal_whose_exception_is_swallowed_before_ray_has_started_is_not_forgotten() -> None:
    before = signal.signal(signal.SIGTERM, terminate)
    with Stop(grace_s=60) as stop:
        with contextlib.suppress(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert stop.is_asked
        assert stop.reason is Terminated
        stop.listen()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGTERM, before) is terminate
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
