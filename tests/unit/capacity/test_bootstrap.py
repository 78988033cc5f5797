"""What new machines run first, which agents are too old, and what an agent file is made of."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from valohai_agent.machine.messages import AgentFile
from valohai_agent.machine.one_file import _trusted
from valohai_agent.version import __version__
from valohai_dagster.capacity.bootstrap.agent_file import (
    TAGS,
    build,
    describe,
    requirements_for,
)
from valohai_dagster.capacity.bootstrap.joining import agent_options
from valohai_dagster.capacity.bootstrap.releases import is_outdated
from valohai_dagster.capacity.bootstrap.user_data import bootstrap_of, user_data
from valohai_dagster.errors import RefusedError
from valohai_dagster.settings_groups import (
    AnyGroupSettings,
    AwsGroupSettings,
    DockerGroupSettings,
    GcpGroupSettings,
    StaticGroupSettings,
)

RELEASE = AgentFile(version="1.2.3", sha256="a" * 64, size=1, url="https://b.example/f?sig=1&x='2'")


def script(group: AnyGroupSettings, *, name: str = "gpu", token: str = "vhj_t") -> str:
    wanted = bootstrap_of(
        name, group, join_url="https://control.example", token=token, release=RELEASE
    )
    return user_data(wanted)


def values_of(text: str) -> dict[str, str]:
    """The script's own reading of its variables."""
    head = text.partition("\nhome=")[0]
    names = ("group", "cloud", "docker", "gpus", "give_up_seconds", "agent_url", "token")
    shown = "; ".join(f'printf "%s\\n" "${name}"' for name in names)
    done = subprocess.run(
        ["sh", "-c", f"{head}\n{shown}"], capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def test_the_script_is_what_a_shell_reads_and_knows_its_values() -> None:
    group = AwsGroupSettings(
        kind="aws",
        instance_type="g5.xlarge",
        gpus=1,
        boot_seconds=300,
        dead_man_seconds=900,
        bootstrap_extra="mount /data\ncat <<EOF\n$x\nEOF",
    )
    text = script(group, name="a b'c")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    values = values_of(text)
    assert values["group"] == "a b'c"
    assert values["agent_url"] == RELEASE.url
    assert (values["cloud"], values["docker"], values["gpus"]) == ("aws", "yes", "yes")
    assert values["give_up_seconds"] == "900"
    assert "\nmount /data\ncat <<EOF\n" in text


@pytest.mark.parametrize(
    ("group", "cloud", "docker", "give_up"),
    [
        (AwsGroupSettings(kind="aws", instance_type="t", runtime="process"), "aws", "", "3600"),
        (DockerGroupSettings(kind="docker", image="i"), "", "", "3600"),
        (StaticGroupSettings(kind="static"), "", "yes", "0"),
        (StaticGroupSettings(kind="static", runtime="process"), "", "", "0"),
    ],
)
def test_what_a_machine_needs_follows_from_its_group(
    group: AnyGroupSettings, cloud: str, docker: str, give_up: str
) -> None:
    values = values_of(script(group))
    assert (values["cloud"], values["docker"], values["give_up_seconds"]) == (
        cloud,
        docker,
        give_up,
    )


def test_no_message_shows_the_token_or_the_signed_address() -> None:
    wanted = bootstrap_of(
        "g",
        StaticGroupSettings(kind="static"),
        join_url="https://c",
        token="vhj_secret",
        release=RELEASE,
    )
    assert "vhj_secret" not in repr(wanted)
    assert "sig=1" not in repr(wanted)


@pytest.mark.parametrize(
    ("worker", "release", "outdated"),
    [
        ("0.1.0", None, False),
        ("0.1.0", "0.1.4", False),
        ("0.1.0", "0.2.0", False),
        ("0.1.0", "0.3.0", True),
        ("0.3.0", "0.1.0", True),
        ("1.9.0", "2.0.0", True),
        ("1.0.0.dev1", "1.0.0", False),
        ("of my own", "1.0.0", False),
    ],
)
def test_agents_one_minor_version_apart_may_stay(
    worker: str, release: str | None, outdated: bool
) -> None:
    assert is_outdated(worker, release) is outdated


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_same_sources_give_the_same_file(tmp_path: Path) -> None:
    def install(tag: str, folder: Path) -> None:
        (folder / "everywhere.py").write_text("same")
        (folder / "compiled.so").write_text(tag)
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").write_text(str(tmp_path))

    first, second = (
        build(tmp_path / name, tags=("cp311-x86_64", "cp312-aarch64"), install=install)
        for name in ("a.pyz", "b.pyz")
    )
    assert first == second
    assert (first.version, first.platforms) == (__version__, ("cp311-x86_64", "cp312-aarch64"))
    with zipfile.ZipFile(tmp_path / "a.pyz") as archive:
        index = json.loads(archive.read("index.json"))
    assert "everywhere.py" in index["common"]
    assert "valohai_agent/cli.py" in index["common"]
    assert all(set(tree) == {"compiled.so"} for tree in index["trees"].values())


def test_what_is_no_agent_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.zip"
    other.write_bytes(b"no zip")
    with pytest.raises(RefusedError, match="is no agent file"):
        describe(other)


@pytest.mark.parametrize("tag", TAGS)
def test_every_dependency_is_pinned_by_hash_for_every_platform(tag: str) -> None:
    digits, _, cpu = tag.removeprefix("cp").partition("-")
    lines = requirements_for(f"3.{digits[1:]}", cpu).splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"pydantic-core", "redis", "pynacl", "docker", "virtualenv", "typer"} <= set(names)
    assert not {"colorama", "pywin32"} & set(names)
    assert all(" --hash=sha256:" in line and ";" not in line for line in lines)


def test_what_others_could_have_written_is_not_run(tmp_path: Path) -> None:
    tree = tmp_path / "unpacked" / "tree"
    tree.mkdir(parents=True)
    for path in (tree, tree.parent):
        path.chmod(0o755)
    assert _trusted(str(tree))
    tree.parent.chmod(0o777)
    assert not _trusted(str(tree))
    assert not _trusted(str(tmp_path / "none"))


def test_l30_agents_of_a_cloud_are_told_whose_notices_to_look_for() -> None:
    aws = AwsGroupSettings(kind="aws", instance_type="p3.2xlarge")
    gcp = GcpGroupSettings(kind="gcp", instance_type="n1-standard-4", project="p", region="r")
    static = StaticGroupSettings(kind="static")
    told = [agent_options(group).get("VALOHAI_AGENT_CLOUD") for group in (aws, gcp, static)]
    assert told == ["aws", "gcp", None]
