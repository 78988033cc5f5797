"""Runs a command in the namespace of a job's process. Run as a file, standard library only.

    python -I -S namespace_join.py PID|- tty|plain DIRECTORY PROGRAM [ARGUMENT ...]

`-` for a job that runs without a namespace; `tty` makes standard input the controlling terminal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import termios
import time

WAIT_SECONDS = 10.0  # the job's process may be entering its namespace right now


def main(pid: str, terminal: str, directory: str, *argv: str) -> None:
    try:
        if terminal == "tty":
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if pid != "-":
            join(f"/proc/{pid}")
        os.chdir(directory)
        # Python ignores some, and an agent started by nohup others; the command must not inherit that.
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)  # noqa: S606 - the point of this program
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: cannot be run beside the command: {error}\n")
        sys.stderr.flush()
        os._exit(126)


def join(process: str) -> None:
    wait_for_namespace(process)
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.open(f"{process}/root", os.O_RDONLY | os.O_DIRECTORY)
    kinds = [kind for kind in ("user", "mnt") if differs(process, kind)]
    opened = [os.open(f"{process}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for descriptor in opened:
        if libc.setns(descriptor, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), process)
        os.close(descriptor)
    os.fchdir(root)
    os.chroot(".")
    os.close(root)


def wait_for_namespace(process: str) -> None:
    """Until the process has its root: joined before, the command would see the whole host."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not differs(process, "mnt") or not os.path.isdir(f"{process}/root/valohai/repository"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process} has entered no namespace")
        time.sleep(0.05)


def differs(process: str, kind: str) -> bool:
    return os.readlink(f"{process}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
