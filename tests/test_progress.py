"""`jobs/progress.py`: what a run shows while it goes on."""

import io

import pytest
from rich.console import Console

from jobs.progress import LogLines, Pace, Progress, duration


def terminal(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_follows_from_the_shards_that_this_run_completed() -> None:
    pace = Pace(shards_total=10, shards_done=6, shards_done_before=4, started=0.0)
    assert pace.left_s(20.0) == 40.0
    pace.shards_done = 4
    assert pace.left_s(20.0) is None


def test_the_line_tells_answers_rate_failures_shards_and_time() -> None:
    pace = Pace(shards_total=4, shards_done=2, ok=1180, failed=20, started=0.0)
    assert pace.line(60.0) == (
        "1,200 answers, 20.0/s, 20 failed, 2/4 shards, 1 min 0 s elapsed, about 1 min 0 s left"
    )


def test_without_a_terminal_there_are_plain_lines_at_start_and_stop() -> None:
    console = terminal(is_terminal=False)
    with Progress(console) as progress:
        progress.start(2, 1)
        progress.advance(ok=3, skipped=1, shards_done=1)
    lines = written(console).splitlines()
    assert len(lines) == 2
    assert "1/2 shards" in lines[0]
    assert "4 answers" in lines[1]
    assert "2/2 shards" in lines[1]
    assert "\x1b" not in written(console)


def test_plain_lines_keep_their_distance() -> None:
    console = terminal(is_terminal=False)
    rare, often = LogLines(console, interval_s=3600), LogLines(console, interval_s=0)
    rare.start(lambda: "rare")
    often.start(lambda: "often")
    for _ in range(3):
        rare.update(lambda: "rare")
        often.update(lambda: "often")
    assert written(console).split() == ["rare", *["often"] * 4]


def test_on_a_terminal_the_last_state_stays_on_screen() -> None:
    console = terminal(is_terminal=True)
    with Progress(console) as progress:
        progress.start(1)
        progress.advance(ok=7, shards_done=1)
    assert "7 answers" in written(console).splitlines()[-2]
    assert "\x1b[?25h" in written(console)


def test_stopping_twice_or_before_the_start_shows_nothing_more() -> None:
    console = terminal(is_terminal=False)
    progress = Progress(console)
    progress.stop()
    assert written(console) == ""
    progress.start(1)
    progress.stop()
    progress.stop()
    assert len(written(console).splitlines()) == 2
