"""List files of the `images` format: text with the path or URI of one image a line.

A relative path is below `source.image_root`, else below the folder of the list. Blank lines are
passed over, and an image that is named twice is one image. Opens the list and lists the folders
that it names, but no image: one that is not there is found out when it is read.
"""

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from pipeline.sources.base import Shard
from pipeline.sources.fetch import Fetcher
from pipeline.sources.uris import folder_of, is_web, told_apart
from pipeline.storage import Info, filesystem, identity_of, store_errors
from schemas.errors import SpecError
from schemas.job import SourceSpec, StorageSpec

SUFFIXES = (".txt", ".lst", ".txt.gz", ".lst.gz")
UNKNOWN = "unknown"
"""The identity of what is not there, or in no folder that can be listed."""


def listed_images(path: str, spec: SourceSpec, fetcher: Fetcher) -> list[Shard]:
    """A shard for each image. Raises SpecError for a list that cannot be read or names nothing."""
    uris = {fetcher.resolve(name, beside=path): None for name in _names(path, spec.storage)}
    if not uris:
        raise SpecError(f"source.path {path!r} names no image; write one path or URI a line")
    identities = _identities(uris, spec.storage)
    return [
        Shard(name, identities.get(uri, UNKNOWN), rows=1, location=uri)
        for uri, name in told_apart(uris).items()
    ]


def _names(path: str, storage: StorageSpec) -> list[str]:
    unreadable: tuple[type[Exception], ...] = (*store_errors(), zlib.error, ValueError, EOFError)
    try:
        fs, inner = filesystem(path, storage)
        data = bytes(fs.cat_file(inner))
        text = (gzip.decompress(data) if path.lower().endswith(".gz") else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SpecError(
            f"source.path {path!r} does not exist; check the spelling and the store"
        ) from error
    except unreadable as error:
        raise SpecError(f"source.path {path!r} cannot be read as a list: {error}") from error
    return [name for line in text.split("\n") if (name := line.strip())]


def _identities(uris: Iterable[str], storage: StorageSpec) -> Mapping[str, str]:
    """The identity of each that a listing of its folder shows."""
    folders: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        if not is_web(uri):
            folders[folder_of(uri)].append(uri)
    return dict(
        each for folder, inside in folders.items() for each in _found(folder, inside, storage)
    )


def _found(folder: str, uris: Iterable[str], storage: StorageSpec) -> Iterator[tuple[str, str]]:
    fs, inner = filesystem(folder, storage)
    try:
        infos: dict[str, Info] = {info["name"]: info for info in fs.ls(inner or "/", detail=True)}
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except store_errors() as error:
        raise SpecError(f"{folder}, of source.path, cannot be listed: {error}") from error
    for uri in uris:
        if info := infos.get(filesystem(uri, storage)[1]):
            yield uri, identity_of(info)
