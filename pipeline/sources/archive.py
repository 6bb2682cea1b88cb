"""A tar read once, from its start to its end, without believing what tarfile forgives.

`tarfile` ends quietly at a broken header, at a missing end mark and at a cut gzip stream; samples
would be lost without a word. Here all of these are ShardUnreadable. Only the member at hand is in
memory. This module knows members, not samples.
"""

import functools
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pyarrow as pa

from pipeline.sources.opened import open_file
from schemas.errors import ShardUnreadable
from schemas.job import StorageSpec

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BUFFER_BYTES = 2**20
ZSTD_READ_BYTES = 2**14
EXTENSIONS = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
    | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
"""Types of headers that tell more of the member after them."""
MOST_EXTENSION_BYTES = 2**20
"""What an extension says is taken into memory; one that claims more is broken."""
BROKEN = (
    gzip.BadGzipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    # Headers that chain without end, or that claim a size that nothing has.
    RecursionError,
    MemoryError,
    OverflowError,
)
"""What a damaged archive raises."""

# Not in the type stubs: what tarfile raises at the end mark, and where no byte is left.
_END_MARK: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_NO_BYTES: type[Exception] = tarfile.EmptyHeaderError  # type: ignore[attr-defined]


class _StrictHeader(tarfile.TarInfo):
    """A member's header; one that is broken or missing is an error, not the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSIONS and header.size > MOST_EXTENSION_BYTES:
            raise tarfile.HeaderError(f"it claims to go on for {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except _END_MARK:
            raise
        except _NO_BYTES as error:
            raise tarfile.ReadError("it ends without an end-of-archive mark") from error
        except (tarfile.HeaderError, ValueError, IndexError) as error:
            # ValueError, IndexError: extended headers with numbers that are none, or cut off.
            raise tarfile.ReadError(f"no tar header is here: {error}") from error


class Archive:
    """The members of one tar, in order; `offset` is where the header of the latest one starts."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.offset = 0
        self._tar: Any = tar

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Every member; raises where the archive breaks off or goes on after its end mark."""
        while (member := self._tar.next()) is not None:
            self.offset = member.offset
            yield member
            self._tar.members.clear()  # tarfile remembers every header that it has seen
            self._pass_to_next()
        self._expect_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The content of the latest member, whole."""
        file = self._tar.extractfile(member)
        # In pieces: tarfile would copy all of it once more.
        data = b"".join(iter(functools.partial(file.read, BUFFER_BYTES), b""))
        if len(data) < member.size:
            raise tarfile.ReadError(f"{member.name!a} has {len(data)} of its {member.size} bytes")
        return data

    def _pass_to_next(self) -> None:
        """Go to where the next header is due, which is as far away as the latest one has claimed.

        tarfile would go on asking a stream that is over for every block of it.
        """
        stream = self._tar.fileobj
        while (left := self._tar.offset - stream.tell()) > 0:
            if not stream.read(min(left, BUFFER_BYTES)):
                raise tarfile.ReadError(f"{left} bytes are missing")

    def _expect_end(self) -> None:
        while block := self._tar.fileobj.read(BUFFER_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError("more data follows the end-of-archive mark")


@contextmanager
def open_archive(uri: str, storage: StorageSpec) -> Iterator[Archive]:
    """The archive at `uri`, whatever its compression (none, gzip, zstd, bzip2, xz).

    Raises, from inside the `with` block too, ShardUnreadable where the archive is broken, gone or
    forbidden, and StoreUnavailable where the store fails.
    """
    archive: Archive | None = None
    try:
        with open_file(uri, storage) as file:
            stream = _decompressed(file)
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
                archive = Archive(tar)
                yield archive
    except BROKEN as error:
        place = f"at or after byte {archive.offset}" if archive else "at its start"
        raise ShardUnreadable(f"{uri}: the archive breaks off {place}: {error}") from error


def _decompressed(file: io.RawIOBase) -> io.BufferedIOBase:
    """The bytes inside gzip or zstd.

    tarfile's own reader checks no checksum, stops after one gzip member, and may know no zstd.
    """
    stream = io.BufferedReader(file, BUFFER_BYTES)
    start = stream.peek(len(ZSTD_MAGIC))
    if start.startswith(GZIP_MAGIC):
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if start.startswith(ZSTD_MAGIC):
        return io.BufferedReader(_Zstd(stream), BUFFER_BYTES)
    return stream


class _Zstd(io.RawIOBase):
    """The bytes inside zstd frames; a broken one is a tarfile.ReadError."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # What is asked for together is lost together where the stream breaks.
            data = self._stream.read(min(len(buffer), ZSTD_READ_BYTES))
        except OSError as error:
            # Those of the store are none.
            raise tarfile.ReadError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)
