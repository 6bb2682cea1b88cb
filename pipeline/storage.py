"""Files in any store that fsspec reaches: listing a source, publishing into an output.

`list_files` turns the paths of a spec into files with an identity each. `Output` is the folder of
one output: whatever it writes appears whole or not at all, and replaces what is there only where
that is asked for.
This module knows nothing of samples, Parquet or Ray.
"""

import contextlib
import copy
import errno
import itertools
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import tenacity
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import SpecError
from schemas.job import StorageSpec

GLOB_CHARACTERS = frozenset("*?[")
MOST_NAMES = 10_000_000
LEFTOVER_AGE_S = 3600.0
REWRITE = "rewrite-"
READERS = 16
"""Files that are read or removed at the same time; they wait for the store, not for a CPU."""
FEW_NAMES = 8
"""More names than these in one brace range are looked up in a listing of their folder."""

PASSING_STATUSES = frozenset({408, 425, 429})
"""With these a web server says that it may answer later, as with all from 500 on."""
MODIFIED = ("mtime", "LastModified", "Last-Modified", "created")
"""What stores call the time of the last change."""

T = TypeVar("T")

Info = Mapping[str, Any]
"""What fsspec says of a file: `name`, `type`, `size` and whatever the store adds."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a store. `identity` changes when the content does."""

    uri: str
    size: int
    identity: str


def filesystem(url: str, storage: StorageSpec) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path inside it.

    Raises SpecError for a protocol that fsspec does not know or whose package is missing.
    """
    if url.startswith("/"):
        # A local file's name may hold what fsspec takes for a chain of URLs.
        return LocalFileSystem(), url
    try:
        protocol = fsspec.utils.get_protocol(url)
        if protocol in {"s3", "s3a"}:
            # Imported here: it takes half a second, and most commands need none of it.
            from pipeline.s3 import s3_filesystem

            s3 = s3_filesystem(storage)
            return s3, str(s3._strip_protocol(url))
        options = _web_options(storage) if protocol in {"http", "https"} else {}
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, OSError) as error:
        raise SpecError(f"{url}: cannot open this kind of URL: {error}") from error
    return fs, str(path)


def _web_options(storage: StorageSpec) -> Mapping[str, Any]:
    import aiohttp

    # Without a limit for the whole: a file may be read for as long as its bytes come.
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=storage.timeout_s, sock_read=storage.timeout_s
    )
    return {"client_kwargs": {"timeout": timeout}}


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def uri_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The path as people write it: plain for local files, with its protocol elsewhere."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it cannot be reached or read: OSError, and what s3fs lets through.

    s3fs passes on the exceptions of its own libraries once it has retried; a library that is not
    imported, or is being imported by another thread, has raised none.
    """
    foreign = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return (OSError, *_known_errors(*foreign))


def _known_errors(*names: tuple[str, str]) -> tuple[type[Exception], ...]:
    """The exceptions of modules that are imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(error for error in found if error is not None)


def failure_behind(error: FileNotFoundError) -> BaseException | None:
    """What has made a store say that a file is not there, if it may be there later.

    fsspec says it of a web server that fails or does not answer, too.
    """
    cause = error.__cause__
    if not isinstance(cause, store_errors()) or isinstance(cause, FileNotFoundError):
        return None
    status = getattr(cause, "status", None)
    is_final = isinstance(status, int) and status < 500 and status not in PASSING_STATUSES
    return None if is_final else cause


def identity_of(info: Info) -> str:
    """The etag where a listing tells it, else size and modification time."""
    if etag := info.get("ETag") or info.get("etag"):
        return str(etag).strip('"')
    modified = next((str(info[name]) for name in MODIFIED if info.get(name)), "")
    return f"{info.get('size')}-{modified}"


def list_files(
    paths: Iterable[str], storage: StorageSpec, *, suffixes: Collection[str]
) -> list[StoredFile]:
    """The files that the paths name, sorted by URI, each once.

    A path is a file, a folder (searched through, for `suffixes`), a glob or a brace range.
    Raises SpecError for a path that does not exist, may not be read, or holds no such file.
    """
    found: dict[str, StoredFile] = {}
    for path in paths:
        singles = _expand_braces(path)
        known = _infos_beside(singles, storage) if len(singles) > FEW_NAMES else {}
        for single in singles:
            for file in _list_path(single, storage, suffixes=suffixes, known=known):
                found[file.uri] = file
    for uri in found:
        _refuse_odd_name(uri)
    return [found[uri] for uri in sorted(found)]


def _refuse_odd_name(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"source.path: the file name {uri!a} is not valid UTF-8 and cannot be written in the "
            "answer table; rename the file"
        ) from error


def _expand_braces(path: str) -> list[str]:
    try:
        names = list(itertools.islice(braceexpand(path, escape=False), MOST_NAMES + 1))
    except ValueError as error:
        raise SpecError(f"source.path {path!r}: unbalanced braces: {error}") from error
    if len(names) > MOST_NAMES:
        raise SpecError(
            f"source.path {path!r}: the brace range stands for more than {MOST_NAMES:,} names; "
            "give a folder or a glob"
        )
    return names


def _infos_beside(paths: Iterable[str], storage: StorageSpec) -> dict[str, Info]:
    """What lies in the folders of these paths, by its name: a listing a folder, not one a file."""
    folders = {path.rpartition("/")[0] for path in paths}
    infos: dict[str, Info] = {}
    for folder in folders - {""}:
        fs, inner = filesystem(folder, storage)
        # Where a folder cannot be listed, its files are asked for one by one, and errors told.
        with contextlib.suppress(*store_errors()):
            infos.update((info["name"], info) for info in fs.ls(inner, detail=True))
    return infos


def _list_path(
    path: str, storage: StorageSpec, *, suffixes: Collection[str], known: Mapping[str, Info]
) -> list[StoredFile]:
    fs, inner = filesystem(path, storage)
    try:
        infos = _infos(fs, inner, suffixes=suffixes, known=known)
    except FileNotFoundError as error:
        if (failure := failure_behind(error)) is not None:
            raise SpecError(f"source.path {path!r} cannot be listed: {failure}") from error
        raise SpecError(
            f"source.path {path!r} does not exist; check the spelling and the store"
        ) from error
    except PermissionError as error:
        raise SpecError(
            f"source.path {path!r} may not be read ({error}); check the credentials"
        ) from error
    except store_errors() as error:
        raise SpecError(f"source.path {path!r} cannot be listed: {error}") from error
    if not infos:
        kinds = ", ".join(sorted(suffixes))
        raise SpecError(f"source.path {path!r} holds no file that ends in one of: {kinds}")
    return [
        StoredFile(uri_of(fs, info["name"]), int(info.get("size") or 0), identity_of(info))
        for info in infos
    ]


def _infos(
    fs: fsspec.AbstractFileSystem,
    path: str,
    *,
    suffixes: Collection[str],
    known: Mapping[str, Info],
) -> list[Info]:
    if GLOB_CHARACTERS & set(path) and not fs.exists(path):
        matches = fs.glob(path, detail=True)
        return _told(fs, [info for info in matches.values() if info["type"] == "file"])
    info = known.get(path) or fs.info(path)
    if info["type"] != "directory":
        return _told(fs, [info])
    below = fs.find(path, detail=True)
    return _told(fs, [info for name, info in below.items() if has_suffix(name, suffixes)])


def _told(fs: fsspec.AbstractFileSystem, infos: list[Info]) -> list[Info]:
    """With sizes and what else the store knows: the listings of web servers are names alone."""
    if all(info.get("size") is not None for info in infos):
        return infos
    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(lambda info: fs.info(info["name"]), infos))


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether the file name ends in one of `suffixes` (with their dots), whatever the case."""
    return PurePosixPath(name).name.lower().endswith(tuple(suffixes))


class Output:
    """The folder of one output. Names are relative to it, with `/` between folders.

    What the store refuses (full, forbidden, not reached) is tried again at growing intervals for
    `retry_s` seconds, and raised after that.
    """

    def __init__(self, path: str, storage: StorageSpec, *, retry_s: float = 0.0) -> None:
        self.fs, self.root = filesystem(path, storage)
        self.uri = uri_of(self.fs, self.root)
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=15.0),
            stop=tenacity.stop_before_delay(retry_s),
            reraise=True,
        )

    def with_patience(self, retry_s: float) -> "Output":
        """The same output, for a caller that waits longer or less long for the store."""
        other = copy.copy(self)
        other._retrying = self._retrying.copy(stop=tenacity.stop_before_delay(retry_s))
        return other

    def publish(self, name: str, data: bytes) -> bool:
        """Make `data` appear under `name`, whole and for good; False where the name is taken.

        Local: written aside, synced and linked without replacement. Object stores: one
        create-if-absent upload, where the store can; an upload that was tried again may find its
        own first try there.
        """
        if is_local(self.fs):
            return self._retrying(self._publish_local, Path(self.root, name), data)
        return self._retrying(self._upload_new, name, data)

    def _upload_new(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Some servers' 412 (precondition failed) reaches s3fs as EINVAL.
            if error.errno == errno.EINVAL and self.fs.exists(self._path(name)):
                return False
            raise
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Make `data` appear under `name`, in the place of what may be there.

        At any moment a reader finds one of both, whole.
        """
        if is_local(self.fs):
            self._retrying(self._replace_local, Path(self.root, name), data)
        else:
            self._retrying(self.fs.pipe_file, self._path(name), data)

    def rewrite(self, name: str, data: bytes, *, was: str, check: Callable[[], None]) -> bool:
        """Make `data` appear in the place of a file; False where that is another than it `was`.

        `was`: as `identities` told it before the file was read. `check` is called at the last
        moment. Who sleeps between that and the end, while another run goes on, harms nothing: what
        was written aside is removed by `remove_leftovers`, and S3 compares the file once more.
        Other stores leave a moment in which it is not noticed.
        """
        if is_local(self.fs):
            return self._retrying(self._rewrite_local, name, data, was, check)
        return self._retrying(self._upload_over, name, data, was, check)

    def _rewrite_local(self, name: str, data: bytes, was: str, check: Callable[[], None]) -> bool:
        target = Path(self.root, name)
        with self._aside(data, prefix=REWRITE) as aside:
            check()
            if not self._is(name, was):
                return False
            try:
                aside.replace(target)
            except FileNotFoundError:
                return False
        _sync_folder(target.parent)
        return True

    def _upload_over(self, name: str, data: bytes, was: str, check: Callable[[], None]) -> bool:
        check()
        if "s3" not in self.fs.protocol:
            self.fs.pipe_file(self._path(name), data)
            return True
        try:
            # In one piece: the condition belongs to the request that brings the data.
            self.fs.pipe_file(self._path(name), data, chunksize=len(data) + 1, IfMatch=f'"{was}"')
        except FileNotFoundError:
            return False
        except OSError as error:
            # A 412 (precondition failed) reaches s3fs as EEXIST or EINVAL, as other things do.
            is_refusal = error.errno == errno.EINVAL or isinstance(error, FileExistsError)
            if is_refusal and not self._is(name, was):
                return False
            raise
        return True

    def _is(self, name: str, identity: str) -> bool:
        try:
            return identity_of(self.fs.info(self._path(name))) == identity
        except FileNotFoundError:
            return False

    def _replace_local(self, target: Path, data: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._aside(data) as aside:
            aside.replace(target)
        _sync_folder(target.parent)

    def _publish_local(self, target: Path, data: bytes) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._aside(data) as aside:
            try:
                os.link(aside, target)
            except FileExistsError:
                return False
        _sync_folder(target.parent)
        return True

    @contextlib.contextmanager
    def _aside(self, data: bytes, *, prefix: str = "") -> Iterator[Path]:
        """A synced file on the output's own file system, gone afterwards."""
        aside = Path(self.root, ".tmp", prefix + uuid.uuid4().hex)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def names(self, folder: str, *, suffix: str) -> list[str]:
        """The names of the files right in `folder`, sorted; none where there is no folder."""
        return list(self.identities(folder, suffix=suffix))

    def identities(self, folder: str, *, suffix: str) -> dict[str, str]:
        """The names as `names` gives them, each with what changes when the file does."""
        try:
            infos = self._retrying(self.fs.ls, self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        # Object stores may list the folder itself, as a file whose name ends in a slash.
        files = [i for i in infos if i["type"] == "file" and not i["name"].endswith("/")]
        found = {f"{folder}/{PurePosixPath(i['name']).name}": identity_of(i) for i in files}
        return {name: found[name] for name in sorted(found) if name.endswith(suffix)}

    def read(self, name: str) -> bytes:
        return bytes(self._retrying(self.fs.cat_file, self._path(name)))

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._retrying(self.fs.rm_file, self._path(name))

    def remove_leftovers(self) -> None:
        """Remove what killed writers have left aside; what is younger may still be written.

        Not so what is to take the place of another file: only who holds the output does that.
        """
        if not is_local(self.fs):
            return
        oldest = time.time() - LEFTOVER_AGE_S
        for aside in Path(self.root, ".tmp").glob("*"):
            with contextlib.suppress(OSError):
                if aside.name.startswith(REWRITE) or aside.stat().st_mtime < oldest:
                    aside.unlink()

    def use(self, name: str, use: Callable[[Any], T]) -> T:
        """What `use` makes of a file that is open for reading at random; tried again as a whole."""
        made: T = self._retrying(self._use, name, use)
        return made

    def _use(self, name: str, use: Callable[[Any], T]) -> T:
        with self.fs.open(self._path(name), "rb") as file:
            return use(file)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


def _may_pass(error: BaseException) -> bool:
    """Whether a store may do later what it has refused now."""
    final = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    without = _known_errors(("botocore.exceptions", "NoCredentialsError"))
    return isinstance(error, store_errors()) and not isinstance(error, (*final, *without))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
