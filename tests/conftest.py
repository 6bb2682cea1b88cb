from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, serve
from tests.web import Web
from tests.whole_jobs import Finished, finish


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes of tests, one has the slow ones: two Rays at once starve each other."""
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        item.add_marker(pytest.mark.xdist_group("slow" if is_slow else item.path.name))


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
