"""One session or tunnel of the SSH server: a program beside the command, and the streams between it and the client."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import pty
import signal
import struct
import termios
import tty
from typing import Any

import asyncssh
from asyncssh.constants import EXTENDED_DATA_STDERR

from valohai_agent.runtimes.base import Entry, Running

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
MOST_WAITING = (
    1024 * 1024
)  # bytes of input that a program has not read yet before the client has to wait
DRAIN_SECONDS = 2.0  # for output of what a session left behind
SHELL = 'if b=$(command -v bash); then exec "$b" "$@"; fi; exec /bin/sh "$@"'
RELAY = """\
for p in python3 python; do command -v $p >/dev/null && exec $p -c "$3" "$1" "$2"; done
command -v nc >/dev/null && exec nc "$1" "$2"
command -v bash >/dev/null && exec bash -c 'exec 3<>/dev/tcp/$0/$1 && { cat <&3 & cat >&3; wait; }' "$1" "$2"
echo "a tunnel needs python3, nc or bash in the image" >&2
exit 127
"""
RELAY_PYTHON = """\
import os, socket, sys, threading
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def send():
    while True:
        data = os.read(0, 65536)
        if not data:
            return s.shutdown(socket.SHUT_WR)
        s.sendall(data)
t = threading.Thread(target=send)
t.daemon = True
t.start()
while True:
    data = s.recv(65536)
    if not data:
        os._exit(0)
    while data:
        data = data[os.write(1, data):]
"""


class DebugSession(asyncssh.SSHServerSession[bytes]):
    """A shell, with a terminal if asked for, or a single command (K-62)."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._term: str | None = None
        self._size = (80, 24, 0, 0)
        self._arguments: list[str] = []
        self._input: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._program: _Program | None = None
        self._task: asyncio.Task[None] | None = None
        self._chan: Any = None

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._chan = chan

    def pty_requested(
        self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Any
    ) -> bool:
        self._term, self._size = term_type or "xterm", term_size
        return True

    def shell_requested(self) -> bool:
        return True

    def exec_requested(self, command: str) -> bool:
        self._arguments = ["-c", command]
        return True

    def session_started(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._waiting += len(data)
        self._input.put_nowait(data)
        if self._waiting > MOST_WAITING:
            self._chan.pause_reading()

    def eof_received(self) -> bool:
        self._input.put_nowait(None)
        return True  # its output still goes the other way

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        self._size = (width, height, pixwidth, pixheight)
        if self._program is not None:
            self._program.resize(self._size)

    def signal_received(self, signal: str) -> None:
        if self._program is not None:
            self._program.signal(f"SIG{signal}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        argv = ["/bin/sh", "-c", SHELL, "sh", *self._arguments]
        entry = self._running.enter(argv, terminal=self._term)
        program = _Program(entry)
        try:
            await program.start(self._size if self._term else None)
            self._program = program
            feeding = asyncio.ensure_future(self._feed(program))
            code = await program.follow(self._write)
            feeding.cancel()
            self._chan.exit(code)
        except OSError as error:
            log.warning("ssh session: %s", error, extra={"action": "ssh-session"})
            self._chan.exit(126)
        finally:
            program.end()

    async def _write(self, data: bytes, error: bool) -> None:
        await self._writable.wait()
        self._chan.write(data, EXTENDED_DATA_STDERR if error else None)

    async def _feed(self, program: _Program) -> None:
        while (data := await self._input.get()) is not None:
            await program.write(data)
            self._waiting -= len(data)
            if self._waiting <= MOST_WAITING // 2:
                self._chan.resume_reading()
        program.end_of_input()


async def relay(running: Running, host: str, port: int, reader: Any, writer: Any) -> None:
    """One tunnelled connection, made by a small program in the container."""
    argv = ["/bin/sh", "-c", RELAY, "sh", host, str(port), RELAY_PYTHON]
    program = _Program(running.enter(argv))

    async def back(data: bytes, error: bool) -> None:
        if not error:
            writer.write(data)
            await writer.drain()

    async def forth() -> None:
        while data := await reader.read(READ_BYTES):
            await program.write(data)
        program.end_of_input()

    feeding = None
    try:
        await program.start(None)
        feeding = asyncio.ensure_future(forth())
        await program.follow(back)
    finally:
        if feeding is not None:
            feeding.cancel()
        program.end()
        writer.close()


class _Program:
    """A started entry, its streams pipes or a terminal."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._process: asyncio.subprocess.Process | None = None
        self._terminal: int | None = None
        self._readers: list[tuple[asyncio.StreamReader, bool]] = []
        self._writer: Any = None
        self._transports: list[Any] = []

    async def start(self, size: tuple[int, int, int, int] | None) -> None:
        pipe: int = asyncio.subprocess.PIPE
        streams: tuple[int, int, int] = (pipe, pipe, pipe)
        slave = None
        if size is not None:
            self._terminal, slave = pty.openpty()
            self.resize(size)
            if self._entry.raw:
                tty.setraw(slave)
            streams = (slave, slave, slave)
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._entry.argv,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                env=dict(self._entry.environment),
                start_new_session=True,
            )
        finally:
            if slave is not None:
                os.close(slave)
        if self._terminal is not None:
            await self._open_terminal(self._terminal)
        elif process.stdout is not None and process.stderr is not None:
            self._readers = [(process.stdout, False), (process.stderr, True)]
            self._writer = process.stdin

    async def _open_terminal(self, terminal: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        reading, _ = await loop.connect_read_pipe(
            lambda: protocol, os.fdopen(os.dup(terminal), "rb", 0)
        )
        writing, flow = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(os.dup(terminal), "wb", 0)
        )
        self._transports = [reading, writing]
        self._readers = [(reader, False)]
        self._writer = asyncio.StreamWriter(writing, flow, None, loop)

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._writer.write(data)
            await self._writer.drain()

    def end_of_input(self) -> None:
        """A terminal has no end: the client's control-D goes through it as any other key."""
        if self._terminal is None:
            self._writer.close()

    def resize(self, size: tuple[int, int, int, int]) -> None:
        if self._terminal is not None:
            width, height, *pixels = size
            packed = struct.pack("HHHH", height, width, *pixels)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, packed)

    def signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if self._process is not None and isinstance(number, signal.Signals):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def follow(self, take: Any) -> int:
        """Hands on all output; gives the exit code, 128+n for a signal."""
        assert self._process is not None  # started before
        pumps = [asyncio.ensure_future(_pump(r, e, take)) for r, e in self._readers]
        try:
            code = await self._process.wait()
            await asyncio.wait(pumps, timeout=DRAIN_SECONDS)
        finally:
            for pump in pumps:
                pump.cancel()
        return 128 - code if code < 0 else code

    def end(self) -> None:
        """Hangs up, as a closed terminal window does."""
        if self._process is not None and self._process.returncode is None:
            self.signal("SIGHUP")
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        for transport in self._transports:
            transport.close()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None


async def _pump(reader: asyncio.StreamReader, error: bool, take: Any) -> None:
    with contextlib.suppress(OSError):  # how a terminal says that its other side is closed
        while data := await reader.read(READ_BYTES):
            await take(data, error)
