"""A thread for calls that may hang."""

from __future__ import annotations

import subprocess
import sys

import pytest

from valohai_dagster.executions.own_thread import OwnThread

HANGS = """
import threading
from valohai_dagster.executions.own_thread import OwnThread
thread, begun = OwnThread("hangs"), threading.Event()
thread.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
thread.shutdown()
"""


def test_answers_and_errors_come_back_in_order():
    thread = OwnThread("calls")
    first, second = thread.submit(int, "4"), thread.submit(int, "four")
    thread.shutdown()
    assert first.result(10) == 4
    with pytest.raises(ValueError, match="four"):
        second.result(10)


def test_the_process_ends_while_a_call_hangs():
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=30)
