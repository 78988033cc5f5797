"""Runs a command in a running container with this process's own standard streams, like `docker exec`.

    python -m valohai_agent.runtimes.docker_exec CONTAINER tty|plain TERM PROGRAM [ARGUMENT ...]

A program of its own, so that whoever starts it has pipes, a terminal and an exit code as with any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import termios
import threading
from collections.abc import Sequence
from typing import Any

READ_BYTES = 64 * 1024


def main(container: str, kind: str, term: str, *argv: str) -> int:
    import docker
    from docker.errors import APIError

    api: Any = docker.from_env(version="auto").api
    terminal = kind == "tty"
    try:
        made = _create(api, container, argv, terminal, term)
        stream = api.exec_start(made["Id"], tty=terminal, socket=True)
    except APIError as error:
        sys.stderr.write(f"{argv[0]}: {error.explanation or error}\n")
        return 126
    if terminal:
        _follow_size(api, made["Id"])
    connection: socket.socket = getattr(stream, "_sock", stream)
    threading.Thread(target=_send, args=(connection,), daemon=True).start()
    _receive(connection, terminal)
    code = api.exec_inspect(made["Id"]).get("ExitCode")
    return 255 if code is None else int(code)


def _create(api: Any, container: str, argv: Sequence[str], terminal: bool, term: str) -> Any:
    """As root, whatever the image says (K-62); the variables are those of the container."""
    return api.exec_create(
        container,
        list(argv),
        stdin=True,
        stdout=True,
        stderr=True,
        tty=terminal,
        user="0:0",
        workdir="/valohai/repository",
        environment={"TERM": term} if terminal else None,
    )


def _follow_size(api: Any, exec_id: str) -> None:
    """Keeps the terminal in the container as large as ours, which whoever opened it has made raw."""

    def resize(*_: object) -> None:
        packed = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
        rows, columns = struct.unpack("HHHH", packed)[:2]
        if rows and columns:
            with contextlib.suppress(Exception):  # it has ended meanwhile
                api.exec_resize(exec_id, height=rows, width=columns)

    signal.signal(signal.SIGWINCH, resize)
    resize()


def _send(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(0, READ_BYTES):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket, terminal: bool) -> None:
    with connection.makefile("rb", 0 if terminal else -1) as reader:
        while True:
            if terminal:
                target, data = 1, reader.read(READ_BYTES)
            else:
                target, data = _frame(reader)
            if not data:
                return
            while data:
                data = data[os.write(target, data) :]


def _frame(reader: Any) -> tuple[int, bytes]:
    """One piece of output: a head of stream number and size, then the bytes."""
    head = reader.read(8)
    if len(head) < 8:
        return 1, b""
    number, size = struct.unpack(">BxxxL", head)
    return (2 if number == 2 else 1), reader.read(size)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
