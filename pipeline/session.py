"""The Ray session of a run: started here, joined on a cluster, or the caller's own."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ray

from schemas.errors import JobError

CONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def session(address: str | None) -> Iterator[dict[str, float]]:
    """A Ray session, here or on the cluster at `address`; gives the cluster's resources.

    A session that the caller has opened with `ray.init` is used as it is, and left open.

    Ray puts the driver's working directory on its workers' path: connecting from where our own
    packages live keeps a folder of the user's that is also called `jobs` from being imported.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ side warns on stderr that a restarted actor may miss its constructor's arguments,
    # which the driver holds for as long as the job runs; and when told not to, says that, too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local = {} if address else {"include_dashboard": False}
    try:
        with contextlib.chdir(Path(__file__).parents[1]), _without_stderr(), _same_sigterm():
            # Without an address, Ray would join any cluster that was started on this machine.
            ray.init(
                address=address or "local", log_to_driver=False, logging_level="ERROR", **local
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error
    try:
        # Ray tells of workers that have died on stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself goes on trying a host that does not answer, for minutes and without a word."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(
            f"cannot reach Ray at {address}: {error}; check --address and RAY_ADDRESS"
        ) from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing on this process's stderr, whatever language writes there."""
    with open(os.devnull, "wb") as nowhere:
        saved = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Ray puts a handler in place that raises SystemExit; afterwards the caller's is back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
