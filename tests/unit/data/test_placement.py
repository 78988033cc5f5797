"""Placement of input files: CONTRACT 5.2 and the vectors of 17.5."""

from __future__ import annotations

import pytest

from valohai_agent.protocol import JobFile
from valohai_dagster.data.placement import (
    KeepDirectories,
    hides_values,
    place,
    place_datum,
    place_url,
    public_uri,
    public_url,
    rename,
    settle,
)
from valohai_dagster.stores.keys import Wildcard

MODES: list[KeepDirectories] = ["none", "suffix", "full"]

# 17.5: pattern, key, then the path for none, suffix, full (None = not matched)
VECTORS = [
    ("foo/bar/**.jpg", "foo/bar/ds1/a.jpg", "a.jpg", "ds1/a.jpg", "foo/bar/ds1/a.jpg"),
    ("foo/bar/*.jpg", "foo/bar/a.jpg", "a.jpg", "a.jpg", "foo/bar/a.jpg"),
    ("foo/bar/*", "foo/bar/ds1/a.jpg", None, "ds1/a.jpg", "foo/bar/ds1/a.jpg"),
    ("foo/a.jpg", "foo/a.jpg", "a.jpg", "a.jpg", "foo/a.jpg"),
]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector[0] for vector in VECTORS])
def test_17_5_keep_directories_vectors(vector: tuple[str, str, str | None, str, str]) -> None:
    pattern, key, *expected = vector
    found = []
    for keep in MODES:
        if "*" not in pattern:
            found.append(place(key, keep=keep))
            continue
        wildcard = Wildcard(pattern=pattern, descend_last=keep != "none")
        found.append(place(key, keep=keep, root=wildcard.root) if wildcard.matches(key) else None)
    assert found == expected


def test_17_5_i22_a_datum_lies_under_its_own_name() -> None:
    assert [place_datum("out/a.jpg", keep=keep) for keep in MODES] == [
        "a.jpg",
        "out/a.jpg",
        "out/a.jpg",
    ]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a/b.csv?x=1&y=/z", "b.csv"),
        ("https://u:p@h/b%20c.csv#f", "b%20c.csv"),
        ("https://h/a/", "download"),
        ("https://h", "download"),
        ("https://h/..", "download"),
        ("https://h/a/..?q", "a"),
    ],
)
def test_i25_a_url_gives_its_last_segment_without_the_query(url: str, name: str) -> None:
    assert place_url(url, keep="none") == name
    assert place_url(url, keep="suffix") == name


def test_i21_full_keeps_the_path_below_the_host_and_never_leaves_it() -> None:
    assert place_url("https://h/a/b/c.csv", keep="full") == "a/b/c.csv"
    assert place_url("https://h/../../etc//x", keep="full") == "etc/x"


def test_i24_filename_replaces_the_base_name() -> None:
    assert rename("a.csv", "b.csv") == "b.csv"
    assert rename("x/y/a.csv", "b.csv") == "x/y/b.csv"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:hide-me@h:8/p", "https://h:8/p"),
        ("https://h/p?", "https://h/p"),
        ("https://h/p#access_token=hide-me", "https://h/p"),
        (
            "https://h/p?temp_url_sig=hide-me&temp_url_expires=9",
            "temp_url_sig=***&temp_url_expires=***",
        ),
        ("https://h/p?private_token=hide-me", "private_token=***"),
        ("https://h/p?X-Amz-Signature=hide-me;foo&v=1", "X-Amz-Signature=***&v=***"),
        ("https://h/p?v=1;jwt=hide-me", "v=***"),
        ("https://h/p?hide-me", "?***&***"),
        ("https://h/p?=hide-me", "?***&***"),
        ("https://h/p?hide me=1", "?***&***"),
        ("https://h/p?a=***&b=hide-me", "a=***&b=***&***"),
        ("https://user:hide-me/pw@h/x", "https://(not readable as a URL)"),
        ("https://[hide-me", "https://(not readable as a URL)"),
    ],
)
def test_no_value_of_a_query_and_no_password_reaches_the_shown_url(url: str, shown: str) -> None:
    found = public_url(url)
    assert shown in found
    assert "hide-me" not in found
    assert public_url(found) == found, "what may be shown is shown as it is"


def test_i32_a_url_is_always_shown_alike_and_another_query_differently() -> None:
    urls = [f"https://h/p?v={number}&token=abc" for number in range(50)]
    assert [public_url(url) for url in urls] == [public_url(url) for url in urls]
    assert len({public_url(url) for url in urls}) == 50
    assert public_url("https://u:p@h/p?v=1") == public_url("https://h/p?v=1")


def test_an_address_without_its_values_is_recognised() -> None:
    assert hides_values(public_url("https://h/p?v=1&token=abc"))
    assert not any(map(hides_values, ["https://h/p", "https://h/p?v=1", "https://h/p?v=***"]))
    assert not hides_values("s3://b/x?v=***&***01234567")


def test_other_uris_are_shown_as_they_are() -> None:
    assert public_uri("s3://bucket/what?is=this#name") == "s3://bucket/what?is=this#name"
    assert public_uri("HTTPS://h/p?a=1") != "HTTPS://h/p?a=1"


def file(number: int, name: str) -> JobFile:
    return JobFile(id=str(number), name=name, uri=f"datum://{number}")


def test_i23_of_two_files_with_one_path_the_last_stays_and_a_warning_names_it() -> None:
    kept, warnings, problems = settle("data", [file(1, "a"), file(2, "b"), file(3, "a")])
    assert [f.id for f in kept] == ["2", "3"]
    assert warnings == [
        "input 'data': datum://1 and datum://3 have the same path 'a'; the last one is used"
    ]
    assert not problems


def test_a_path_cannot_be_file_and_directory_at_once() -> None:
    _, _, problems = settle("data", [file(1, "a/b"), file(2, "a/b/c")])
    assert len(problems) == 1
    assert "'a/b' is both a file and a directory" in problems[0]
