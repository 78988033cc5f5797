"""Servers that take a connection and never answer: few tries and one end; those that are only slow are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import web as answers
from tests.support.web import Web, serve
from valohai_agent.errors import Unreachable
from valohai_agent.protocol import Transfer, UploadGrant
from valohai_agent.transfer import SmallDownload, Transferer
from valohai_agent.transfers import pool
from valohai_agent.transfers.wire import Patience

NEVER = answers.silence(20)


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def transferer(said: list[str]) -> Iterator[Transferer]:
    made = _transferer(said, read_seconds=0.5)
    yield made
    made.close()


def _transferer(said: list[str], *, read_seconds: float) -> Transferer:
    patience = Patience(answer_seconds=0.25, read_seconds=read_seconds)
    return Transferer(
        attempts=5, patience=patience, sleep=lambda seconds: None, waiting=said.append
    )


def test_a_server_that_never_answers_has_three_tries_and_each_says_when_the_end_is(
    web: Web, transferer: Transferer, said: list[str], tmp_path: Path
) -> None:
    web.answers["/f"] = [NEVER]
    with pytest.raises(Unreachable, match=r"f: no answer within 0.5 s \(tried 3 times\)"):
        transferer.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f")
    assert web.count("GET", "/f") == 3
    first, second = said
    assert first.startswith("f: no answer within 0.25 s (try 1 of 3), next in ")
    assert first.endswith(", given up in 1 s if there is none")
    assert second.startswith("f: no answer within 0.5 s (try 2 of 3), next in ")


def test_other_files_of_such_a_server_fail_at_once_and_not_for_ever(
    web: Web, transferer: Transferer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers["/f"] = [NEVER]
    web.answers["/g"] = [answers.content(b"x")]
    other = Transfer(url=web.url("/g"))
    with pytest.raises(Unreachable):
        transferer.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f")
    with pytest.raises(Unreachable, match=r"g: 127.0.0.1:\d+ has not answered the requests for"):
        transferer.download(other, tmp_path / "g", name="g")
    assert web.count("GET", "/g") == 0
    monkeypatch.setattr(pool, "GIVEN_UP_SECONDS", 0.0)
    again = _transferer([], read_seconds=0.5)
    with pytest.raises(Unreachable):
        again.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f")
    assert again.download(other, tmp_path / "g", name="g").size == 1
    again.close()


def test_a_server_that_takes_its_time_is_waited_for_from_the_second_try_on(
    web: Web, said: list[str], tmp_path: Path
) -> None:
    patient = _transferer(said, read_seconds=20)

    def slow(handler: object) -> None:
        answers.silence(0.6)(handler)
        answers.content(b"content")(handler)

    web.answers["/f"] = [NEVER, slow]
    assert patient.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f").size == 7
    assert [text.partition(", next")[0] for text in said] == [
        "f: no answer within 0.25 s (try 1 of 3)"
    ]
    patient.close()


def test_a_server_that_has_answered_before_keeps_all_its_tries(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/a"] = [answers.content(b"x")]
    web.answers["/f"] = [NEVER]
    transferer.download(Transfer(url=web.url("/a")), tmp_path / "a", name="a")
    with pytest.raises(Unreachable, match=r"no answer within 0.5 s \(tried 5 times\)"):
        transferer.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f")


def test_a_server_that_has_answered_a_lane_keeps_all_tries_too(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/small"] = [answers.content(b"x")]
    web.answers["/f"] = [NEVER]
    small = SmallDownload(
        transfer=Transfer(url=web.url("/small")), target=tmp_path / "small", name="small"
    )
    ((_, moved),) = transferer.download_small([small])
    assert moved is not None
    with pytest.raises(Unreachable, match="tried 5 times"):
        transferer.download(Transfer(url=web.url("/f")), tmp_path / "f", name="f")


def test_an_upload_keeps_all_its_tries(web: Web, transferer: Transferer, tmp_path: Path) -> None:
    """A store may think about what it was sent for long, and a second upload may be in vain."""
    (tmp_path / "f").write_bytes(b"x")
    web.answers["/f"] = [NEVER]
    grant = UploadGrant(upload_id="u", transfer=Transfer(url=web.url("/f"), method="PUT"))
    with pytest.raises(Unreachable, match=r"no answer within 0.5 s \(tried 5 times\)"):
        transferer.upload(tmp_path / "f", grant, name="f")
