"""A reader that looks at a table all along, while runs write it and are killed."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs.tablefiles import IDENTITY
from pipeline.storage import store_errors

EVERY_S = 0.2


@dataclass
class Watch:
    """What a reader has seen: `polls` of a table that was there, and what was wrong in them.

    A poll opens `answers/` with pyarrow.dataset. No answer may be there twice or have gone since
    the poll before, no file may have other columns than the first, and none, in `staging/` neither,
    may be less than a whole Parquet file. `can_fail`: a store that does not answer is no fault.
    `may_change`: files of the table are written again; then answers may go, and who has seen the
    end of a file and not its rows opens it again.
    """

    fs: fsspec.AbstractFileSystem
    root: str
    can_fail: bool = False
    may_change: bool = False
    polls: int = 0
    files: int = 0
    failed_polls: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._schema: pa.Schema | None = None
        self._rows: set[tuple[Any, ...]] = set()
        self._whole: set[tuple[str, Any]] = set()

    def poll(self) -> None:
        for is_last in (False, True) if self.may_change else (True,):
            try:
                self._look_at_files()
                self._look_at_table()
                return
            except store_errors() as error:
                self.failed_polls += 1
                if is_last and not self.can_fail:
                    self._note(f"a poll failed: {error!r}")

    def _note(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)

    def _look_at_files(self) -> None:
        for folder in ("answers", "staging"):
            try:
                infos = self.fs.ls(f"{self.root}/{folder}", detail=True)
            except FileNotFoundError:
                continue
            # Object stores may list the folder itself, as a file whose name ends in a slash.
            for info in (i for i in infos if i["type"] == "file" and not i["name"].endswith("/")):
                seen = (info["name"], info.get("ETag") or info.get("ino"))
                if seen not in self._whole:
                    self._look_at_file(info["name"], may_vanish=folder == "staging")
                    self._whole.add(seen)

    def _look_at_file(self, name: str, *, may_vanish: bool) -> None:
        try:
            data = self.fs.cat_file(name)
        except FileNotFoundError:
            if not may_vanish:
                self._note(f"{name} has gone")
            return
        self.files += 1
        try:
            pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            self._note(f"{name} of {len(data)} bytes is not whole: {error}")

    def _look_at_table(self) -> None:
        try:
            dataset = ds.dataset(f"{self.root}/answers", format="parquet", filesystem=self.fs)
        except FileNotFoundError:
            return
        for fragment in dataset.get_fragments():
            schema = fragment.physical_schema.remove_metadata()
            self._schema = self._schema or schema
            if not schema.equals(self._schema):
                self._note(f"{fragment.path} has other columns: {schema}")
        if self._schema is None:
            return
        self.polls += 1
        columns = dataset.to_table(columns=list(IDENTITY)).to_pydict().values()
        rows = list(zip(*columns, strict=True))
        if len(rows) != len(set(rows)):
            self._note(f"{len(rows) - len(set(rows))} answers are there twice")
        if (gone := self._rows - set(rows)) and not self.may_change:
            self._note(f"{len(gone)} answers have gone, one is {min(gone, key=str)}")
        self._rows = set(rows)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Poll in a thread of its own, and once more in the end."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            watch.poll()

    with ThreadPoolExecutor(1) as pool:
        looking: Future[None] = pool.submit(look)
        try:
            yield watch
        finally:
            over.set()
            looking.result()
    watch.poll()


def wait_until(is_so: Callable[[], bool], *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain")
        time.sleep(0.02)
