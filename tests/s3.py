"""A real S3 server for tests: SeaweedFS from PyPI, on 127.0.0.1, in a folder of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ACCESS_KEY = "lavaflow-test"
SECRET_KEY = "lavaflow-test-secret"
START_TIMEOUT_S = 60.0
GRPC_OFFSET = 10_000
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3Server:
    """A running server with one bucket; its credentials are in the environment.

    It can be killed and started again: same folder, same ports, same objects.
    """

    def __init__(self, folder: Path, bucket: str) -> None:
        self.bucket = bucket
        self._log = folder / "log"
        self.port, admin, master, volume, filer = _free_ports(5)
        weed = Path(sys.executable).parent / "weed"
        self._command = [
            str(weed if weed.exists() else shutil.which("weed") or "weed"),
            *("mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false"),
            *(f"-s3.port={self.port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-admin.port={admin}", f"-master.port={master}"),
            *(f"-volume.port={volume}", f"-filer.port={filer}", f"-bucket={bucket}"),
            *(f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"),
        ]
        self.restart()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"s3://{self.bucket}/{path}"

    def kill(self) -> None:
        """SIGKILL: nothing is shut down in order."""
        self._server.kill()
        self._server.wait()

    def restart(self) -> None:
        """Start, and wait until it answers."""
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                self._command, cwd=self._log.parent, stdout=log, stderr=log
            )
        try:
            _wait_until_ready(self._server, port=self.port, log=self._log)
        except BaseException:
            self.kill()
            raise


@contextlib.contextmanager
def serve(bucket: str = "lavaflow") -> Iterator[S3Server]:
    """Start a server, wait until it answers, stop it by its pid."""
    # The server's Unix sockets do not fit the long paths that pytest gives.
    folder = Path(tempfile.mkdtemp(prefix="lf-s3-"))
    try:
        with _environment(ENVIRONMENT):
            server = S3Server(folder, bucket)
            try:
                yield server
            finally:
                server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Free ports whose gRPC twins (+ 10000) are free too."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        # Both below the range that the system hands out by itself.
        # Processes that start together have neighbouring ids: each looks at ports of its own.
        for port in range(11_000 + os.getpid() * 101 % 10_000, 22_000):
            try:
                for each in (port, port + GRPC_OFFSET):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", each))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports for the S3 server")


def _wait_until_ready(server: subprocess.Popen[bytes], *, port: int, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
