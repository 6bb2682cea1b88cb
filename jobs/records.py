"""Run records, `DST/runs/RUN_ID.json`: finding the spec again, and telling people what happened.

A record is JSON:

    run_id, spec          the spec as a mapping, without defaults
    table                 where the answers are
    counts                {ok, failed, skipped} of the whole table
    new                   {ok, failed, skipped} of this run
    failures              {class: {count, example: {uri, index, message}}} of the whole table
    elapsed_s             of this run
    removed               {ok, failed, skipped} that left since their shards changed or are gone
    retried               failed rows that gave way to other answers
    taken                 {ok, failed, skipped} that were taken over from another table
    withheld              keys of the spec whose URLs were secret in part: without that
    seconds               {stage: seconds}: plan, open and fold in the driver; read, prepare,
                          generate and write summed over their workers

Other keys may stand beside these.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.load import absolute, build_spec, load_spec
from jobs.progress import duration
from schemas.ask import Ask
from schemas.errors import SpecError
from schemas.job import JobSpec, StorageSpec

RUNS = "runs"
RUNNING = "running"
"""How the record of a run ends that has not ended; or that was killed."""


def job_of_output(output: str, *, spec: str | None, overrides: Sequence[str] = ()) -> JobSpec:
    """The job whose answers are in `output`: of a spec file, else as the run records tell it.

    `overrides`: as in `load.build_spec`.
    """
    if spec:
        return with_output(load_spec(spec, overrides), output)
    job = recorded_spec(output)
    if not overrides:
        return job
    data = job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return with_output(build_spec(data, overrides, origin=f"{output}, --set"), output)


def recorded_spec(output: str) -> JobSpec:
    """The spec of the newest run into `output`, with what only earlier runs have asked.

    Raises SpecError where no record tells it.
    """
    records = _read_records(output)
    jobs: list[JobSpec] = []
    for name, data in reversed(records.items()):
        if (spec := _spec_in(data)) is None:
            continue
        if not jobs and (withheld := _json_in(data).get("withheld")):
            raise SpecError(
                f"{output}/{name}: what is secret in {', '.join(withheld)} is not written down; "
                f"{_remedy(output)}"
            )
        jobs.append(build_spec(spec, origin=f"{output}/{name}"))
    if not jobs:
        found = f"none of {', '.join(records)} holds a spec" if records else "holds no run record"
        raise SpecError(f"{output}: {found} ({RUNS}/*.json); {_remedy(output)}")
    return with_output(jobs[0].model_copy(update={"ask": _asked(*jobs)}), output)


def history(output: str) -> list[dict[str, Any]]:
    """The records of all runs into `output`, oldest first, without their specs.

    Raises SpecError where there is none.
    """
    found = [_json_in(data) for data in _read_records(output).values()]
    whole = [r for r in found if r.keys() >= {"run_id", "ended", "elapsed_s", "new", "counts"}]
    records = [{key: value for key, value in r.items() if key != "spec"} for r in whole]
    if not records:
        raise SpecError(f"{output}: holds no run record ({RUNS}/*.json); check the path")
    return records


def history_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run did, for a person."""
    lines = []
    for record in records:
        ended = record["ended"]
        told = "running, or killed" if ended == RUNNING else ended.partition(":")[0]
        lines.append(f"{record['run_id']}  {told}, {duration(record['elapsed_s'])}")
        if ended != RUNNING:
            lines.append(f"  answered {_tally(record['new'])}{_moved(record)}")
        lines.append(f"  table    {_tally(record['counts'])}")
    return lines


def _moved(record: Mapping[str, Any]) -> str:
    moved = {
        "removed": sum(record.get("removed", {}).values()),
        "replaced": record.get("retried", 0),
        "taken over": sum(record.get("taken", {}).values()),
    }
    return "".join(f"; {number:,} {what}" for what, number in moved.items() if number)


def _read_records(output: str) -> dict[str, bytes]:
    """The files of run records by name, oldest first."""
    # Imported here: pyarrow and fsspec, which a summary does not need.
    from pipeline.storage import Output, store_errors

    folder = Output(absolute(output), StorageSpec())
    unreadable: tuple[type[Exception], ...] = (*store_errors(), ValueError)
    try:
        return {name: folder.read(name) for name in folder.names(RUNS, suffix=".json")}
    except unreadable as error:
        raise SpecError(
            f"{output}: cannot be read ({error}); check the path and the credentials, or "
            f"{_remedy(output)}"
        ) from error


def _remedy(output: str) -> str:
    is_s3 = output.startswith(("s3://", "s3a://"))
    endpoint = ", or the server in AWS_ENDPOINT_URL where it is not Amazon's" if is_s3 else ""
    return f"name the spec with --spec{endpoint}"


def _spec_in(data: bytes) -> dict[str, Any] | None:
    """The spec of a record; null for a file that is none, or was cut off."""
    spec = _json_in(data).get("spec")
    return spec if isinstance(spec, dict) else None


def _json_in(data: bytes) -> dict[str, Any]:
    """A record; empty for a file that is none, or was cut off."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _asked(newest: JobSpec, *earlier: JobSpec) -> tuple[Ask, ...]:
    """The questions of all jobs. One output has one question to an id: fingerprints see to it."""
    asks: dict[str, Ask] = dict(zip(newest.units, newest.ask, strict=True))
    for job in earlier:
        for unit, ask in zip(job.units, job.ask, strict=True):
            # The newest job's defaults are not those of the job that asked.
            pinned = {} if ask.choices else job.decoding(ask).model_dump(exclude={"seed"})
            asks.setdefault(unit, ask.model_copy(update=pinned))
    return tuple(asks.values())


def with_output(job: JobSpec, output: str) -> JobSpec:
    """The job with its answers in `output`: a table can be moved after it was made."""
    return job.model_copy(
        update={"output": job.output.model_copy(update={"path": absolute(output)})}
    )


def summary(record: Mapping[str, Any]) -> str:
    """What came of a run, for a person."""
    new, counts = record["new"], record["counts"]
    answered = sum(new.values())
    if answered:
        elapsed = record["elapsed_s"]
        rate = answered / elapsed if elapsed else 0.0
        lines = [f"This run: {_tally(new)}, in {duration(elapsed)} ({rate:.1f} a second)"]
    else:
        lines = ["This run: nothing left to do"]
    if moved := _moved(record):
        lines.append(f"Beside that: {moved.removeprefix('; ')}")
    lines += [
        f"Table: {_tally(counts)}",
        *failure_lines(record["failures"]),
        f"It is in {record['table']}; open it with one of",
        # This Python has pyarrow; another may not.
        f'  {sys.executable} -c "import pyarrow.dataset as d; print(d.dataset({record["table"]!r})'
        '.to_table().to_pandas())"',
        f"  duckdb -c \"from '{record['table']}/*.parquet'\"",
    ]
    return "".join(f"{line}\n" for line in lines)


def _tally(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = [f"{counts.get(status, 0):,} {status}" for status in ("ok", "failed", "skipped")]
    return f"{total:,} answers: {', '.join(parts)}"


def failure_lines(failures: Mapping[str, Any]) -> list[str]:
    """The failures of a record, the most frequent class first, with an example of each."""
    if not failures:
        return []
    lines = []
    for name, found in sorted(failures.items(), key=lambda item: -item[1]["count"]):
        example = found["example"]
        lines.append(f"  {found['count']:,} {name}, such as: {example['message']}")
        lines.append(f"    in {example['uri']}, row {example['index']}")
    return lines
