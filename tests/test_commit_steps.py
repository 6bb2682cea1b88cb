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

STEPS = {"first": 80, "changed": 80, "retried": 40, "forked": 80, "forced": 80}
"""At least so many does a run have, before and after each of which it is interrupted; on an object
store half as many."""


def attempts(path: object, log: Path, *options: object) -> int:
    """How many interrupted runs there were, none of which lost, doubled or redid anything."""
    command = [sys.executable, "-m", "tests.commit_steps", str(path), "--log", str(log / "log")]
    command += map(str, options)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["most_rows_again"] <= BATCH
    return found["attempts"]


@pytest.mark.parametrize(
    ("night", "act", "every"),
    [
        ("first", "kill", 7),
        ("first", "sleep", 15),
        ("changed", "kill", 9),
        ("changed", "sleep", 25),
        ("retried", "kill", 9),
        ("retried", "sleep", 18),
        ("forked", "kill", 17),
        ("forced", "kill", 12),
        ("forced", "sleep", 31),
    ],
)
def test_on_a_local_disk(tmp_path: Path, night: str, act: str, every: int) -> None:
    options = ("--night", night, "--act", act, "--every", every)
    assert attempts(tmp_path / "out", tmp_path, *options) > STEPS[night] // every


@pytest.mark.parametrize(
    ("night", "act", "every"),
    [
        ("first", "kill", 23),
        ("first", "sleep", 36),
        ("changed", "kill", 24),
        ("retried", "kill", 12),
    ],
)
def test_on_an_object_store(
    s3_server: S3Server, tmp_path: Path, night: str, act: str, every: int
) -> None:
    url, endpoint = s3_server.url(uuid.uuid4().hex), s3_server.endpoint_url
    options = ("--night", night, "--act", act, "--every", every, "--endpoint", endpoint)
    assert attempts(url, tmp_path, *options) > STEPS[night] // every // 2
