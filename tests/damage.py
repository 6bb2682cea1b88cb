"""Bytes as broken disks, interrupted uploads and strangers' programs leave them.

An edit is a kind and three numbers or bytes that say where and what, so that hypothesis can make
any and make a bad one smaller.
"""

import itertools
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hypothesis import strategies as st

BLOCK = tarfile.BLOCKSIZE
LONGEST = 700
PARTS = 10_000
"""Places are in parts of the whole."""

FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "devmajor": (329, 8),
    "prefix": (345, 155),
}
"""Of a tar header: where each begins, and how long it is."""
TYPES = b"0\x0012345678ADgxKLMNSVX"
SIZES = [
    b"00000000000\0",
    b"77777777777\0",
    b"            ",
    b"-0000000001\0",
    b"\x80" + (2**63 - 1).to_bytes(11, "big"),
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\x80" + (2**33).to_bytes(11, "big"),
    b"0x10\0\0\0\0\0\0\0\0",
]
PAX = [
    "size=-1",
    "size=9223372036854775807",
    "size=99999999999999999999999999",
    "size=1e400",
    "size=nan",
    "size=0",
    "path=",
    "path=000.png",
    "path=a\0b.png",
    "path=../../000.png",
    "hdrcharset=BINARY",
    "hdrcharset=nonsense",
    "mtime=1e999",
    "mtime=nan",
    "uid=x",
    "linkpath=/etc/passwd",
    "GNU.sparse.major=1",
    "GNU.sparse.minor=0",
    "GNU.sparse.map=0,1,2",
    "GNU.sparse.map=9223372036854775807,1",
    "GNU.sparse.size=99999999999999",
    "GNU.sparse.realsize=99999999999999",
    "GNU.sparse.numblocks=3",
    "GNU.sparse.name=001.png",
]


class Edit(NamedTuple):
    kind: str
    at: int
    to: int
    data: bytes


def damage(kinds: Mapping[str, Callable[..., bytes]]) -> st.SearchStrategy[list[Edit]]:
    place = st.integers(0, PARTS)
    edit = st.builds(
        Edit,
        st.sampled_from(sorted(kinds)),
        place,
        place,
        st.binary(max_size=40) | st.sampled_from([*SIZES, *map(str.encode, PAX)]),
    )
    return st.lists(edit, min_size=1, max_size=4)


def damaged(data: bytes, edits: Sequence[Edit], kinds: Mapping[str, Callable[..., bytes]]) -> bytes:
    for edit in edits:
        if data:
            at, to = (len(data) * part // (PARTS + 1) for part in (edit.at, edit.to))
            data = kinds[edit.kind](data, at, to, edit.data)
    return data


def common(data: bytes, other: bytes) -> int:
    """How many bytes they begin with alike."""
    pairs = zip(data, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(data), len(other)))


def _flip(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << to % 8)]) + data[at + 1 :]


def _overwrite(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + more + data[at + len(more) :]


def _insert(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + more + data[at:]


def _cut(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at]


def _drop(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + data[at + to % LONGEST :]


def _repeat(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + data[at : at + to % LONGEST] + data[at:]


def _append(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data + more


def _nothing(data: bytes, at: int, to: int, more: bytes) -> bytes:
    return data[:at] + bytes(to % LONGEST) + data[at + to % LONGEST :]


BYTES: Mapping[str, Callable[..., bytes]] = {
    "append": _append,
    "cut": _cut,
    "drop": _drop,
    "flip": _flip,
    "insert": _insert,
    "nothing": _nothing,
    "overwrite": _overwrite,
    "repeat": _repeat,
}
"""What happens to any file."""


def _swap_blocks(data: bytes, at: int, to: int, more: bytes) -> bytes:
    a, b = sorted((at // BLOCK * BLOCK, to // BLOCK * BLOCK))
    if a == b:
        return data
    blocks = (data[:a], data[b : b + BLOCK], data[a + BLOCK : b], data[a : a + BLOCK])
    return b"".join((*blocks, data[b + BLOCK :]))


def _set_field(data: bytes, at: int, to: int, more: bytes) -> bytes:
    start = _header_at(data, at)
    offset, length = FIELDS[[*FIELDS][to % len(FIELDS)]]
    header = bytearray(data[start : start + BLOCK].ljust(BLOCK, b"\0"))
    header[offset : offset + length] = more[:length].ljust(length, b"\0")
    return data[:start] + _signed(header) + data[start + BLOCK :]


def _set_type(data: bytes, at: int, to: int, more: bytes) -> bytes:
    start = _header_at(data, at)
    header = bytearray(data[start : start + BLOCK].ljust(BLOCK, b"\0"))
    header[156] = TYPES[to % len(TYPES)]
    return data[:start] + _signed(header) + data[start + BLOCK :]


def _set_size(data: bytes, at: int, to: int, more: bytes) -> bytes:
    start = _header_at(data, at)
    header = bytearray(data[start : start + BLOCK].ljust(BLOCK, b"\0"))
    header[124:136] = SIZES[to % len(SIZES)]
    return data[:start] + _signed(header) + data[start + BLOCK :]


def _extend(data: bytes, at: int, to: int, more: bytes) -> bytes:
    """A header that says something of the member after it: pax records, long names."""
    start = _header_at(data, at)
    info = tarfile.TarInfo("extended")
    info.type = b"xgLKSX"[to % 6 : to % 6 + 1]
    records = more if info.type in b"LK" or to % 7 == 0 else _records(PAX[to % len(PAX)])
    info.size = len(records)
    block = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)
    return data[:start] + block + data[start:]


def _records(text: str) -> bytes:
    body = f" {text}\n".encode()
    length = next(n for n in itertools.count(len(body)) if n == len(str(n)) + len(body))
    return str(length).encode() + body


def _header_at(data: bytes, at: int) -> int:
    """Of the header that is next after a place, else of the last one before; 0 without any."""
    starts = [n for n in range(0, len(data), BLOCK) if data[n + 257 : n + 262] == b"ustar"]
    return next((n for n in starts if n >= at), starts[-1] if starts else 0)


def _signed(header: bytearray) -> bytes:
    """With the checksum that such a header has."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


TAR: Mapping[str, Callable[..., bytes]] = {
    **BYTES,
    "extend": _extend,
    "set field": _set_field,
    "set size": _set_size,
    "set type": _set_type,
    "swap blocks": _swap_blocks,
}
"""What happens to tars, whose headers may be false and yet signed."""
