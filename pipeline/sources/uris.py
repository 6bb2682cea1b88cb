"""URIs of images as rows write them: made absolute, and shown without what is secret in them.

Knows no store and opens nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.sources.base import Shard, valid_text
from pipeline.sources.grouping import hash_of
from pipeline.storage import StoredFile

MOST_CHARACTERS = 1000

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_SIGNED = re.compile(r"(https?|abfss?|az|adl|ftp|sftp|webhdfs)://", re.IGNORECASE)
"""Schemes in which a `?` begins a query; in the others it is part of a name."""


def is_absolute(path: str) -> bool:
    return path.startswith("/") or bool(_SCHEME.match(path))


def is_web(uri: str) -> bool:
    return uri[:8].lower().startswith(("http://", "https://"))


def is_data(uri: str) -> bool:
    return uri[:5].lower() == "data:"


def folder_of(uri: str) -> str:
    """The folder of a file, without the query that may have been needed to open the file."""
    return _without_query(uri).rpartition("/")[0]


def below(folder: str, path: str) -> str:
    """A relative path inside a folder; the query of the folder's URL, if any, stays at the end."""
    place = _without_query(folder)
    return f"{place.rstrip('/')}/{path}{folder[len(place) :]}"


def host_of(uri: str) -> str:
    """What has to be reached: scheme and host or bucket; empty for local files."""
    scheme, mark, rest = shown(uri).partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0].lower()}" if mark else ""


def shown(uri: str) -> str:
    """The URI for messages and tables: no user, no password, no query, and not without end."""
    if is_data(uri):
        return valid_text(f"{uri[:40]}...")
    scheme, mark, rest = _without_query(uri).partition("://")
    if mark:
        host, slash, path = rest.partition("/")
        uri = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return valid_text(uri if len(uri) <= MOST_CHARACTERS else f"{uri[:MOST_CHARACTERS]}...")


def told_apart(uris: Iterable[str]) -> dict[str, str]:
    """The URIs as people may see them; what differs in its query only gets a hash of it."""
    shown_as = {uri: shown(uri) for uri in uris}
    sharing = Counter(shown_as.values())
    return {
        uri: name if sharing[name] == 1 else f"{name}#{hash_of(uri):016x}"
        for uri, name in shown_as.items()
    }


def shard_of(file: StoredFile, names: Mapping[str, str], **told: Any) -> Shard:
    """The file as a shard under its name of `told_apart`."""
    name = names[file.uri]
    location = None if name == file.uri else file.uri
    return Shard(name, file.identity, location=location, **told)


def _without_query(uri: str) -> str:
    return re.split(r"[?#]", uri, maxsplit=1)[0] if _SIGNED.match(uri) else uri
