"""Which packages bring the files of an input, when its execution is created (I-09)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from valohai_agent.protocol import Checksums, JobPackage
from valohai_dagster.data import packages
from valohai_dagster.data.datasets import DatasetVersion
from valohai_dagster.data.packages import Package


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A package as a file of its version knows it."""

    package: Package
    name: str  # for messages


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """What is known of the packages of one version. `warning`: why some or all are missing although somebody wants them."""

    by_datum: Mapping[str, Ref] = field(default_factory=dict)
    warning: str | None = None


def look_up(connection: sa.Connection, version: DatasetVersion) -> Packaged:
    known = packages.packaging_of(connection, version.id)
    if known is None or known.state == packages.DROPPED:
        return Packaged()
    warning = _warning(version, known)
    if known.state not in (packages.MADE, packages.FAILED):
        return Packaged(warning=warning)
    found = packages.packages_of(connection, version.id)
    usable = packages.usable(connection, [one.id for one in found])
    refs = {
        one.id: Ref(package=one, name=f"{version.uri}, package {number} of {len(found)}")
        for number, one in enumerate(found, 1)
        if one.id in usable
    }
    members = packages.members_of(connection, version.id)
    return Packaged(
        by_datum={i: refs[package] for i, package in members.items() if package in refs},
        warning=warning,
    )


def of_files(packed: Iterable[tuple[str, Ref]]) -> dict[str, tuple[Ref, list[str]]]:
    """By the id that the job knows it by: each package once, with the ids of the job's files that are in it."""
    found: dict[str, tuple[Ref, list[str]]] = {}
    for file_id, ref in packed:
        found.setdefault(ref.package.id, (ref, []))[1].append(file_id)
    return {f"package.{number}": pair for number, pair in enumerate(found.values())}


def job_package(ident: str, ref: Ref, files: list[str]) -> JobPackage:
    package = ref.package
    checksums = Checksums(sha256=package.sha256)
    return JobPackage(id=ident, uri=ref.name, size=package.size, checksums=checksums, files=files)


def _warning(version: DatasetVersion, known: packages.Packaging) -> str | None:
    """Nothing to warn of while the packages are just being written."""
    if known.problem is None:
        return None
    if known.state == packages.FAILED:
        again = f"`valohai-dagster data datasets packaging {version.dataset}/{version.name} on` tries again"
        what = f"could not be packed; {again}"
    else:
        what = "cannot be packed for now, which is tried again"
    return f"{version.uri} {what}. Files that are in no package are fetched one by one. The cause: {known.problem}"
