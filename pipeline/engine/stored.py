"""A checkpoint's folder in a store: listed by the driver, downloaded once on each machine.

    listing    names, sizes and etags; their digest is the folder's revision
    headers    of safetensors, read by range: the driver learns of a cut upload without a download
    cache      LAVAFLOW_CACHE, else ~/.cache/lavaflow: `models/DIGEST/NAME`, one digest a version

A file has its name in the cache once it is whole: it is written aside, its size, its digest where
the etag is one, and its header are checked, and whoever else wants it waits. What a killed process
leaves aside is begun anew. Knows nothing of what is in a checkpoint.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import filelock
from safetensors import SafetensorError, safe_open

from pipeline.storage import Output, StoredFile, failure_behind, identity_of, store_errors
from schemas.errors import SpecError, StoreUnavailable
from schemas.job import StorageSpec

RETRY_S = 60.0
"""So long a store that fails is asked again."""
CHUNK_BYTES = 8 * 2**20
MOST_HEADER_BYTES = 100 * 2**20
"""As safetensors itself has it."""
ASIDE = ".part"
MD5 = re.compile("[0-9a-f]{32}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFolder:
    """The files right in the folder at `url`, as they were listed, sorted by name."""

    url: str
    storage: StorageSpec
    files: Mapping[str, StoredFile]

    @functools.cached_property
    def revision(self) -> str:
        """Changes when one of the files does: 16 hex digits."""
        told = (f"{name} {file.size} {file.identity}\n" for name, file in self.files.items())
        return hashlib.sha256("".join(told).encode()).hexdigest()[:16]

    def dtypes(self, name: str) -> list[str]:
        """Of the tensors of a safetensors file, read from its header. Raises SpecError for a file
        that is broken or shorter than the header says."""
        size = self.files[name].size
        try:
            (length,) = struct.unpack("<Q", self._range(name, 0, 8))
            if length > min(size, MOST_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(self._range(name, 8, 8 + length))
            tensors = [header[key] for key in sorted(header) if key != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            if 8 + length + end != size:
                raise ValueError(f"{size} bytes where its header says {8 + length + end}")
            return [tensor["dtype"] for tensor in tensors]
        except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise SpecError(
                f"{self.url}/{name} is broken or cut off ({error}): upload it again"
            ) from error

    def fetch(self, name: str) -> Path:
        """The file on this machine. Raises StoreUnavailable, and SpecError for one that changes."""
        target = self._cache() / name
        if target.exists():
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"the cache {target.parent} cannot be made ({error}): set LAVAFLOW_CACHE to "
                "another folder"
            ) from error
        with filelock.FileLock(f"{target}.lock"):
            if not target.exists():
                self._download(name, target)
        return target

    def _download(self, name: str, target: Path) -> None:
        aside = target.with_name(name + ASIDE)
        _log.info("downloading %s/%s to %s", self.url, name, target)
        with _failures(self.url, f"downloaded to {target.parent}"):
            folder = self._folder()
            digest = folder.use(name, functools.partial(_copied, to=aside))
            now = identity_of(folder.fs.info(f"{folder.root}/{name}"))
            self._check(name, aside, digest=digest, identity=now)
        aside.replace(target)

    def _check(self, name: str, aside: Path, *, digest: str, identity: str) -> None:
        known, size = self.files[name], aside.stat().st_size
        if identity != known.identity or size != known.size:
            raise SpecError(
                f"{self.url}/{name} has changed while it was read: {size} bytes of {known.size}; "
                "run again"
            )
        if digest != identity and MD5.fullmatch(identity) and self._is_plain(name):
            raise StoreUnavailable(
                f"{self.url}/{name} was damaged on its way: its MD5 is {digest}, its etag "
                f"{identity}; run again"
            )
        if name.endswith(".safetensors"):
            try:
                with safe_open(aside, framework="np"):
                    pass
            except SafetensorError as error:
                raise SpecError(
                    f"{self.url}/{name} is broken ({error}): upload it again"
                ) from error

    def _is_plain(self, name: str) -> bool:
        """Whether the etag is the MD5 of what is read: not where the store encrypts by keys."""
        folder = self._folder()
        call: Any = getattr(folder.fs, "call_s3", None)
        if call is None:
            return False
        bucket, _, key = f"{folder.root}/{name}".partition("/")
        head = call("head_object", Bucket=bucket, Key=key)
        by_keys = "SSECustomerAlgorithm" in head or "SSEKMSKeyId" in head
        return not by_keys and head.get("ServerSideEncryption", "AES256") == "AES256"

    def _range(self, name: str, start: int, end: int) -> bytes:
        with _failures(self.url):
            folder = self._folder()
            return bytes(folder.fs.cat_file(f"{folder.root}/{name}", start=start, end=end))

    def _folder(self) -> Output:
        return Output(self.url, self.storage, retry_s=RETRY_S)

    def _cache(self) -> Path:
        version = f"{self.storage.endpoint_url}\n{self.url}\n{self.revision}"
        return cache_folder() / "models" / hashlib.sha256(version.encode()).hexdigest()[:16]


def list_folder(url: str, storage: StorageSpec, *, suffixes: tuple[str, ...]) -> StoredFolder:
    """The files that end in one of these; of others nothing depends.

    Raises SpecError where there is no such folder, StoreUnavailable where nobody answers.
    """
    folder = Output(url.rstrip("/"), storage)
    with _failures(url):
        infos = folder.fs.ls(folder.root, detail=True)
    files = {
        PurePosixPath(info["name"]).name: StoredFile(
            info["name"], int(info.get("size") or 0), identity_of(info)
        )
        for info in sorted(infos, key=lambda info: str(info["name"]))
        if info["type"] == "file" and info["name"].endswith(suffixes)
    }
    return StoredFolder(url.rstrip("/"), storage, files)


def cache_folder() -> Path:
    if own := os.environ.get("LAVAFLOW_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lavaflow"


def _copied(file: Any, *, to: Path) -> str:
    """Write the whole file and sync it; gives its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with to.open("wb") as aside:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            aside.write(chunk)
        aside.flush()
        os.fsync(aside.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def _failures(url: str, done: str = "read") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if (failure := failure_behind(error)) is not None:
            raise StoreUnavailable(f"model.path {url!r} cannot be {done}: {failure}") from error
        raise SpecError(
            f"model.path {url!r} does not exist ({error}); check the spelling and model.storage"
        ) from error
    except PermissionError as error:
        raise SpecError(
            f"model.path {url!r} may not be read ({error}); check the credentials in the "
            "environment"
        ) from error
    except store_errors() as error:
        raise StoreUnavailable(f"model.path {url!r} cannot be {done}: {error}") from error
