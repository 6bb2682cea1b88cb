"""How much memory jobs take, by the kind of their processes, while they run; Linux only."""

import functools
import re
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.processes import LiveRun, processes_of_session, title_of

KINDS = ("driver", "tasks", "encode", "decoder", "generate")
"""Those that run code of ours. `tasks`: read and write, whichever a worker of Ray's is doing."""
RAYS_OWN = ("Agent", "Actor", "_Keeper")
TENTHS = 10
MOST_GROWTH = 1.10


class Sizes(NamedTuple):
    """What a process takes, in MB.

    `rss` is what `top` shows: with files, and with the pages of Ray's object store that it has
    touched. `anon` is what it has allocated itself. `pss` can be added up.
    """

    rss: float
    anon: float
    pss: float


@dataclass(frozen=True)
class Process:
    kind: str
    sizes: Sizes


@dataclass(frozen=True)
class Moment:
    """What a run takes at a moment, when so many answers were given."""

    answers: int
    processes: Sequence[Process]

    def most(self, kind: str, size: str) -> float | None:
        """Of the largest process of a kind."""
        found = (getattr(p.sizes, size) for p in self.processes if p.kind == kind)
        return max(found, default=None)

    @property
    def kinds(self) -> Sequence[str]:
        return sorted({process.kind for process in self.processes})

    def pss_of(self, kind: str) -> float:
        return sum(p.sizes.pss for p in self.processes if p.kind == kind)

    @property
    def pss(self) -> float:
        return sum(process.sizes.pss for process in self.processes)


@dataclass
class Record:
    """All moments of a run."""

    moments: list[Moment] = field(default_factory=list)

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.pss)

    def by_tenths(self, measure: Callable[[Moment], float | None], answers: int) -> list[float]:
        """The median of what is measured in each tenth of the answers, in MB."""
        found: defaultdict[int, list[float]] = defaultdict(list)
        for moment in self.moments:
            if 0 < moment.answers < answers and (value := measure(moment)) is not None:
                found[moment.answers * TENTHS // answers].append(value)
        return [round(statistics.median(found[n]), 1) if found[n] else 0.0 for n in range(TENTHS)]


@contextmanager
def recorded(run: LiveRun, *, every_s: float) -> Iterator[Record]:
    """Look at the processes of a run, in a thread, until the block ends."""
    record, over = Record(), threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            record.moments.append(Moment(answers_of(run), processes_of(run)))

    thread = threading.Thread(target=look, name="memory")
    thread.start()
    try:
        yield record
    finally:
        over.set()
        thread.join()


def answers_of(run: LiveRun) -> int:
    """As the run has last said."""
    found = re.findall(r"^([\d,]+) answers, ", run.said, re.MULTILINE)
    return int(found[-1].replace(",", "")) if found else 0


def processes_of(run: LiveRun) -> list[Process]:
    pids = processes_of_session(run.process.pid)
    titles = {pid: title_of(pid) for pid in pids}
    decoders = {pid for pid, title in titles.items() if "pipeline.decode_process" in title}
    encoders = {parent_of(pid) for pid in decoders}
    processes = []
    for pid, title in titles.items():
        kind = kind_of(title)
        if pid == run.process.pid:
            kind = "driver"
        elif pid in decoders:
            kind = "decoder"
        elif kind == "actor":
            kind = "encode" if pid in encoders else "generate"
        if sizes := sizes_of(pid):
            processes.append(Process(kind, sizes))
    return processes


def kind_of(title: str) -> str:
    if "ray::MapWorker" in title:
        return "actor"
    is_worker = title.startswith("ray::") and not any(name in title for name in RAYS_OWN)
    return "tasks" if is_worker else "Ray's own"


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def sizes_of(pid: int) -> Sizes | None:
    """None of a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        shares = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kb = {line.partition(":")[0]: line.split()[1] for line in [*status, *shares] if " kB" in line}
    if "RssAnon" not in kb or "Pss" not in kb:
        return None
    rss, anon, pss = (int(kb[name]) / 1024 for name in ("VmRSS", "RssAnon", "Pss"))
    return Sizes(rss, anon, pss)


def growth_of(tenths: Sequence[float]) -> float:
    """The last tenth by the second."""
    return round(tenths[-1] / tenths[1], 3) if tenths[1] else 0.0


def figures_by_kind(record: Record, answers: int) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        figures[kind] = {}
        for size in ("rss", "anon"):
            measure = functools.partial(Moment.most, kind=kind, size=size)
            tenths = record.by_tenths(measure, answers)
            figures[kind] |= {f"{size}_mb": tenths, f"{size}_growth": growth_of(tenths)}
    total = record.by_tenths(lambda moment: moment.pss, answers)
    figures["all"] = {"pss_mb": total, "pss_growth": growth_of(total)}
    return figures
