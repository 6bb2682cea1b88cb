"""Run records, `DST/runs/RUN_ID.json`: finding the spec again, and telling people what happened.

A record is JSON:

    run_id, spec          the spec as a mapping, without defaults
    table                 where the answers are
    counts                {ok, failed, skipped} of the whole table
    new                   {ok, failed, skipped} of this run
    failures              {class: {count, example: {uri, index, message}}} of the whole table
    elapsed_s             of this run

Other keys may stand beside these.
"""

import json
from collections.abc import Mapping
from typing import Any

from jobs.load import absolute, build_spec
from jobs.progress import duration
from schemas.errors import SpecError
from schemas.job import JobSpec

RUNS = "runs"


def recorded_spec(output: str) -> JobSpec:
    """The spec of the newest run into `output`. Raises SpecError where there is none."""
    # Imported here: pyarrow and fsspec, which a summary does not need.
    from pipeline.storage import Output
    from schemas.job import StorageSpec

    folder = Output(absolute(output), StorageSpec())
    names = folder.names(RUNS, suffix=".json")
    if not names:
        raise SpecError(f"{output}: holds no run record ({RUNS}/*.json); name the spec with --spec")
    record = json.loads(folder.read(names[-1]))
    return with_output(build_spec(record["spec"], origin=f"{output}/{names[-1]}"), output)


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
    lines += [
        f"Table: {_tally(counts)}",
        *_failures(record["failures"]),
        f"It is in {record['table']}; open it with one of",
        f'  python -c "import pyarrow.dataset as d; print(d.dataset({record["table"]!r})'
        '.to_table().to_pandas())"',
        f"  duckdb -c \"from '{record['table']}/*.parquet'\"",
    ]
    return "".join(f"{line}\n" for line in lines)


def _tally(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = [f"{counts.get(status, 0):,} {status}" for status in ("ok", "failed", "skipped")]
    return f"{total:,} answers: {', '.join(parts)}"


def _failures(failures: Mapping[str, Any]) -> list[str]:
    if not failures:
        return []
    lines = []
    for name, found in sorted(failures.items(), key=lambda item: -item[1]["count"]):
        example = found["example"]
        lines.append(f"  {found['count']:,} {name}, such as: {example['message']}")
        lines.append(f"    in {example['uri']}, row {example['index']}")
    return lines
