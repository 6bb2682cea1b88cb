"""One image by its URI: opened in whatever store it is, read up to a limit, or the reason why not.

What a library raises is judged here: is it final, or may another try bring the image? Knows neither
tries nor timeouts (`fetch.py`). The coroutines run on fsspec's event loop.
"""

import asyncio
import errno
import os
import stat
import sys
from concurrent.futures import Executor
from dataclasses import dataclass

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline.sources.uris import below, folder_of, is_data, is_web, shown
from pipeline.storage import PASSING_STATUSES, filesystem, is_local, store_errors
from schemas.errors import ImageMissing, ImageTooLarge, ImageUnreachable, RowError, SpecError
from schemas.job import StorageSpec

NOT_THERE = frozenset({404, 410})
FORBIDDEN = frozenset({401, 403})
NO_SUCH_RANGE = 416
PASSING_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY}
)
"""What a local file system may do better later; anything else is wrong with the path."""

PROBE = "lavaflow-probe"
MORE_BYTES = 2**20
"""What is read at once of a file that grows."""


class TooLarge(Exception):
    """The image has more bytes than it may have."""


class Refused(Exception):
    """A web server answers with a status instead of the image."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server answers {status}")
        self.status = status


@dataclass(frozen=True)
class Place:
    """Where an image is."""

    uri: str
    fs: fsspec.AbstractFileSystem
    path: str

    def neighbour(self) -> "Place":
        """A place beside it, where nothing is."""
        uri, path = (below(folder_of(each), PROBE) for each in (self.uri, self.path))
        return Place(uri, self.fs, path)


def place_of(uri: str, storage: StorageSpec) -> Place:
    """Raises ImageMissing for what cannot be the URI of a file."""
    name = shown(uri)
    if is_data(uri):
        raise ImageMissing(f"{name}: data: URLs are not read; write the bytes in a binary column")
    if is_web(uri):
        return Place(uri, fsspec.filesystem("http"), uri)
    if "::" in uri and not uri.startswith("/"):
        raise ImageMissing(f"{name}: chained URLs are not read; name the file itself")
    try:
        return Place(uri, *filesystem(uri, storage))
    except (SpecError, ValueError) as error:
        raise ImageMissing(f"{name}: cannot open this kind of URL; use one of fsspec's") from error


def errors() -> tuple[type[Exception], ...]:
    """What `read` may raise: what stores do, and what their libraries say of impossible names."""
    return (*store_errors(), Refused, TooLarge, ValueError, TypeError)


async def read(place: Place, *, limit: int, threads: Executor) -> bytes:
    """The bytes of the image; raises TooLarge before more than a few over `limit` are in memory."""
    if is_web(place.uri):
        data = await _read_web(place, limit=limit)
    elif isinstance(place.fs, AsyncFileSystem):
        data = await _read_async(place, limit=limit)
    else:
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(threads, _read_plain, place, limit)
    if len(data) > limit:
        raise TooLarge
    return data


async def _read_web(place: Place, *, limit: int) -> bytes:
    import aiohttp

    session = await place.fs.set_session()
    url, timeout = place.fs.encode_url(place.path), aiohttp.ClientTimeout(total=None)
    data = bytearray()
    async with session.get(url, timeout=timeout, **place.fs.kwargs) as response:
        if response.status >= 400:
            raise Refused(response.status)
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > limit:
                break
    return bytes(data)


async def _read_async(place: Place, *, limit: int) -> bytes:
    try:
        return bytes(await place.fs._cat_file(place.path, start=0, end=limit + 1))
    except OSError as error:
        # Some stores find no range in an empty object.
        if status_of(error) != NO_SUCH_RANGE:
            raise
        return b""


def _read_plain(place: Place, limit: int) -> bytes:
    if is_local(place.fs):
        return _read_local(place.path, limit)
    with place.fs.open(place.path, "rb") as file:
        return bytes(file.read(limit + 1))


def _read_local(path: str, limit: int) -> bytes:
    """Takes memory for what is there, not for what may be there; it may grow meanwhile."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "no regular file")
    with open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        data = file.read(min(n_bytes, limit) + 1)
        while n_bytes < len(data) <= limit and (more := file.read(MORE_BYTES)):
            data += more
    return data


def status_of(error: BaseException) -> int | None:
    """The HTTP status with which a server has answered, if any has."""
    if isinstance(error, Refused):
        return error.status
    # s3fs translates botocore's answers into OSErrors.
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def may_pass(place: Place, error: BaseException) -> bool:
    """Whether another try may bring the image."""
    if (status := status_of(error)) is not None:
        return status >= 500 or status in PASSING_STATUSES
    if isinstance(error, TimeoutError):
        return True
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)):
        return False
    if isinstance(error, OSError) and is_local(place.fs):
        return error.errno in PASSING_ERRNOS
    return isinstance(error, store_errors()) and not isinstance(error, _impossible_names())


def _impossible_names() -> tuple[type[Exception], ...]:
    """What botocore raises before it asks any server."""
    error = getattr(sys.modules.get("botocore.exceptions"), "ParamValidationError", None)
    return () if error is None else (error,)


def verdict(place: Place, error: Exception, *, limit: int) -> RowError:
    """What an error, the last one, says of the image."""
    name, status = shown(place.uri), status_of(error)
    if isinstance(error, TooLarge):
        return ImageTooLarge(
            f"{name}: the image has more bytes than the {limit:,} of source.max_image_bytes; "
            "raise it to read this image"
        )
    if isinstance(error, FileNotFoundError) or status in NOT_THERE:
        return ImageMissing(f"{name}: there is no such file")
    if isinstance(error, PermissionError) or status in FORBIDDEN:
        return ImageMissing(f"{name}: may not be read; check the credentials")
    if status is None and not may_pass(place, error):
        return ImageMissing(f"{name}: cannot be the name of an image: {_reason(error)}")
    return ImageUnreachable(f"{name}: could not be fetched: {_reason(error)}")


def _reason(error: Exception) -> str:
    """In few words, and without the URLs that libraries put into their messages."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, TimeoutError):
        return "it is not there in the seconds of source.image_timeout_s"
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or type(error).__name__
