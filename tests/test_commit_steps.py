"""Killed, or put to sleep and overtaken, at steps of the commit; `make soak` takes every step."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.commit_steps import BATCH
from tests.s3 import S3Server
from tests.whole_jobs import REPOSITORY

pytestmark = pytest.mark.slow


def attempts(path: object, tmp_path: Path, *, act: str, every: int, endpoint: str = "") -> int:
    """How many interrupted runs there were, none of which lost, doubled or redid anything."""
    command = [sys.executable, "-m", "tests.commit_steps", str(path)]
    command += ["--act", act, "--every", str(every), "--log", str(tmp_path / "log")]
    command += ["--endpoint", endpoint] if endpoint else []
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["most_rows_again"] <= BATCH
    return found["attempts"]


@pytest.mark.parametrize(("act", "every"), [("kill", 4), ("sleep", 9)])
def test_on_a_local_disk(tmp_path: Path, act: str, every: int) -> None:
    assert attempts(tmp_path / "out", tmp_path, act=act, every=every) > 80 // every


@pytest.mark.parametrize(("act", "every"), [("kill", 18), ("sleep", 36)])
def test_on_an_object_store(s3_server: S3Server, tmp_path: Path, act: str, every: int) -> None:
    url, endpoint = s3_server.url(uuid.uuid4().hex), s3_server.endpoint_url
    assert attempts(url, tmp_path, act=act, every=every, endpoint=endpoint) > 50 // every
