"""Runs that are counted, slowed down, and whose workers die where they are told to.

Every worker of Ray calls `prepare_worker` before anything else, which does what the `Orders` in the
environment say. The log has a line for each shard that is opened, and for each answer that the
engine was handed, gave and that became durable; each is written at once, so that a kill loses none.
"""

import functools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

ORDERS = "LAVAFLOW_TEST_ORDERS"
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""What Ray makes of `runtime_env["worker_process_setup_hook"]`."""
EVENTS = ("opened", "begun", "answered", "durable")
PLACE = ("source_uri", "source_index", "question_id")

Identity = tuple[str, int, str | None]


@dataclass(frozen=True)
class Death:
    """A worker kills itself, once in the life of `folder`, at the nth call of a stage in it.

    Stages `read`, `encode` and `generate` die before the call's work, `write` when its part is
    durable. `generated`: the engine has answered, and some of that is durable by another way.
    """

    stage: str
    call: int
    folder: str

    def is_due(self) -> bool:
        if _calls[self.stage] < self.call:
            return False
        try:
            Path(self.folder, f"died-{self.stage}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


_calls: Counter[str] = Counter()
"""Calls of each stage in this process."""


@dataclass(frozen=True)
class Orders:
    """What the workers of a run do besides their work."""

    log: str
    row_s: float = 0.0
    """Seconds that the engine takes longer for each answer."""
    deaths: tuple[Death, ...] = ()

    def die_if_due(self, stage: str, *, first: Callable[[], None] = lambda: None) -> None:
        _calls[stage] += 1
        if any(death.stage == stage and death.is_due() for death in self.deaths):
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    def to_environment(self) -> dict[str, str]:
        # The workers have no other path when they call the hook.
        here = str(Path(__file__).parents[1])
        hook = {SETUP_HOOK: f"{__name__}.prepare_worker", "PYTHONPATH": here}
        return {**hook, ORDERS: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> "Orders":
        values = json.loads(os.environ[ORDERS])
        deaths = tuple(Death(**death) for death in values.pop("deaths"))
        return cls(**values, deaths=deaths)


@dataclass(frozen=True)
class Line:
    """One line of a log: `event` as in EVENTS, at the system's time `at`."""

    at: float
    event: str
    pid: int
    identity: Identity


def read_log(path: Path) -> list[Line]:
    if not path.exists():
        return []
    # A worker that is killed in the midst of a line leaves a piece of it.
    whole = [text for text in path.read_text().splitlines() if text.endswith("]]")]
    values = [json.loads(text) for text in whole]
    return [Line(at, event, pid, tuple(place)) for at, event, pid, place in values]


# On the workers


def prepare_worker() -> None:
    import pipeline.encode
    import pipeline.generate
    import pipeline.read
    import pipeline.write

    orders = Orders.from_environment()
    read, encode = pipeline.read.read_shards, pipeline.encode.Encode.__call__
    generate, write = pipeline.generate.Generate.__call__, pipeline.write.write_part

    # What is pickled by its name has to keep it.
    @functools.wraps(read)
    def mortal_read(job: Any, task: Any, **kwargs: Any) -> Any:
        orders.die_if_due("read")
        left = [item.shard for item in task.work if not item.done.is_complete(job.units)]
        _log(orders, "opened", [(shard.uri, 0, None) for shard in left])
        return read(job, task, **kwargs)

    def mortal_encode(stage: Any, batch: pa.Table) -> pa.Table:
        orders.die_if_due("encode")
        return encode(stage, batch)

    def counted_generate(stage: Any, batch: pa.Table) -> pa.Table:
        orders.die_if_due("generate")
        places = _places_of_prompts(batch)
        _log(orders, "begun", places)
        time.sleep(orders.row_s * len(places))
        result = generate(stage, batch)
        _log(orders, "answered", _places_of_rows(result))
        if places:
            orders.die_if_due("generated", first=lambda: _write_first_row(write, stage, result))
        return result

    @functools.wraps(write)
    def counted_write(answered: pa.Table, **kwargs: Any) -> pa.Table:
        result = write(answered, **kwargs)
        _log(orders, "durable", _places_of_rows(answered))
        orders.die_if_due("write")
        return result

    pipeline.read.read_shards = mortal_read
    pipeline.encode.Encode.__call__ = mortal_encode
    pipeline.generate.Generate.__call__ = counted_generate
    pipeline.write.write_part = counted_write


def _write_first_row(write: Callable[..., pa.Table], stage: Any, answered: pa.Table) -> None:
    """As if another try of this call had been written, with other borders."""
    from pipeline.fingerprint import model_fingerprint, question_fingerprints
    from pipeline.footer import Fingerprint

    job, keep = stage._job, stage._keep
    # An end mark has no index.
    first = pc.equal(answered["source_index"], answered["source_index"].drop_null()[0])
    fingerprint = Fingerprint(model_fingerprint(job), question_fingerprints(job))
    write(answered.filter(first), output=job.output, keep=keep, fingerprint=fingerprint)


def _places_of_prompts(batch: pa.Table) -> list[Identity]:
    rows = batch.select(["source_uri", "lines"]).to_pylist()
    return [
        (row["source_uri"], line["source_index"], prompt["question_id"])
        for row in rows
        for line in row["lines"] or ()
        for prompt in line["prompts"]
    ]


def _places_of_rows(batch: pa.Table) -> list[Identity]:
    rows = batch.select(list(PLACE)).to_pylist()
    return [tuple(row.values()) for row in rows if row["source_index"] is not None]


def _log(orders: Orders, event: str, places: Sequence[Identity]) -> None:
    if not places:
        return
    lines = ["\n" + json.dumps([time.time(), event, os.getpid(), place]) for place in places]
    log = os.open(orders.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(log, "".join(lines).encode())
    finally:
        os.close(log)
