"""Images by URI: many are asked for at a time, and given in the order in which they were named.

What is wrong with one image (it is gone, forbidden, too large, its server fails or hangs) is its
RowError, after some tries. A store that cannot be reached at all is StoreUnavailable, so that
nothing is recorded of images that are there:

    the job's own store     any but the web, and the hosts of source.path and source.image_root:
                            an image that no try has brought counts if its store answers at all,
                            and does not fall silent or break off at all images around it, too
    servers that rows name  may be gone for good: an image counts if any around it was answered

Requests run on fsspec's event loop, where one that takes too long can be ended, whatever its
library does. Decodes nothing.
"""

import asyncio
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import tenacity
from fsspec.asyn import get_loop

from pipeline.sources import remote
from pipeline.sources.remote import Place
from pipeline.sources.uris import below, folder_of, host_of, is_absolute, is_web
from schemas.errors import RowError, StoreUnavailable
from schemas.job import SourceSpec

AHEAD = 32
"""Images that are asked for before the first of them is taken."""
AHEAD_BYTES = 64 * 2**20
"""What the images ahead may come to, by the largest of the last ones; one is always asked for."""
FIRST_GUESS_BYTES = 4 * 2**20
REMEMBERED_SIZES = 64

OWN_TRIES = 5
OTHER_TRIES = 3
MOST_WAIT_S = 5.0
"""Between two tries; the first waits are shorter."""

FEW_IMAGES = 8
MANY_HOSTS = 8
"""So many servers are not gone all at once: the fault is on this side."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Lost:
    """An image that no try has brought. `is_own`: nor does the job's own store answer at all."""

    host: str
    error: RowError
    is_own: bool


_Outcome = bytes | RowError | _Lost
_Window = deque[tuple[T, Future[_Outcome] | None]]


class Fetcher:
    """Fetches images within the limits of a spec. Not for use by several threads at once."""

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self._own = {host_of(uri) for uri in (*spec.paths, spec.image_root or "")}
        self._answered: set[str] = set()
        self._sizes = deque([FIRST_GUESS_BYTES], maxlen=REMEMBERED_SIZES)
        self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="lavaflow-fetch")

    def resolve(self, path: str, *, beside: str) -> str:
        """The absolute URI of an image that a row of the file `beside` names."""
        if is_absolute(path):
            return path
        return below(self._spec.image_root or folder_of(beside), path)

    def fetch(self, uris: Iterable[str]) -> Iterator[bytes | RowError]:
        """The images, in order. Raises StoreUnavailable where a store cannot be reached."""
        for _, image in self.fetch_for((uri, uri) for uri in uris):
            if image is not None:
                yield image

    def fetch_for(
        self, asked: Iterable[tuple[T, str | None]]
    ) -> Generator[tuple[T, bytes | RowError | None], None, None]:
        """As `fetch`, each image with what it is for; None for what has no URI."""
        window: _Window[T] = deque()
        try:
            for item, uri in asked:
                window.append((item, None if uri is None else self._start(uri)))
                while window and (_is_done(window[0][1]) or not self._has_room(window)):
                    yield self._next(window)
            while window:
                yield self._next(window)
        finally:
            for _, future in window:
                if future is not None:
                    future.cancel()

    def fetch_all(
        self, asked: Iterable[tuple[T, Sequence[str | None]]]
    ) -> Generator[tuple[T, list[bytes | RowError | None]], None, None]:
        """As `fetch_for`, with all images that an item has."""
        each = (((item, len(uris)), uri) for item, uris in asked for uri in uris or (None,))
        images: list[bytes | RowError | None] = []
        with closing(self.fetch_for(each)) as fetched:
            for (item, count), image in fetched:
                images.append(image)
                if len(images) >= count:
                    yield item, images
                    images = []

    def _has_room(self, window: _Window[T]) -> bool:
        guess = max(self._sizes)
        ahead = sum(_held_bytes(future, guess=guess) for _, future in window)
        return len(window) < AHEAD and ahead + guess <= AHEAD_BYTES

    def _next(self, window: _Window[T]) -> tuple[T, bytes | RowError | None]:
        item, future = window.popleft()
        outcome = None if future is None else future.result()
        if isinstance(outcome, bytes):
            self._sizes.append(len(outcome))
        if not isinstance(outcome, _Lost):
            return item, outcome
        if outcome.is_own:
            raise StoreUnavailable(
                f"{outcome.host or 'the file system'} does not answer; {outcome.error}"
            )
        self._blame(outcome, [each for _, each in window if each is not None])
        return item, outcome.error

    def _blame(self, lost: _Lost, others: Sequence[Future[_Outcome]]) -> None:
        """Raise StoreUnavailable where no image around the lost one was answered either."""
        wait(others)
        around = [lost, *(each.result() for each in others)]
        hosts = {each.host for each in around if isinstance(each, _Lost)}
        if len(around) < FEW_IMAGES or not all(isinstance(each, _Lost) for each in around):
            return
        if self._answered and not hosts & self._answered and len(hosts) < MANY_HOSTS:
            return
        raise StoreUnavailable(
            f"none of {len(around)} images in a row was answered, by any of "
            f"{', '.join(sorted(hosts)[:MANY_HOSTS])}; {lost.error}; see that this machine reaches "
            "these servers, or leave the rows out"
        )

    def _start(self, uri: str) -> Future[_Outcome]:
        try:
            place = remote.place_of(uri, self._spec.storage)
        except RowError as error:
            known: Future[_Outcome] = Future()
            known.set_result(error)
            return known
        return asyncio.run_coroutine_threadsafe(self._outcome(place), get_loop())

    async def _outcome(self, place: Place) -> _Outcome:
        host, limit = host_of(place.uri), self._spec.max_image_bytes
        is_own = not is_web(place.uri) or host in self._own
        outcome: bytes | RowError
        try:
            outcome = await self._tried(place, tries=OWN_TRIES if is_own else OTHER_TRIES)
        except remote.errors() as error:
            outcome = remote.verdict(place, error, limit=limit)
            if remote.may_pass(place, error):
                if not await self._is_up(place, error, is_own=is_own):
                    return _Lost(host, outcome, is_own)
                if remote.status_of(error) is None:
                    return _Lost(host, outcome, is_own=False)
        self._answered.add(host)
        return outcome

    async def _tried(self, place: Place, *, tries: int) -> bytes:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: remote.may_pass(place, error)),
            wait=tenacity.wait_exponential_jitter(multiplier=0.1, max=MOST_WAIT_S, jitter=0.2),
            stop=tenacity.stop_after_attempt(tries),
            reraise=True,
        )
        data: bytes = await retrying(self._try, place)
        return data

    async def _try(self, place: Place) -> bytes:
        # Not `wait_for`, whose own task tells on stderr what it raises after a cancellation.
        async with asyncio.timeout(self._spec.image_timeout_s):
            return await remote.read(place, limit=self._spec.max_image_bytes, threads=self._threads)

    async def _is_up(self, place: Place, error: Exception, *, is_own: bool) -> bool:
        """Whether the server of a lost image answers at all.

        The job's own store is asked for something that is not there.
        """
        if not is_own:
            return remote.status_of(error) is not None
        neighbour = place.neighbour()
        try:
            await self._try(neighbour)
        except remote.errors() as answer:
            return not remote.may_pass(neighbour, answer)
        return True


class Unfetched(Fetcher):
    """Gives an empty image for every URI: for who counts rows and looks at none."""

    def fetch_for(
        self, asked: Iterable[tuple[T, str | None]]
    ) -> Generator[tuple[T, bytes | RowError | None], None, None]:
        for item, uri in asked:
            yield item, None if uri is None else b""


def _is_done(future: Future[_Outcome] | None) -> bool:
    return future is None or future.done()


def _held_bytes(future: Future[_Outcome] | None, *, guess: int) -> int:
    if future is None:
        return 0
    if not future.done():
        return guess
    outcome = future.result()
    return len(outcome) if isinstance(outcome, bytes) else 0
