"""The same job on a Ray cluster, through Ray's Jobs API: submit, status, logs, stop.

The spec travels alone: Lavaflow must be installed on the cluster, and the paths of the spec must
mean the same there. Knows nothing of what a job does.
"""

import asyncio
import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.load import dump_spec
from schemas.errors import JobError, SpecError
from schemas.job import JobSpec

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENTRYPOINT = "python -m jobs.cli run spec.yaml"
POLL_INTERVAL_S = 1.0
START_TIMEOUT_S = 30.0
STOP_MARGIN_S = 30.0
"""How much longer than its grace period a stopped job may take: Ray has to be left as well."""


@dataclass(frozen=True)
class JobStatus:
    """What a cluster says of a job. Times are seconds since 1970; null until it happened."""

    id: str
    name: str
    status: str
    message: str
    started_at: float | None
    ended_at: float | None
    exit_status: int | None

    @property
    def is_over(self) -> bool:
        return self.status in {"SUCCEEDED", "FAILED", "STOPPED"}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Cluster:
    """The Jobs API of one cluster: `http://HOST:8265`, or an address that Ray itself knows.

    Every method raises JobError where the cluster cannot be reached or does not know the job.
    """

    def __init__(self, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Imported here: Ray takes seconds, and only these commands talk to a cluster.
        from ray.job_submission import JobSubmissionClient

        # Ray tells of every upload on stderr.
        for logger in ("ray", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        self.address = address or DEFAULT_ADDRESS
        # Ray lets RAY_ADDRESS overrule the argument, and this variable overrule both.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._errors():
            self._client = JobSubmissionClient(self.address)

    def submit(self, job: JobSpec) -> str:
        """Start the job; returns its id."""
        with tempfile.TemporaryDirectory(prefix="lavaflow-") as folder, self._errors():
            Path(folder, "spec.yaml").write_text(dump_spec(job), encoding="utf-8")
            # Ray's supervisor of the job reads it, and has the job's environment; else it kills a
            # stopped job after 3 s.
            wait_s = math.ceil(job.grace_period_s + STOP_MARGIN_S)
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}
            runtime_env = {"working_dir": folder, "env_vars": environment}
            return self._submit(runtime_env, name=job.name)

    def _submit(self, runtime_env: Mapping[str, Any], *, name: str) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                job_id = self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    runtime_env=dict(runtime_env),
                    metadata={"name": name},
                )
            except RuntimeError as error:
                # A cluster that has just started answers before it can run jobs.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL_S)
            else:
                return str(job_id)

    def status(self, job_id: str) -> JobStatus:
        with self._errors(job_id):
            info = self._client.get_job_info(job_id)
        return JobStatus(
            id=job_id,
            name=(info.metadata or {}).get("name", ""),
            status=str(getattr(info.status, "value", info.status)),
            message=info.message or "",
            started_at=_seconds(info.start_time),
            ended_at=_seconds(info.end_time),
            exit_status=info.driver_exit_code,
        )

    def wait(self, job_id: str) -> JobStatus:
        """The status once the job is over."""
        while not (status := self.status(job_id)).is_over:
            time.sleep(POLL_INTERVAL_S)
        return status

    def logs(self, job_id: str) -> str:
        """All that the job has written so far."""
        with self._errors(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job writes, as it does, until it is over."""
        self.status(job_id)
        lines = self._client.tail_job_logs(job_id)
        with self._errors(job_id), asyncio.Runner() as runner:
            while True:
                try:
                    yield runner.run(anext(lines))
                except StopAsyncIteration:
                    return

    def stop(self, job_id: str) -> bool:
        """Ask the job to stop, which takes its grace period at most; whether it was running."""
        with self._errors(job_id):
            return bool(self._client.stop_job(job_id))

    @contextlib.contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (ConnectionError, requests.exceptions.ConnectionError) as error:
            raise JobError(
                f"no Ray cluster answers at {self.address}; start one with `ray start --head`, or "
                "name its dashboard with --address http://HOST:8265"
            ) from error
        except AuthenticationError as error:
            reason = error.message.partition("\n")[0].partition(": ")[2]
            raise JobError(
                f"the cluster at {self.address} wants its token ({reason}); set RAY_AUTH_TOKEN, "
                "or RAY_AUTH_TOKEN_PATH to the file that holds it"
            ) from error
        except (ValueError, requests.exceptions.InvalidURL) as error:
            raise SpecError(f"--address {self.address!r}: {error}") from error
        except RuntimeError as error:
            if job_id and "404" in str(error):
                raise JobError(
                    f"the cluster at {self.address} knows no job {job_id!r}; "
                    "`ray job list` shows those it knows"
                ) from error
            raise JobError(f"the cluster at {self.address} refused: {error}") from error


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
