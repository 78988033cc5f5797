"""The doctor and a service that is coming up."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest

from valohai_dagster.cli.checks import await_health


def test_the_doctor_waits_for_a_service_that_comes_up() -> None:
    """A real socket that refuses connections until the second look."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )

        server = threading.Thread(target=answer)

        def come_up(seconds: float) -> None:
            listener.listen()
            server.start()

        with pytest.raises(httpx.ConnectError):
            await_health(url, 0.0)
        await_health(url, 60.0, sleep=come_up)
        server.join()
