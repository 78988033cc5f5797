"""Keys are safe relative paths; wildcards follow I-03, I-06 and I-21."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.errors import StoreBadKey
from valohai_dagster.stores.keys import Wildcard, check_key, has_wildcard


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "a//b",
        "a/",
        "../a",
        "a/../../b",
        "..",
        ".",
        "a/./b",
        "a\0b",
        "\ud800",
        "x" * 256,
        "a/" * 3000 + "b",
    ],
)
def test_malicious_and_impossible_keys_are_refused(key: str) -> None:
    with pytest.raises(StoreBadKey, match=r"is refused: ") as caught:
        check_key(key, store="s")
    assert caught.value.store == "s"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "key", ["a", "a/b.c", "-rf", "a b", "ä/日本", "line\nbreak", "...", "a/..b", "~", "*"]
)
def test_odd_but_harmless_keys_are_kept_as_they_are(key: str) -> None:
    assert check_key(key) == key


@given(st.text())
def test_a_checked_key_never_leaves_its_directory(key: str) -> None:
    import posixpath

    try:
        check_key(key)
    except StoreBadKey:
        return
    assert posixpath.normpath(posixpath.join("/root", key)) == "/root/" + key


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("foo/bar/**.jpg", "foo/bar/ds1/a.jpg", True),
        ("foo/bar/**.jpg", "foo/bar/a.jpg", True),
        ("foo/bar/**.jpg", "foo/bar/a.jpeg", False),
        ("foo/bar/*.jpg", "foo/bar/a.jpg", True),
        ("foo/bar/*.jpg", "foo/bar/ds1/a.jpg", False),
        ("sets/**/*.json", "sets/a/b/c.json", True),
        ("sets/**/*.json", "sets/c.json", True),
        ("sets/**/*.json", "setsc.json", False),
        ("foo/", "foo/a", True),
        ("foo/", "foo/a/b", True),
        ("foo/", "foob/a", False),
        ("", "anything/at/all", True),
        ("a.b", "axb", False),
        ("*", "a\nb", True),
        ("a/[x].jpg", "a/[x].jpg", True),
        ("*/x", "d/x", True),
        ("a***b", "a/x/b", True),
    ],
)
def test_i03_star_stays_on_a_level_and_two_stars_descend(
    pattern: str, key: str, matches: bool
) -> None:
    assert Wildcard(pattern=pattern).matches(key) is matches


@given(st.text("ab/*", max_size=9), st.lists(st.text("aab/\n", max_size=9), max_size=20))
def test_i03_a_pattern_fits_as_its_regular_expression_would(pattern: str, keys: list[str]) -> None:
    """Which is what it means, and too slow to be used."""
    wildcard = Wildcard(pattern=pattern)
    full = pattern + "**" * (not pattern or pattern.endswith("/"))
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    tokens = re.split(r"(\*\*/|\*\*|\*)", re.sub(r"\*{3,}", "**", full))
    meaning = re.compile("".join(meanings.get(t) or re.escape(t) for t in tokens), re.DOTALL)
    for key in keys:
        assert wildcard.matches(key) == bool(meaning.fullmatch(key)), key


@pytest.mark.parametrize("star", ["*", "**", "**/"])
def test_i03_no_pattern_takes_long(star: str) -> None:
    """By trying every way, one key would take longer than any test may."""
    wildcard = Wildcard(pattern="a/" + f"{star}a" * 40 + "**b")
    assert not wildcard.matches("a/" + "a" * 4000)
    assert not wildcard.matches("a/" * 2000)
    assert wildcard.matches("a/" + "a" * 40 + "b")


def test_i03_a_trailing_star_descends_when_directories_are_kept() -> None:
    assert not Wildcard(pattern="foo/bar/*").matches("foo/bar/ds1/a.jpg")
    assert Wildcard(pattern="foo/bar/*", descend_last=True).matches("foo/bar/ds1/a.jpg")
    assert not Wildcard(pattern="foo/bar/*.jpg", descend_last=True).matches("foo/bar/ds1/a.jpg")


@pytest.mark.parametrize(
    ("pattern", "root"),
    [
        ("foo/bar/**.jpg", "foo/bar/"),
        ("foo/bar/pre*.jpg", "foo/bar/"),
        ("foo/*/b/**", "foo/"),
        ("foo/bar/", "foo/bar/"),
        ("*.jpg", ""),
        ("", ""),
    ],
)
def test_i21_the_wildcard_root_is_the_longest_literal_directory(pattern: str, root: str) -> None:
    assert Wildcard(pattern=pattern).root == root


def test_has_wildcard() -> None:
    assert has_wildcard("a/*")
    assert has_wildcard("a/")
    assert not has_wildcard("a/b?[c]")
