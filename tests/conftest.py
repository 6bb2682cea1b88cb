import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray._private.services import ConsolePopen
from xdist.scheduler import LoadScopeScheduling

from tests.s3 import S3Server, serve
from tests.web import Web
from tests.whole_jobs import Finished, finish

# Ray waits a second for what it has killed: on a busy machine a ResourceWarning would fail the test
# that runs when that is collected. The processes of all others are still to be waited for.
ConsolePopen.__del__ = lambda _: None

IN_ONE_PROCESS = (
    "test_run.py",
    "test_attacks.py",
    "test_flow.py",
    "test_kills.py",
    "test_stop.py",
    "test_submit.py",
)
"""Files of whole jobs that share one, or that are held to a time."""
BESIDE = (
    "test_commands.py",
    "test_package.py",
    "test_sources_faults.py",
    "test_bench.py",
    "test_hostile_job.py",
    "test_manifest_job.py",
    "test_secrets.py",
)
"""Files with other whole jobs, for the second process to begin with."""


class WholeFiles(LoadScopeScheduling):
    """Hands out whole files, which share fixtures, in order; those IN_ONE_PROCESS as if one.

    Never more than two Rays at once, and but for a while: on two cores they starve each other.
    (Of `--dist loadgroup`, whose groups xdist 3.8 writes where pytest 9.2 does not look, nothing is
    left but single tests.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return IN_ONE_PROCESS[0] if file in IN_ONE_PROCESS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    config.option.loadscopereorder = False
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs first: they take longest."""
    order = {name: number for number, name in enumerate((*IN_ONE_PROCESS, *BESIDE))}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """All that is imported by now stays: it is not looked through for garbage any more."""
    gc.freeze()


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
def two_threads() -> Iterator[None]:
    """Torch has two, not the one that tiny models are the faster with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server of files."""
    server = Web()
    yield server
    server.shutdown()
    server.server_close()
