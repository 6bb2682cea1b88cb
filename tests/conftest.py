from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, serve
from tests.web import Web
from tests.whole_jobs import Finished, finish


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server with a bucket; its credentials are in the environment meanwhile."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job that has run, once for all tests that begin where it has ended."""
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server of files."""
    server = Web()
    yield server
    server.shutdown()
    server.server_close()
