"""What `lavaflow runs` tells of the runs into a table."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.records import RUNNING
from pipeline.commit import write_run_record
from pipeline.storage import Output
from schemas.job import StorageSpec


def counts(ok: int = 0, failed: int = 0, skipped: int = 0) -> dict[str, int]:
    return {"ok": ok, "failed": failed, "skipped": skipped}


def record(name: str, **columns: Any) -> dict[str, Any]:
    told = {"run_id": name, "ended": "complete", "elapsed_s": 61.0, "spec": {"ask": []}}
    return {**told, "new": counts(), "counts": counts(), **columns}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    output = Output(str(tmp_path), StorageSpec())
    for each in (
        record("20260101T-a", ended=RUNNING),
        record("20260102T-b", new=counts(1000, 2), counts=counts(1000, 2)),
        record("20260103T-c", new=counts(1), counts=counts(1001, 1), retried=1),
        record(
            "20260104T-d",
            ended="JobError: the store failed",
            new=counts(4),
            counts=counts(800),
            removed=counts(200, 1),
            taken=counts(3),
        ),
    ):
        write_run_record(output, each["run_id"], each)
    (tmp_path / "runs/0-cut-off.json").write_text('{"run_id": "x", ')
    return tmp_path


def test_runs_are_listed_with_what_each_did(table: Path) -> None:
    done = CliRunner().invoke(main, ["runs", str(table)], catch_exceptions=False)
    assert done.output.splitlines() == [
        "20260101T-a  running, or killed, 1 min 1 s",
        "  table    0 answers: 0 ok, 0 failed, 0 skipped",
        "20260102T-b  complete, 1 min 1 s",
        "  answered 1,002 answers: 1,000 ok, 2 failed, 0 skipped",
        "  table    1,002 answers: 1,000 ok, 2 failed, 0 skipped",
        "20260103T-c  complete, 1 min 1 s",
        "  answered 1 answers: 1 ok, 0 failed, 0 skipped; 1 replaced",
        "  table    1,002 answers: 1,001 ok, 1 failed, 0 skipped",
        "20260104T-d  JobError, 1 min 1 s",
        "  answered 4 answers: 4 ok, 0 failed, 0 skipped; 201 removed; 3 taken over",
        "  table    800 answers: 800 ok, 0 failed, 0 skipped",
    ]


def test_records_are_printed_as_json_without_their_specs(table: Path) -> None:
    done = CliRunner().invoke(main, ["runs", str(table), "--json"], catch_exceptions=False)
    told = json.loads(done.output)
    assert [each["run_id"] for each in told] == sorted(each["run_id"] for each in told)
    assert len(told) == 4
    assert not any("spec" in each for each in told)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["runs", str(tmp_path)])
    assert done.exit_code == 2
    assert f"{tmp_path}: holds no run record (runs/*.json); check the path" in done.output
