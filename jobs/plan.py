"""What a run would do: everything that can be checked or counted without the output.

A mistake in the spec, the source or the model's path is found here, while nothing has been loaded,
started or written.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from jobs.prompts import check_prompts
from pipeline.commit import AnswerTable
from pipeline.coverage import Coverage
from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import family_of, open_checkpoint
from pipeline.engine.grammar import check_schema
from pipeline.engine.placement import placed
from pipeline.engine.repair import repairs_of
from pipeline.fingerprint import model_fingerprint, question_fingerprints
from pipeline.footer import Fingerprint
from pipeline.prompt import SEVERAL_IMAGES
from pipeline.read import ShardWork
from pipeline.sources import open_source
from pipeline.sources.base import Shard
from pipeline.versions import Versions
from schemas.ask import AskRow
from schemas.errors import SpecError
from schemas.job import JobSpec
from schemas.tables import RESERVED_COLUMNS


@dataclass(frozen=True)
class Plan:
    """A job whose every part exists; of its output, nothing is known yet.

    `notes`: what the person should know of it before it runs.
    """

    job: JobSpec
    shards: Sequence[Shard]
    keep: Mapping[str, pa.DataType]
    fingerprint: Fingerprint
    notes: Sequence[str] = ()

    def table(self) -> AnswerTable:
        """The job's answers, not opened."""
        return AnswerTable(self.job.output, keep=self.keep, fingerprint=self.fingerprint)

    def work(self, answered: Coverage, versions: Versions) -> list[ShardWork]:
        """The shards that have rows to be answered, with what is answered of each.

        With `source.limit`, complete ones may stand among them (`read.ReadTask`).
        """
        units = self.job.units
        known = [ShardWork(s, versions.done(s, answered, units=units)) for s in self.shards]
        if self.job.source.limit is not None:
            return _first_rows(known, limit=self.job.source.limit, units=units)
        return [item for item in known if not item.done.is_complete(units)]

    @property
    def most_answers(self) -> int | None:
        """So many answers there will be at most; null where nobody can know before it is read."""
        if any(isinstance(ask, AskRow) for ask in self.job.ask):
            return None
        rows = [shard.rows for shard in self.shards]
        total = None if None in rows else sum(filter(None, rows))
        known = [n for n in (total, self.job.source.limit) if n is not None]
        answers = sum(self.job.samples(ask) * self.job.turns(ask) for ask in self.job.ask)
        return min(known) * answers if known else None


def _first_rows(known: Sequence[ShardWork], *, limit: int, units: Sequence[str]) -> list[ShardWork]:
    """The shards that hold the first rows, as far as that is known; none if all are answered."""
    left, is_done = limit, True
    taken: list[ShardWork] = []
    for _, pieces in itertools.groupby(known, key=lambda item: item.shard.uri):
        if not left:
            break
        taken += pieces
        shard, done = taken[-1].shard, taken[-1].done
        total = shard.rows if done.rows_total is None else done.rows_total
        rows = left if total is None else min(left, total)
        is_answered = done.has_first(rows, units)
        is_done = is_done and is_answered
        # Of a shard without an end, all that is known is whether it has enough rows.
        if total is not None or is_answered:
            left -= rows
    return [] if is_done else taken


def plan(job: JobSpec) -> Plan:
    """Check the job against its source and its model. Raises SpecError for what cannot work."""
    if clash := sorted(set(job.source.keep) & RESERVED_COLUMNS):
        raise SpecError(f"source.keep: {clash[0]!r} is a column of the answer table; drop it")
    if job.source.format == "images" and any(isinstance(ask, AskRow) for ask in job.ask):
        raise SpecError(
            "ask: {from: questions}: format `images` has no questions of its own; give {id, "
            "prompt}, or use format `webdataset`"
        )
    source = open_source(job.source)
    shards = source.list()
    job = placed(job)
    check_model(job.model, job.generate)
    for ask in job.ask:
        if ask.json_schema is not None:
            check_schema(ask.json_schema)
    _check_images(job)
    check_prompts(job, shards)
    job = _pinned(job)
    keep = source.keep_types()
    fingerprint = Fingerprint(model_fingerprint(job), question_fingerprints(job))
    return Plan(job, shards, keep=keep, fingerprint=fingerprint, notes=list(_notes(job)))


def _check_images(job: JobSpec) -> None:
    images = job.source.columns.images
    if len(images) > 1 and (why := family_of(open_checkpoint(job.model)).why_one_image):
        raise SpecError(
            f"source.columns.image: {list(images)} puts {len(images)} images in each prompt, and "
            f"{why}; name one"
        )


def _notes(job: JobSpec) -> Iterator[str]:
    checkpoint = open_checkpoint(job.model)
    for repair in repairs_of(checkpoint):
        yield f"model {job.model.path}: {repair}"
    if why := family_of(checkpoint).why_slow:
        yield f"the model takes the slow path, one prompt at a time: {why}"
    count = len(job.source.columns.images)
    if count > 1 and not family_of(checkpoint).squares_several:
        yield f"each prompt has {count} images: {SEVERAL_IMAGES}"


def _pinned(job: JobSpec) -> JobSpec:
    """The job with a hub id at the commit it means now: every actor loads the same weights."""
    commit = open_checkpoint(job.model).commit
    if commit is None:
        return job
    return job.model_copy(update={"model": job.model.model_copy(update={"revision": commit})})
