"""A TCP proxy in front of a store, that misbehaves where a test says so, or at random.

cut      an answer or an upload breaks off, in order or with a reset
slow     an answer comes at a few thousand bytes a second
hole     a request is taken and never answered, or an answer stops, and the connection stays
"""

import contextlib
import math
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CHUNK_BYTES = 2**16
METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")
NO_LINGER = struct.pack("ii", 1, 0)
FEW_BYTES = 2**11
"""What is sent at once of a slow answer."""


@dataclass
class Cut:
    """What happens to an upload: it breaks off after so many bytes, or only its answer is lost."""

    after_bytes: int | None


@dataclass(frozen=True)
class Fault:
    """What happens to a request: `kind` as in `Faults.KINDS`, when so many bytes were answered."""

    kind: str
    after_bytes: int
    slow_s: float


class Faults:
    """Which of the requests to come go wrong, and how: `share` of them, told by the seed alone.

    The nth request has the nth fault of the seed, whoever sends it. `between_bytes`: of an answer,
    where it breaks off or stops; as many in its head as in its first KiBs or in its MiBs.
    """

    KINDS = ("cut", "reset", "lost", "slow", "hole", "stall")
    """lost: cut before it arrives. hole: never forwarded. stall: its answer stops for good."""

    def __init__(
        self,
        seed: int,
        *,
        share: float,
        slow_s: float = 1.0,
        kinds: Sequence[str] = KINDS,
        between_bytes: tuple[int, int] = (1, 3 * 2**20),
    ) -> None:
        self.happened: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._share = share
        self._slow_s = slow_s
        self._kinds = kinds
        self._between = [math.log(n_bytes) for n_bytes in between_bytes]

    def next(self) -> Fault | None:
        is_due = self._random.random() < self._share
        kind = self._random.choice(self._kinds)
        after_bytes = int(math.exp(self._random.uniform(*self._between)))
        slow_s = self._random.uniform(0, self._slow_s)
        return Fault(kind, after_bytes, slow_s) if is_due else None


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`. `cuts`: the uploads that were cut so far.

    `faults` hit requests while they are set.
    """

    def __init__(self, target: int) -> None:
        self.cuts = 0
        self.faults: Faults | None = None
        self._target = target
        self._planned: list[Cut] = []
        self._refuses = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_uploads(self, count: int, *, after_bytes: int) -> None:
        """Cut each of the next `count` PUT requests when so many bytes of it have passed."""
        self._planned += [Cut(after_bytes)] * count

    def lose_answers(self, count: int) -> None:
        """Let each of the next `count` PUT requests arrive, and cut it before it is answered."""
        self._planned += [Cut(None)] * count

    def cut_all(self) -> None:
        with self._lock:
            for each in self._open:
                _end(each)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Cut what is there and refuse what comes, for as long as this lasts."""
        self._refuses = True
        self.cut_all()
        try:
            yield
        finally:
            self._refuses = False

    def close(self) -> None:
        _end(self._listener)
        self._listener.close()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            Connection(self, client, server).start()

    def next_cut(self) -> Cut | None:
        with self._lock:
            if not self._planned:
                return None
            self.cuts += 1
            return self._planned.pop(0)

    def next_fault(self) -> Fault | None:
        with self._lock:
            return self.faults and self.faults.next()

    def note(self, fault: Fault) -> None:
        with self._lock:
            if self.faults:
                self.faults.happened[fault.kind] += 1

    def forget(self, ended: socket.socket) -> None:
        with self._lock:
            self._open.discard(ended)
        ended.close()


class _Over(Exception):
    """The connection ends here."""


class Connection:
    """One client's connection, with a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._cut: Cut | None = None
        self._fault: Fault | None = None
        self._passed = 0
        self._answered = 0
        self._is_reset = False

    def start(self) -> None:
        for source, sink, passed_on in (
            (self._client, self._server, self._up),
            (self._server, self._client, self._down),
        ):
            threading.Thread(
                target=self._forward, args=(source, sink, passed_on), daemon=True
            ).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, passed_on: Callable[[bytes], None]
    ) -> None:
        try:
            while data := source.recv(CHUNK_BYTES):
                passed_on(data)
        except (OSError, _Over):
            pass
        finally:
            for each in (sink, source):
                # With a reset, nothing is said before the socket is closed.
                _end(each, how=socket.SHUT_RD if self._is_reset else socket.SHUT_RDWR)
            self._proxy.forget(source)

    def _up(self, data: bytes) -> None:
        if data.startswith(METHODS):
            self._begin(data)
        if self._fault and self._fault.kind == "hole":
            return
        if self._cut is None or self._cut.after_bytes is None:
            self._server.sendall(data)
            return
        left = self._cut.after_bytes - self._passed
        self._passed += len(data)
        self._server.sendall(data[:left])
        if len(data) >= left:
            raise _Over

    def _begin(self, data: bytes) -> None:
        """Here starts a request."""
        self._answered = 0
        if data.startswith(b"PUT ") and self._cut is None:
            self._cut = self._proxy.next_cut()
            self._passed = 0
        self._fault = self._proxy.next_fault()
        if self._fault and self._fault.kind in {"hole", "lost"}:
            self._proxy.note(self._fault)
            if self._fault.kind == "lost":
                raise _Over

    def _down(self, data: bytes) -> None:
        if self._cut is not None and b"100 Continue" not in data:
            raise _Over
        fault = self._fault
        if fault is None:
            self._client.sendall(data)
        elif fault.kind == "slow":
            self._send_slowly(data, fault)
        else:
            self._send_until(data, fault)

    def _send_slowly(self, data: bytes, fault: Fault) -> None:
        if self._answered == 0:
            self._proxy.note(fault)
        for start in range(0, len(data), FEW_BYTES):
            # The first bytes only: an answer is slow for so long in all.
            if self._answered < 10 * FEW_BYTES:
                time.sleep(fault.slow_s / 10)
            some = data[start : start + FEW_BYTES]
            self._client.sendall(some)
            self._answered += len(some)

    def _send_until(self, data: bytes, fault: Fault) -> None:
        left = max(fault.after_bytes - self._answered, 0)
        is_first = self._answered <= fault.after_bytes
        self._answered += len(data)
        self._client.sendall(data[:left])
        if len(data) <= left:
            return
        if is_first:
            self._proxy.note(fault)
        if fault.kind == "reset":
            self._is_reset = True
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        if fault.kind != "stall":
            raise _Over


def _end(open_socket: socket.socket, *, how: int = socket.SHUT_RDWR) -> None:
    """Whoever waits for this socket, on either side, finds it ended."""
    with contextlib.suppress(OSError):
        open_socket.shutdown(how)
