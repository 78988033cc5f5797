"""What the transfer engine decides: ranges, retries, company for slow connections, words."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from valohai_agent.errors import Conflict, Denied, DiskFull, NotFound, Refused, Unreachable
from valohai_agent.phases import Rate, progress_words, time_left
from valohai_agent.protocol import Phase
from valohai_agent.transfers.ranges import (
    Ranges,
    content_range,
    identity,
    strong_etag,
    wants_company,
)
from valohai_agent.transfers.retries import (
    MAX_BACK_OFF_SECONDS,
    PROGRESS_BYTES,
    Expired,
    Renewal,
    Retries,
    Temporary,
    back_off,
    retry_after,
    status_error,
)

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


# -- ranges --------------------------------------------------------------------------------------------


def test_ranges_cover_the_file_once_and_in_order() -> None:
    ranges = Ranges(25, start=3, size=10)
    taken = []
    while (one := ranges.take()) is not None:
        taken.append((one.start, one.end))
    assert taken == [(3, 13), (13, 23), (23, 25)]
    assert not ranges.waiting


def test_the_file_is_whole_up_to_the_first_range_that_is_not() -> None:
    ranges = Ranges(30, size=10)
    first, second = ranges.take(), ranges.take()
    assert first is not None
    assert second is not None
    second.position = 20
    first.position = 4
    assert ranges.whole_until == 4
    first.position = 10
    assert ranges.whole_until == 20


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("bytes 0-9/100", (0, 10, 100)),
        ("bytes 5-5/6", (5, 6, 6)),
        ("bytes */100", None),
        ("bytes 0-9/*", None),
        ("", None),
    ],
)
def test_content_ranges_are_read(value: str, found: tuple[int, int, int] | None) -> None:
    assert content_range({"content-range": value}) == found


def test_only_strong_etags_name_a_content_else_its_time_and_length() -> None:
    weak = {"etag": 'W/"1"', "last-modified": "yesterday", "content-length": "3"}
    assert strong_etag(weak) is None
    assert identity(weak) == "yesterday|3"
    assert identity({"etag": '"1"'}) == '"1"'
    assert identity({}) is None


def test_only_slow_connections_want_company() -> None:
    assert wants_company(moved=8_000_000, seconds=1.0)
    assert not wants_company(moved=8_000_000, seconds=0.001)
    assert not wants_company(moved=0, seconds=1.0)


# -- retries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_temporary_answers(status: int) -> None:
    assert isinstance(status_error(status, "", {}, "h", "f"), Temporary)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Refused),
        (404, NotFound),
        (409, Conflict),
        (410, NotFound),
        (412, Conflict),
        (507, DiskFull),
        (301, Refused),
    ],
)
def test_final_answers(status: int, kind: type[Exception]) -> None:
    assert isinstance(status_error(status, "Words", {}, "h", "f"), kind)


def test_codes_of_stores_beat_their_status_and_their_text_is_not_shown() -> None:
    def answered(status: int, code: str) -> Exception:
        body = f"<Error><Code>{code}</Code><Message>url?sig=1</Message></Error>".encode()
        return status_error(status, "Bad", {}, "h", "f", body)

    assert isinstance(answered(400, "RequestTimeout"), Temporary)
    assert isinstance(answered(400, "ExpiredToken"), Expired)
    assert isinstance(answered(403, "AccessDenied"), Expired)
    error = answered(400, "InvalidPart")
    assert str(error) == "f: HTTP 400 Bad (InvalidPart) from h"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("-3", 0.0),
        ("99999", MAX_BACK_OFF_SECONDS),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_bounded(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}) == seconds


def test_pauses_grow_and_are_bounded() -> None:
    assert 0.25 <= back_off(1) <= 0.75
    assert back_off(50) <= 1.5 * MAX_BACK_OFF_SECONDS


def retries(pauses: list[float], attempts: int = 3) -> Retries:
    return Retries(attempts=attempts, sleep=pauses.append, check=lambda: None, name="f")


def test_a_failure_after_progress_counts_anew() -> None:
    position, tries = 0, 0

    def action() -> str:
        nonlocal position, tries
        tries += 1
        position += PROGRESS_BYTES // 2
        if tries < 20:
            raise Temporary("broke off")
        return "done"

    assert retries([]).run(action, progress=lambda: position) == "done"


@pytest.mark.parametrize("expired", [False, True])
def test_a_few_bytes_are_no_progress(expired: bool) -> None:
    position, tries = 0, 0

    def action() -> None:
        nonlocal position, tries
        tries += 1
        position += 1
        raise Expired(Denied("no")) if expired else Temporary("broke off")

    with pytest.raises((Denied, Unreachable)):
        retries([]).run(action, progress=lambda: position, renew=lambda: tries < 100)
    assert tries == (2 if expired else 3)


def test_failures_without_progress_are_bounded() -> None:
    pauses: list[float] = []

    def action() -> None:
        raise Temporary("broke off")

    with pytest.raises(Unreachable, match=r"f: broke off \(tried 3 times\)"):
        retries(pauses).run(action)
    assert len(pauses) == 2


def test_an_expired_signature_is_renewed_once_without_progress() -> None:
    asked = 0

    def renew() -> bool:
        nonlocal asked
        asked += 1
        return True

    def action() -> None:
        raise Expired(Denied("no"))

    with pytest.raises(Denied):
        retries([]).run(action, renew=renew)
    assert asked == 1


def test_connections_share_one_renewal() -> None:
    made = iter(["second", "third"])
    renewal = Renewal("first", lambda: next(made))
    assert renewal.renewed("first")
    assert renewal.renewed("first")
    assert renewal.current == "second"
    assert not Renewal("first", None).renewed("first")


# -- words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "total", "rate", "words"),
    [
        (0, None, None, "downloading 0 B"),
        (1_234_567, None, 2e6, "downloading 1.2 MB, 2.0 MB/s"),
        (
            1_200_000_000,
            1_900_000_000,
            240e6,
            "downloading 63 %, 1.2 of 1.9 GB, 240.0 MB/s, 3 s left",
        ),
        (5_000, 2_000_000, None, "downloading 0 %, 5.0 kB of 2.0 MB"),
        (10, 10, 5.0, "downloading 100 %, 10 of 10 B, 5 B/s"),
        (1, 10, 0.0, "downloading 10 %, 1 of 10 B, 0 B/s"),
    ],
)
def test_progress_in_words(done: int, total: int | None, rate: float | None, words: str) -> None:
    assert progress_words(Phase.downloading, done, total, rate) == words


def test_phases_that_move_no_bytes_have_no_rate() -> None:
    assert progress_words(Phase.pulling, 5, 10, 1.0) == "pulling 50 %"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (4800, "1 h 20 min"),
        (7200, "2 h"),
    ],
)
def test_time_left_in_words(seconds: float, words: str) -> None:
    assert time_left(seconds) == words


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.at(NOW, 0) is None
    assert rate.at(NOW + timedelta(seconds=2), 200) == 100.0
    last: float | None = None
    for second in range(3, 60):
        last = rate.at(NOW + timedelta(seconds=second), 200 + 1000 * (second - 2))
    assert last == pytest.approx(1000.0)
