"""Jobs that are killed, cut off, started twice and fed nonsense; `make soak` runs it in full.

    python -m tests.soak [SCENARIO ...] [--seed N] [--seconds N]

Prints a JSON object for each scenario: what was done, what was counted, and its `faults`, which
have to be none. `tests/test_kills.py` runs the same scenarios at lower counts.
"""

import argparse
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commit_steps import NIGHTS
from tests.complete import audited, resumed
from tests.costs import Life, costs_of, longest_until_durable_s
from tests.fuzzed import fuzzed
from tests.kills import Death, Line, read_log
from tests.nights import added_question, nights
from tests.processes import LiveRun, kill, title_of, workers_of
from tests.proxy import Proxy
from tests.s3 import S3Server, serve
from tests.scenes import (
    BATCH_SIZE,
    COMMIT_INTERVAL_S,
    QUESTIONS,
    place_on,
    s3_of,
    scene,
    wait_for_answers,
)
from tests.soak_memory import gigapixels, tiny_images
from tests.storms import Storm, storms
from tests.watch import Watch, watching

Figures = dict[str, Any]

CALLS_AT_ONCE = 2
"""As `flow.CALLS_AT_ONCE`, which takes ray.data to look at."""
BATCHES_AHEAD = 4
"""Answered batches that may wait: `flow.BUNDLES_AHEAD`, one in the driver's hands, one in Ray's."""
IN_FLIGHT = (CALLS_AT_ONCE + BATCHES_AHEAD) * BATCH_SIZE * QUESTIONS
"""Answers of the batches that are in the engine, and of those that wait."""
ROWS_PER_FILE = 100
"""More than an interval's answers, which would else be written sooner."""
WRITE_S = 5.0
"""What a write may take, on a busy machine: a worker for it has to start first."""
START_S = 15.0
"""About what a run needs until it answers; kills before that fall evenly over it."""
FUZZ_S = 300.0
ENDED, HELD = 0, 75
STAGES = ("read", "encode", "generate", "generated", "write")


# Everything dies


def sigkills(folder: Path, *, kills: int, images: int, row_s: float, seed: int = 0) -> Figures:
    """Kill driver and workers at random moments, then let the job end; a reader looks on."""
    rng = random.Random(seed)
    it = scene(folder, shards=5, images=images // 5, rows_per_file=ROWS_PER_FILE)
    lives = []
    with watching(it.watch()) as watch:
        for _ in range(kills):
            with it.run(row_s=row_s) as run:
                wait_for_a_moment(run, it.log, rng)
                run.kill()
                lives.append(Life(run.started_at, time.time()))
        with it.run(row_s=row_s) as run:
            status, said = run.wait()
            lives.append(Life(run.started_at, time.time()))
    lines = read_log(it.log)
    durable_s = longest_until_durable_s(lines)
    costs = costs_of(lines, lives, in_flight=IN_FLIGHT, durable_s=durable_s)
    worst = max(costs, key=lambda cost: cost.repeated)
    faults = [*watch.faults, *it.faults(), *([said] if status else [])]
    if durable_s > COMMIT_INTERVAL_S + WRITE_S:
        faults.append(f"{durable_s:.1f} s passed until an answer was durable")
    faults += [f"kill {n}: {cost}" for n, cost in enumerate(costs) if cost.repeated > cost.bound]
    return {
        "kills": kills,
        "kills_before_the_first_answer": sum(not cost.begun for cost in costs[:-1]),
        "answers": it.answers,
        "answers_left_for_the_last_run": costs[-1].begun,
        "answered_again": sum(cost.repeated for cost in costs),
        "answered_again_after_the_worst_kill": worst.repeated,
        "bound_of_that_kill": worst.bound,
        "longest_until_durable_s": round(durable_s, 2),
        "polls": watch.polls,
        "faults": faults,
    }


def wait_for_a_moment(run: LiveRun, log: Path, rng: random.Random) -> None:
    """A quarter of the moments falls before the first answer, the others in the 3 s after it."""
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, START_S))
        return
    wait_for_answers(run, log)
    time.sleep(rng.uniform(0, 3))


def uninterrupted(folder: Path, *, images: int, row_s: float) -> Figures:
    """How long the job of `sigkills` takes when nobody kills it."""
    it = scene(folder, shards=5, images=images // 5, rows_per_file=ROWS_PER_FILE)
    with it.run(row_s=row_s) as run:
        status, said = run.wait()
        elapsed_s = time.time() - run.started_at
    faults = [*it.faults(), *([said] if status else [])]
    return {"answers": it.answers, "elapsed_s": round(elapsed_s, 1), "faults": faults}


# Workers die


def worker_deaths(folder: Path, *, stages: Sequence[str], call: int = 2) -> Figures:
    """Let a worker of each stage kill itself; the run has to end by itself."""
    it = scene(folder, shards=3, images=8, rows_per_file=8)
    deaths = tuple(Death(stage, call, str(folder)) for stage in stages)
    with watching(it.watch()) as watch, it.run(row_s=0.02, deaths=deaths) as run:
        status, said = run.wait()
    died = sorted(marker.name.removeprefix("died-") for marker in folder.glob("died-*"))
    faults = [*watch.faults, *it.faults(), *([said] if status else [])]
    faults += [] if died == sorted(stages) else [f"only {died} died"]
    lines = read_log(it.log)
    return {
        "died": died,
        "status": status,
        "answers": it.answers,
        "answered_again": times_more(lines, "answered"),
        "written_again": times_more(lines, "durable"),
        "polls": watch.polls,
        "faults": faults,
    }


def times_more(lines: Sequence[Line], event: str) -> int:
    times = Counter(line.identity for line in lines if line.event == event)
    return sum(times.values()) - len(times)


def worker_kills(folder: Path, *, kills: int, images: int, row_s: float, seed: int = 0) -> Figures:
    """Kill any worker of a run every few seconds; the run has to end by itself."""
    rng = random.Random(seed)
    it = scene(folder, shards=5, images=images // 5, rows_per_file=ROWS_PER_FILE)
    killed: Counter[str] = Counter()
    with watching(it.watch()) as watch, it.run(row_s=row_s) as run:
        wait_for_answers(run, it.log)
        while killed.total() < kills and run.process.poll() is None:
            if workers := workers_of(run):
                pid = rng.choice(workers)
                killed[title_of(pid).partition("(")[0].strip("\0")] += 1
                kill(pid)
            time.sleep(rng.uniform(1, 5))
        status, said = run.wait(timeout_s=600)
    return {
        "killed": dict(killed),
        "status": status,
        "answers": it.answers,
        "begun_again": times_more(read_log(it.log), "begun"),
        "polls": watch.polls,
        "faults": [*watch.faults, *it.faults(), *([said] if status else [])],
    }


# The store dies


@dataclass(frozen=True)
class Outage:
    """How long the store is down, and how long a run puts up with that."""

    down_s: float
    retry_s: float


SHORT = Outage(down_s=2, retry_s=60)
LONG = Outage(down_s=20, retry_s=1)


def store_failures(
    folder: Path, server: S3Server, *, rounds: int, outage: Outage = SHORT, seed: int = 0
) -> Figures:
    """Each round, while a job runs: kill the store, refuse and cut connections to it.

    A run that gives up is followed by one on a store that is well.
    """
    rng = random.Random(seed)
    proxy = Proxy(server.port)
    place = place_on(server, folder)
    it = scene(folder, shards=4, images=4 + 4 * rounds, rows_per_file=16, retry_s=outage.retry_s)
    it = it.moved(place, server, endpoint_url=proxy.endpoint_url)
    mishaps = list(mishaps_of(server, proxy, down_s=outage.down_s).items()) * rounds
    rng.shuffle(mishaps)
    watch = Watch(s3_of(server), it.job.output.path.removeprefix("s3://"), can_fail=True)
    done: Counter[str] = Counter()
    statuses = []
    with closing(proxy), watching(watch):
        with it.run(row_s=0.15) as run:
            wait_for_answers(run, it.log)
            for name, mishap in mishaps:
                if run.process.poll() is None:
                    mishap()
                    done[name] += 1
                    time.sleep(rng.uniform(0.5, 1.5))
            status, said = run.wait()
            statuses.append(status)
        if status:
            with it.run() as run:
                status, said = run.wait()
                statuses.append(status)
        faults = [*it.faults(), *([said] if status else [])]
    return {
        "mishaps": dict(done),
        "uploads_cut": proxy.cuts,
        "statuses": statuses,
        "answers": it.answers,
        "polls": watch.polls,
        "objects_read": watch.files,
        "faults": [*watch.faults, *faults],
    }


def mishaps_of(
    server: S3Server, proxy: Proxy, *, down_s: float
) -> Mapping[str, Callable[[], None]]:
    def kill_and_restart() -> None:
        server.kill()
        time.sleep(down_s)
        server.restart()

    def refuse() -> None:
        with proxy.refusing():
            time.sleep(down_s)

    return {
        "killed": kill_and_restart,
        "refused": refuse,
        "connections cut": proxy.cut_all,
        "uploads cut": lambda: proxy.cut_uploads(8, after_bytes=1500),
        "answers lost": lambda: proxy.lose_answers(2),
    }


# Two at once


def duels(folder: Path, *, times: int, server: S3Server | None = None, seed: int = 0) -> Figures:
    """Start two runs on one output within 50 ms, again and again."""
    rng = random.Random(seed)
    faults, gaps = [], []
    for number in range(times):
        it = scene(folder / f"duel-{number}", shards=1, images=2)
        if server:
            place = place_on(server, it.folder)
            it = it.moved(place, server, endpoint_url=server.endpoint_url)
        gap_s = rng.uniform(0, 0.05)
        with LiveRun(it.spec()) as first:
            time.sleep(gap_s)
            with LiveRun(it.spec()) as second:
                gaps.append(second.started_at - first.started_at)
                first.wait()
                second.wait()
                faults += [*faults_of_duel(first, second), *it.faults()]
    return {"duels": times, "longest_gap_s": round(max(gaps), 3), "faults": faults}


def faults_of_duel(*runs: LiveRun) -> list[str]:
    loser, winner = sorted(runs, key=lambda run: run.process.returncode, reverse=True)
    statuses = (winner.process.returncode, loser.process.returncode)
    place = rf"{re.escape(socket.gethostname())} \(pid {winner.process.pid}, since 20..-"
    holder = rf"is held by run \S+ on {place}"
    has_begun = "starting Ray" in loser.said
    if statuses == (ENDED, HELD) and re.search(holder, loser.said) and not has_begun:
        return []
    return [f"statuses {statuses}; the winner: {winner.said}; the loser: {loser.said}"]


# Nothing to do


def resumes(folder: Path, *, shards: int, repeats: int = 3) -> Figures:
    """Run again what is complete: of one shard, of `shards`, and of ten times the rows in those."""
    one = resumed(folder / "one", shards=1, images=1, repeats=repeats)
    many = resumed(folder / "many", shards=shards, images=1, repeats=repeats)
    tenfold = resumed(folder / "tenfold", shards=shards, images=10, repeats=repeats)
    runs = (one, many, tenfold)
    faults = [f"{run}" for run in runs if run.status or run.opened or run.ray]
    # What reads the source has to be seen at it, or nothing was counted.
    verified = audited(folder / "one", "verify", str(folder / "one" / "out"))
    faults += [] if verified.opened == 1 else [f"verify: {verified}"]
    return {
        "shards": shards,
        "elapsed_s_of_one_shard": round(one.elapsed_s, 2),
        "after_start_s": round(many.elapsed_s - one.elapsed_s, 2),
        "after_start_s_of_ten_times_the_rows": round(tenfold.elapsed_s - one.elapsed_s, 2),
        "shards_opened": sum(run.opened for run in runs),
        "faults": faults,
    }


# The commit, at each of its steps


def steps(folder: Path, *, server: S3Server | None = None) -> Figures:
    """End and overtake runs at every step of the commit; see `commit_steps.py`."""
    figures: Figures = {"faults": []}
    for night, act in itertools.product(NIGHTS, ("kill", "sleep")):
        name = f"{night}-{act}"
        path = server.url(f"steps-{name}") if server else str(folder / name)
        command = [sys.executable, "-m", "tests.commit_steps", path, "--act", act]
        command += ["--night", night, "--log", str(folder / "log")]
        command += ["--endpoint", server.endpoint_url] if server else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            figures["faults"].append(done.stderr[-2000:])
        else:
            figures[name] = json.loads(done.stdout)
    return figures


SCENARIOS: dict[str, Callable[[Path, int], Figures]] = {
    "uninterrupted": lambda folder, seed: uninterrupted(folder, images=350, row_s=0.1),
    "sigkills": lambda folder, seed: sigkills(folder, kills=50, images=350, row_s=0.1, seed=seed),
    "workers": lambda folder, seed: worker_deaths(folder, stages=[*STAGES]),
    "random-workers": lambda folder, seed: worker_kills(
        folder, kills=15, images=350, row_s=0.1, seed=seed
    ),
    "store": lambda folder, seed: with_server(store_failures, folder, rounds=4, seed=seed),
    "store-gone": lambda folder, seed: with_server(
        store_failures, folder, rounds=1, outage=LONG, seed=seed
    ),
    "storms": lambda folder, seed: with_server(
        storms, folder, images=300, storm=Storm(share=0.15, timeout_s=2, silence_s=15, seed=seed)
    ),
    "duels": lambda folder, seed: duels(folder, times=20, seed=seed),
    "duels-s3": lambda folder, seed: with_server(duels, folder, times=20, seed=seed),
    "steps": lambda folder, seed: steps(folder),
    "steps-s3": lambda folder, seed: with_server(steps, folder),
    "resumes": lambda folder, seed: resumes(folder, shards=10_000),
    "nights": lambda folder, seed: nights(folder, nights=10, images=20, row_s=0.03, seed=seed),
    "added-question": lambda folder, seed: added_question(folder, images=100_000),
    "memory": lambda folder, seed: tiny_images(folder, shards=100, images=1000),
    "gigapixels": lambda folder, seed: gigapixels(folder, shards=3),
    "fuzz": lambda folder, seed: fuzzed(seconds=FUZZ_S, seed=seed),
}


def with_server(scenario: Callable[..., Figures], folder: Path, **options: Any) -> Figures:
    with serve() as server:
        return scenario(folder, server=server, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(SCENARIOS)}; all, if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--seconds", type=float, default=FUZZ_S, help="how long to fuzz")
    options = parser.parse_args()
    scenarios = {
        **SCENARIOS,
        "fuzz": lambda folder, seed: fuzzed(seconds=options.seconds, seed=seed),
    }
    faults = 0
    for name in options.scenario or scenarios:
        with tempfile.TemporaryDirectory(prefix="lavaflow-soak-") as folder:
            start = time.monotonic()
            figures = scenarios[name](Path(folder), options.seed)
        figures["took_s"] = round(time.monotonic() - start)
        sys.stdout.write(json.dumps({"scenario": name, "seed": options.seed, **figures}) + "\n")
        sys.stdout.flush()
        faults += len(figures["faults"])
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
