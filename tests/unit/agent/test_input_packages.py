"""Which packages a job fetches, and which of its files come out of them (I-09)."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from valohai_agent.input_packages import plan_packages, worthwhile
from valohai_agent.input_plan import InputFile
from valohai_agent.package_files import footprint
from valohai_agent.protocol import Checksums, Job, JobFile, JobPackage


def item(number: int, size: int = 1000, datum: str | None = None) -> InputFile:
    file = JobFile(
        id=f"0.{number}",
        name=str(number),
        uri=f"datum://d{number}",
        size=size,
        datum_id=datum or f"d{number}",
    )
    return InputFile(input="in", file=file, path=PurePosixPath("in") / str(number))


def package(*numbers: int, ident: str = "package.0") -> JobPackage:
    size = footprint(1000) * len(numbers) + 1024
    files = [f"0.{number}" for number in numbers]
    return JobPackage(id=ident, uri=ident, size=size, checksums=Checksums(), files=files)


def test_i09_only_what_is_missing_and_in_the_package_is_wanted_of_it() -> None:
    first, second = package(0, 1, 2), package(3, 4, ident="package.1")
    (planned,) = plan_packages([first, second], [item(0), item(2), item(9)])
    assert planned.item.file.id == "package.0"
    assert list(planned.files) == ["d0", "d2"]
    assert planned.wanted_bytes == 2 * footprint(1000)


def test_i09_one_member_goes_to_every_place_where_its_datum_is_wanted() -> None:
    (planned,) = plan_packages([package(0, 1)], [item(0, datum="d"), item(1, datum="d")])
    assert [one.file.id for one in planned.files["d"]] == ["0.0", "0.1"]
    assert planned.wanted_bytes == footprint(1000)


def test_i09_a_refused_package_is_not_planned() -> None:
    assert plan_packages([package(0)], [item(0)], {"package.0": "given up"}) == []


@pytest.mark.parametrize(
    ("wanted", "cached", "worth"),
    [(4, False, False), (6, False, True), (10, False, True), (1, True, True)],
)
def test_i09_less_than_half_of_a_package_is_fetched_singly(
    wanted: int, cached: bool, worth: bool
) -> None:
    items = [item(number) for number in range(wanted)]
    (planned,) = plan_packages([package(*range(10))], items)
    assert worthwhile(planned, cached=cached) is worth


@pytest.mark.parametrize(("size", "bytes_"), [(0, 512), (1, 1024), (512, 1024), (513, 1536)])
def test_i09_a_file_takes_whole_blocks_of_a_package(size: int, bytes_: int) -> None:
    assert footprint(size) == bytes_


def test_i09_a_job_of_an_earlier_control_plane_has_no_packages() -> None:
    assert Job.model_fields["packages"].get_default(call_default_factory=True) == []
