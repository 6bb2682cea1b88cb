"""`jobs/submit.py`: the same job through Ray's Jobs API, on a real Ray head."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.models import noise_image, tiny_model, write_checkpoint
from tests.watch import wait_until

REPOSITORY = Path(__file__).parents[1]
START_TIMEOUT_S = 90.0
SLOW_IMAGES = 12
IS_STOPPING = "Terminated: finishing what is in flight, for 46 s at most"
TOKEN = "lavaflow-test-token-0123456789abcdef"


def environment() -> dict[str, str]:
    """Ours without another cluster's address; the head's jobs find Lavaflow and this Python."""
    env = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    paths = [str(Path(sys.executable).parent), env.get("PATH", "")]
    return {
        **env,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }


def lavaflow(*args: str, address: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**environment(), "RAY_ADDRESS": address, **env},
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of the dashboard of a Ray head of two CPUs on this machine."""
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    # Ray's sockets lie below this folder, and the path of a socket has to be short.
    folder = tempfile.mkdtemp(prefix="lf-ray-", dir="/tmp")
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={dashboard}", "--disable-usage-stats", f"--temp-dir={folder}"),
            # These have fixed defaults, which another Ray on this machine may hold.
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--ray-client-server-port={client}",
        ],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, head)
        yield address
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(address: str, head: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    jobs = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(jobs, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no Ray head at {address}; it ended with {head.poll()}")


def end(head: "subprocess.Popen[bytes]") -> None:
    """It and all of its session; ended in order, it takes 20 s and leaves some behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def spec_file(
    folder: Path, *, source: Path, name: str = "trial", more: str = "", interval_s: float = 60
) -> Path:
    file = folder / "job.yaml"
    file.write_text(
        f"name: {name}\n"
        f"source: {{format: images, path: {source}}}\n"
        "ask: [{id: caption, prompt: Describe the image.}]\n"
        f"output: {{path: {folder}/out, commit_interval_s: {interval_s}}}\n{more}"
    )
    return file


def test_a_cluster_that_does_not_answer_is_named_with_the_remedy(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    spec = spec_file(tmp_path, source=tmp_path)
    address = f"http://127.0.0.1:{port}"
    for args in (["submit", str(spec)], ["status", "x"], ["logs", "x"], ["stop", "x"]):
        done = lavaflow(*args, address=address)
        assert done.returncode == 1
        assert done.stderr == (
            f"Error: no Ray cluster answers at {address}; start one with `ray start --head`, or "
            "name its dashboard with --address http://HOST:8265\n"
        )


def test_a_bad_spec_is_found_before_a_cluster_is_asked(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("ask: []\n")
    done = lavaflow("submit", str(tmp_path / "job.yaml"), address="http://127.0.0.1:1")
    assert done.returncode == 2


@pytest.mark.slow
def test_a_job_answers_on_the_cluster(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "photos" / name)
    spec = spec_file(tmp_path, source=tmp_path / "photos")

    done = lavaflow("submit", str(spec), "--wait", "--json", address=cluster)
    job_id = json.loads(done.stdout)["id"]
    logs = lavaflow("logs", job_id, address=cluster).stdout
    assert done.returncode == 0, done.stderr + logs
    assert done.stderr == f"{job_id} SUCCEEDED\n"

    status = json.loads(lavaflow("status", job_id, "--json", address=cluster).stdout)
    assert (status["status"], status["name"], status["exit_status"]) == ("SUCCEEDED", "trial", 0)
    assert status["started_at"] <= status["ended_at"]
    assert "Table: 2 answers: 2 ok" in logs
    answers = pq.read_table(tmp_path / "out" / "answers")
    assert answers["status"].to_pylist() == ["ok", "ok"]


def asked(address: str, path: str) -> dict[str, Any]:
    """What the Jobs API says; faster than the command, which has to load Ray."""
    request = urllib.request.Request(
        f"{address}/api/jobs/{path}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.slow
def test_a_stopped_job_finishes_what_is_in_flight_and_can_be_submitted_again(
    cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(SLOW_IMAGES):
        noise_image(number).save(tmp_path / f"photos/{number}.png")
    # A model that never ends an answer: each takes a second or two.
    model = write_checkpoint(tmp_path / "model", model=tiny_model(context=2048))
    more = (
        f"model: {{path: {model}}}\ngenerate: {{max_new_tokens: 1000}}\n"
        "resources: {generate: {batch_size: 1}}\ngrace_period_s: 45.5\n"
    )
    spec = spec_file(tmp_path, source=tmp_path / "photos", more=more, interval_s=0)
    job_id = lavaflow("submit", str(spec), address=cluster).stdout.strip()
    staging = tmp_path / "out" / "staging"
    wait_until(lambda: staging.is_dir() and any(staging.iterdir()), timeout_s=120)
    supervisors = processes_of_the_cluster("ray::JobSupervisor")
    assert any("RAY_JOB_STOP_WAIT_TIME_S=76" in environment for environment in supervisors.values())

    # However long the command takes, the job is not done before it.
    with suspended(processes_of_the_cluster("ray::MapWorker")):
        stopped = lavaflow("stop", job_id, address=cluster)
        assert stopped.stdout == f"{job_id} is stopping\n"
        wait_until(lambda: IS_STOPPING in asked(cluster, f"{job_id}/logs")["logs"], timeout_s=60)
    wait_until(lambda: asked(cluster, job_id)["status"] != "RUNNING", timeout_s=60)
    assert asked(cluster, job_id)["status"] == "STOPPED"
    log = lavaflow("logs", job_id, address=cluster).stdout
    assert "Terminated; the same command goes on from here." in log
    told = re.search(r"^(\d+) answers are durable$", log, re.MULTILINE)
    assert told, log
    staged = pq.read_table(staging).num_rows
    assert 0 < staged == int(told[1]) < SLOW_IMAGES

    again = lavaflow("submit", str(spec), "--wait", address=cluster)
    log = lavaflow("logs", again.stdout.strip(), address=cluster).stdout
    assert again.returncode == 0, again.stderr + log
    assert f"This run: {SLOW_IMAGES - staged} answers" in log
    assert pq.read_table(tmp_path / "out/answers").num_rows == SLOW_IMAGES


def processes_of_the_cluster(title: str) -> dict[int, list[str]]:
    """The environments of its processes with this title; other tests have Rays, too."""
    found: dict[int, list[str]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            if (process / "cmdline").read_text().startswith(title):
                environment = (process / "environ").read_text().split("\0")
                if f"RAY_AUTH_TOKEN={TOKEN}" in environment:
                    found[int(process.name)] = environment
    return found


@contextlib.contextmanager
def suspended(processes: Collection[int]) -> Iterator[None]:
    assert processes
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@pytest.mark.slow
def test_a_job_that_cannot_start_fails_and_its_log_says_why(cluster: str, tmp_path: Path) -> None:
    spec = spec_file(tmp_path, source=tmp_path / "none")
    done = lavaflow("submit", str(spec), "--wait", address=cluster)
    job_id = done.stdout.strip()
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"{job_id} FAILED\n"

    status = lavaflow("status", job_id, address=cluster)
    assert status.stdout.startswith(f"{job_id} FAILED (trial)\n")
    for args in (["logs", job_id], ["logs", job_id, "--follow"]):
        logs = lavaflow(*args, address=cluster)
        assert logs.returncode == 0, logs.stderr
        assert f"Error: source.path '{tmp_path}/none' does not exist" in logs.stdout

    stopped = lavaflow("stop", job_id, address=cluster)
    assert stopped.stdout == f"{job_id} was not running\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", [["status"], ["logs"], ["logs", "--follow"], ["stop"]])
def test_an_unknown_job_is_told_so(cluster: str, command: list[str]) -> None:
    done = lavaflow(command[0], "nobody", *command[1:], address=cluster)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: the cluster at {cluster} knows no job 'nobody'; "
        "`ray job list` shows those it knows\n"
    )


@pytest.mark.slow
def test_a_cluster_that_wants_another_token_is_told_so(cluster: str) -> None:
    done = lavaflow("status", "nobody", address=cluster, RAY_AUTH_TOKEN="0" * 32)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: the cluster at {cluster} wants its token (Forbidden: Invalid authentication "
        "token); set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it\n"
    )
