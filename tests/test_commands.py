"""Whole jobs as a person runs them: the installed command, its exit status, what it prints."""

import json
import os
import socket
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.quick import question_asks
from pipeline.lease import hold
from pipeline.storage import Output
from schemas.job import StorageSpec
from tests.shards import image_bytes
from tests.whole_jobs import answers, job_of, lavaflow, scene, write_shapes

pytestmark = pytest.mark.slow

QUESTION = "what color is the shape?"
GOOD = ("good-0.png", "deep/er/good-1.png", "good-2.jpg")


def write_spec(folder: Path, **keys: object) -> Path:
    path = folder / "job.yaml"
    job = job_of(folder / "in", folder / "out", **keys)
    path.write_text(yaml.safe_dump(job.model_dump(mode="json", by_alias=True)))
    return path


@dataclass(frozen=True)
class Asked:
    """`lavaflow ask photos -o out --json` in `folder`, beside folders of the user's own."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def arguments(self) -> list[str]:
        return ["ask", "photos", "-q", QUESTION, "-o", "out"]

    @property
    def found(self) -> dict[str, dict[str, Any]]:
        return {row["sample_id"]: row for row in answers(self.folder / "out")}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("asked")
    for name in ("jobs", "schemas", "pipeline"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    bad = {
        "bad-cut.jpg": image_bytes("JPEG", size=(64, 64))[:500],
        "bad-text.png": b"this is no picture",
        "bad-empty.png": b"",
    }
    for name, image in {**bad, **{name: scene(n)[2] for n, name in enumerate(GOOD)}}.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(image)
    whole = Asked(folder, subprocess.CompletedProcess([], 0))
    return replace(whole, done=lavaflow(*whole.arguments, "--json", cwd=folder))


def test_three_bad_images_are_three_failed_rows_and_all_others_are_answered(asked: Asked) -> None:
    found = asked.found
    assert {name: row["error_class"] for name, row in found.items() if row["error_class"]} == {
        "bad-cut.jpg": "ImageCorrupt",
        "bad-text.png": "ImageUnidentified",
        "bad-empty.png": "ImageEmpty",
    }
    assert all(row["error_message"] for row in found.values() if row["status"] == "failed")
    assert [found[name]["answer"] for name in GOOD] == [scene(n)[0] for n in range(len(GOOD))]


def test_too_many_failures_end_with_status_3_and_are_told(asked: Asked) -> None:
    assert asked.done.returncode == 3, asked.done.stderr
    record = json.loads(asked.done.stdout)
    assert record["counts"] == {"ok": 3, "failed": 3, "skipped": 0}
    assert record["failures"]["ImageUnidentified"]["count"] == 1
    lenient = lavaflow(*asked.arguments, "--set", "max_failed_fraction=0.5", cwd=asked.folder)
    assert lenient.returncode == 0, lenient.stderr
    assert lavaflow("verify", "out", cwd=asked.folder).returncode == 0

    none = lavaflow("retry", "out", "--class", "ImageMissing", "--json", cwd=asked.folder)
    assert none.returncode == 0, none.stderr
    assert sum(json.loads(none.stdout)["new"].values()) == 0
    listed = lavaflow("runs", "out", "--json", cwd=asked.folder)
    assert [run["new"]["failed"] for run in json.loads(listed.stdout)] == [3, 0, 0]


def test_an_image_that_came_later_is_missing_to_verify(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "later.jpg").write_bytes(b"no image either")
    source = {"format": "images", "path": [str(asked.folder / "photos"), str(tmp_path)]}
    spec = write_spec(tmp_path, source=source, ask=question_asks([QUESTION]))
    verified = lavaflow("verify", "out", "--spec", str(spec), cwd=asked.folder)
    assert verified.returncode == 1, verified.stderr
    assert json.loads(verified.stdout)["missing"]["count"] == 1


def test_folders_of_the_user_called_jobs_and_schemas_are_not_ours(asked: Asked) -> None:
    assert "ImportError" not in asked.done.stderr
    assert asked.found["good-0.png"]["status"] == "ok"


def test_an_unwritable_output_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=1, images=1)
    (tmp_path / "file").write_text("in the way")
    done = lavaflow("caption", "in", "-o", "file/out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: output.path '{tmp_path}/file/out' cannot be written (")
    assert "starting Ray" not in done.stderr


def test_a_bad_model_path_is_found_before_anything_starts(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=1, images=1)
    done = lavaflow("caption", "in", "-o", "out", "--model", "./none", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: model.path '")
    assert done.stderr.count("\n") == 1


def test_an_output_that_another_run_holds_is_status_75(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=1, images=1)
    output = Output(str(tmp_path / "out"), StorageSpec())
    with hold(output, run_id="first", timeout_s=60, say=print):
        held = lavaflow("caption", "in", "-o", "out", cwd=tmp_path)
    assert held.returncode == 75
    assert f"is held by run first on {socket.gethostname()} (pid {os.getpid()}, " in held.stderr
    assert held.stderr.count("\n") == 1
    assert not (tmp_path / "out/runs").exists()
