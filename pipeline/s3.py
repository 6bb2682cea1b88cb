"""S3, as s3fs reaches it, with a bound on how long a request may go unanswered.

s3fs leaves a connection that has gone silent to its libraries, which try again on three levels: a
read gives up after half an hour, and an upload never, since nothing bounds the wait for the
server's permission to send. Knows neither sources nor outputs.
"""

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import s3fs
from botocore.exceptions import ReadTimeoutError

from schemas.job import StorageSpec

TRIES = 2
"""Of a request that nobody answers; what is answered with an error is tried more often."""
READ_TRIES = 3
"""Of what is read, where the answer breaks off."""
SLOWEST_UPLOAD_BYTES_PER_S = 64 * 2**10
CONNECTIONS = 64
"""More than anybody asks for at once: a wait for one would count as a server's silence."""


def s3_filesystem(storage: StorageSpec) -> s3fs.S3FileSystem:
    """The same one for equal specs, where the environment is the same."""
    return _BoundedS3(
        endpoint_url=storage.endpoint_url or _endpoint_of_environment(),
        anon=storage.anon,
        profile=storage.profile,
        # A listing that is remembered hides what other processes have published since.
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": storage.timeout_s,
            "read_timeout": storage.timeout_s,
            "max_pool_connections": CONNECTIONS,
        },
    )


def _endpoint_of_environment() -> str | None:
    """As botocore takes it from there; told by us, since fsspec keeps file systems by what it is
    told."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


class _BoundedS3(s3fs.S3FileSystem):  # type: ignore[misc]
    """Raises ReadTimeoutError for a request that nobody has answered in time, in any try."""

    retries = READ_TRIES

    async def _call_s3(self, *args: Any, **request: Any) -> Any:
        # The first time, this takes the loop longer than a server should.
        await self.set_session()
        bound_s = self.config_kwargs["read_timeout"] + _upload_s(request.get("Body"))
        for _ in range(TRIES - 1):
            with contextlib.suppress(TimeoutError):
                return await self._answer_in(bound_s, args, request)
        try:
            return await self._answer_in(bound_s, args, request)
        except TimeoutError as error:
            # Not as it is: fsspec replaces it by one that says nothing.
            raise ReadTimeoutError(endpoint_url=self.endpoint_url or "S3", error=error) from error

    async def _answer_in(
        self, bound_s: float, args: Sequence[Any], request: Mapping[str, Any]
    ) -> Any:
        async with asyncio.timeout(bound_s):
            return await super()._call_s3(*args, **request)


def _upload_s(body: object) -> float:
    n_bytes = len(body) if isinstance(body, bytes | bytearray | memoryview) else 0
    return n_bytes / SLOWEST_UPLOAD_BYTES_PER_S
