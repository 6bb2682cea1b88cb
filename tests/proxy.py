"""A TCP proxy in front of a store, that cuts connections where a test says so."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CHUNK_BYTES = 2048


@dataclass
class Cut:
    """What happens to an upload: it breaks off after so many bytes, or only its answer is lost."""

    after_bytes: int | None


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`. `cuts`: the uploads that were cut so far."""

    def __init__(self, target: int) -> None:
        self.cuts = 0
        self._target = target
        self._planned: list[Cut] = []
        self._refuses = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
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

    def _next_cut(self) -> Cut | None:
        with self._lock:
            if not self._planned:
                return None
            self.cuts += 1
            return self._planned.pop(0)

    def _forget(self, ended: socket.socket) -> None:
        with self._lock:
            self._open.discard(ended)
        ended.close()


class Connection:
    """One client's connection, with a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._cut: Cut | None = None
        self._passed = 0

    def start(self) -> None:
        for source, sink, is_allowed in (
            (self._client, self._server, self._may_go_up),
            (self._server, self._client, self._may_go_down),
        ):
            threading.Thread(
                target=self._forward, args=(source, sink, is_allowed), daemon=True
            ).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, is_allowed: Callable[[bytes], bool]
    ) -> None:
        try:
            while (data := source.recv(CHUNK_BYTES)) and is_allowed(data):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            _end(sink)
            _end(source)
            self._proxy._forget(source)

    def _may_go_up(self, data: bytes) -> bool:
        if self._cut is None and data.startswith(b"PUT "):
            self._cut = self._proxy._next_cut()
            self._passed = 0
        if self._cut is None or self._cut.after_bytes is None:
            return True
        left = self._cut.after_bytes - self._passed
        self._passed += len(data)
        if len(data) < left:
            return True
        self._server.sendall(data[:left])
        return False

    def _may_go_down(self, data: bytes) -> bool:
        return self._cut is None or b"100 Continue" in data


def _end(open_socket: socket.socket) -> None:
    """Whoever waits for this socket, on either side, finds it ended."""
    with contextlib.suppress(OSError):
        open_socket.shutdown(socket.SHUT_RDWR)
