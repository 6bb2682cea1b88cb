"""Whole jobs as a person runs them: the installed command, its exit status, what it prints."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.shards import image_bytes, write_shard
from tests.whole_jobs import answers, job_of, lavaflow, scene, write_shapes

pytestmark = pytest.mark.slow


def write_spec(folder: Path, **keys: object) -> Path:
    path = folder / "job.yaml"
    job = job_of(folder / "in", folder / "out", **keys)
    path.write_text(yaml.safe_dump(job.model_dump(mode="json", by_alias=True)))
    return path


def test_three_bad_images_are_three_failed_rows_and_the_rest_is_answered(tmp_path: Path) -> None:
    good = [(f"good-{n}.png", scene(n)[2]) for n in range(3)]
    bad = [
        ("bad-cut.jpg", image_bytes("JPEG", size=(64, 64))[:500]),
        ("bad-text.png", b"this is no picture"),
        ("bad-empty.png", b""),
    ]
    write_shard(tmp_path / "in/0.tar", [good[0], *bad, good[1], good[2]])
    arguments = ["ask", "in", "-q", "what color is the shape?", "-o", "out"]
    first = lavaflow(*arguments, cwd=tmp_path)
    assert first.returncode == 3, first.stderr
    found = {row["sample_id"]: row for row in answers(tmp_path / "out")}
    assert {name: row["error_class"] for name, row in found.items() if row["error_class"]} == {
        "bad-cut": "ImageCorrupt",
        "bad-text": "ImageUnidentified",
        "bad-empty": "ImageEmpty",
    }
    assert all(row["error_message"] for row in found.values() if row["status"] == "failed")
    assert [found[f"good-{n}"]["answer"] for n in range(3)] == [scene(n)[0] for n in range(3)]

    lenient = lavaflow(*arguments, "--set", "max_failed_fraction=0.5", cwd=tmp_path)
    assert lenient.returncode == 0, lenient.stderr
    assert lavaflow("verify", "out", cwd=tmp_path).returncode == 0


def test_folders_of_the_user_called_jobs_and_schemas_are_not_ours(tmp_path: Path) -> None:
    for name in ("jobs", "schemas", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    write_shapes(tmp_path / "in", shards=1, images=2)
    done = lavaflow("ask", "in", "-q", "what shape is present?", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(answers(tmp_path / "out")) == 2


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


def start_and_wait_for_answers(spec: Path, output: Path) -> "subprocess.Popen[str]":
    """A run of the spec that has staged its first answers, and is not over."""
    command = [str(Path(sys.executable).with_name("lavaflow")), "run", str(spec)]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore SIGINT, and their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    staging = output / "staging"
    deadline = time.monotonic() + 120
    while not (staging.is_dir() and any(staging.iterdir())):
        assert time.monotonic() < deadline, "nothing was answered in two minutes"
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    return running


def finish_and_verify(spec: Path, output: Path, *, answers: int) -> None:
    """Run what is left; the table is whole, and not everything was answered again."""
    done = lavaflow("run", str(spec), "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["counts"] == {"ok": answers, "failed": 0, "skipped": 0}
    assert record["new"]["ok"] < answers
    assert lavaflow("verify", str(output)).returncode == 0


@pytest.mark.parametrize(
    ("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, stop: signal.Signals, status: int
) -> None:
    write_shapes(tmp_path / "in", shards=8, images=24)
    spec = write_spec(tmp_path)
    running = start_and_wait_for_answers(spec, tmp_path / "out")
    running.send_signal(stop)
    _, said = running.communicate(timeout=60)
    assert running.returncode == status, said
    if stop != signal.SIGKILL:
        assert "the same command goes on from here" in said
    finish_and_verify(spec, tmp_path / "out", answers=384)
