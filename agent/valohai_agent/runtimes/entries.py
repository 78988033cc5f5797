"""Processes that are started ahead of time and become a job's command when there is one."""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from valohai_agent.runtimes.namespace import ENTRY

log = logging.getLogger(__name__)

END_SECONDS = 5.0
PASSED_ON = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE")  # what Python itself may need here


class _Waiting:
    """One started process; what is written to its pipe makes it the command, closing the pipe ends it."""

    def __init__(self) -> None:
        read_end, self._pipe = os.pipe()
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-I", "-S", str(ENTRY), str(read_end)],
                cwd="/",
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=(read_end,),
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(read_end)

    def become(self, spec: bytes) -> subprocess.Popen[bytes]:
        """The process as the command. Raises BrokenPipeError when it has ended meanwhile."""
        fd, self._pipe = self._pipe, -1
        try:
            with open(fd, "wb", buffering=0) as pipe:
                view = memoryview(spec)
                while view:
                    view = view[pipe.write(view) or 0 :]
        except OSError:
            self.end()
            raise
        return self.process

    def end(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        with self.process as process:  # closes its pipes, then waits
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class Entries:
    """Keeps one process waiting, so that no command waits for Python to start. Nothing else is done ahead: the
    namespace is made for each command anew and sees the mounts of that moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[_Waiting] = []
        weakref.finalize(self, _end_all, self._spare)

    def warm_up(self) -> None:
        """Starts the waiting process, unless there is one."""
        with self._lock:
            if self._spare:
                return
            try:
                self._spare.append(_Waiting())
            except OSError as error:
                log.warning("cannot start a process ahead: %s", error, extra={"action": "entry"})

    def start(self, spec: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """The process that becomes the command of `spec`. Raises OSError, ValueError."""
        text = marshal.dumps(dict(spec))
        with self._lock:
            waiting = self._spare.pop() if self._spare else None
        if waiting is not None:
            with contextlib.suppress(BrokenPipeError):
                return waiting.become(text)
        return _Waiting().become(text)


def _end_all(spare: list[_Waiting]) -> None:
    while spare:
        spare.pop().end()
