"""The queue of reports that grows to disk; order is everything."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from valohai_agent.spool import Spool


def drain(spool: Spool) -> list[str]:
    texts = []
    while (text := spool.peek()) is not None:
        texts.append(text)
        spool.pop()
    return texts


def test_texts_come_back_in_order_from_memory_and_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, memory_bytes=100)
    texts = [f"report {n} ä" for n in range(1000)]
    for text in texts:
        spool.append(text)
    assert len(spool) == 1000
    assert drain(spool) == texts
    assert len(spool) == 0


def test_the_file_has_no_name_so_nothing_is_left_behind(tmp_path: Path) -> None:
    spool = Spool(tmp_path, memory_bytes=0)
    spool.append("x")
    assert list(tmp_path.iterdir()) == []
    spool.clear()


def test_a_disk_that_cannot_be_written_means_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing", memory_bytes=0)
    for n in range(5):
        spool.append(str(n))
    assert drain(spool) == list("01234")


def test_one_text_larger_than_the_read_buffer_survives(tmp_path: Path) -> None:
    spool = Spool(tmp_path, memory_bytes=0)
    texts = ["a" * 3_000_000, "b", "c" * 1_500_000]
    for text in texts:
        spool.append(text)
    assert drain(spool) == texts


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.none(), st.text(alphabet="abc", max_size=40)), max_size=200))
@example(["a" * 40, "b" * 40, "", None, None, "c"])
def test_any_mix_of_adding_and_removing_keeps_the_order(steps: list[str | None]) -> None:
    """A None takes one text out."""
    spool, model = Spool(Path("/tmp"), memory_bytes=50), []
    for step in steps:
        if step is None:
            expected = model.pop(0) if model else None
            assert spool.peek() == expected
            if expected is not None:
                spool.pop()
        else:
            spool.append(step)
            model.append(step)
    assert drain(spool) == model
