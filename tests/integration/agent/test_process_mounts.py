"""Mounts of the process runtime (K-58): bound where the machine can, else refused by name before the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.agent_conductor import Conductor
from tests.support.agent_process import AgentProcess
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import JobMount, Outcome
from valohai_agent.runtimes import namespace
from valohai_agent.runtimes.mount_checks import first_problem
from valohai_agent.runtimes.namespace import Bind


@pytest.mark.parametrize(
    ("source", "destination", "kind", "words"),
    [
        ("{tmp}/absent", "/data", None, "does not exist on this machine"),
        ("relative", "/data", None, "no absolute path"),
        ("{tmp}", "/usr/no-such-directory", None, "/usr/no-such-directory is no directory"),
        ("{tmp}", "data", None, "no absolute path below /"),
        ("{tmp}", "/valohai/inputs", None, "would hide a directory of the job"),
        ("{tmp}/file", "/usr", None, "the source is a file"),
        ("server:/share", "/data", "nfs", "type is 'nfs'"),
    ],
)
def test_k58_a_mount_that_cannot_be_bound_is_named_with_the_next_step(
    tmp_path: Path, source: str, destination: str, kind: str | None, words: str
) -> None:
    (tmp_path / "file").touch()
    source = source.format(tmp=tmp_path)
    problem = first_problem([JobMount(source=source, destination=destination, type=kind)]) or ""
    assert problem.startswith(f"The mount of {source} at {destination} cannot be made")
    assert words in problem
    assert problem.endswith("or run the step on a worker with Docker.")


@pytest.mark.parametrize("destination", ["/no-such-directory-here/a/b", "/valohai/data", "/usr"])
def test_k58_what_can_be_bound_is_no_problem(tmp_path: Path, destination: str) -> None:
    assert first_problem([JobMount(source=str(tmp_path), destination=destination)]) is None


def test_the_entry_names_the_bind_that_failed(tmp_path: Path, namespaces: None) -> None:
    bind = Bind(source=str(tmp_path / "absent"), target="/valohai/x")
    argv = namespace.prepare(tmp_path, [bind], ["/bin/true"], cwd="/")
    assert "absent could not be bound to /valohai/x" in (namespace._probe(argv, tmp_path) or "")


@pytest.fixture
def start(
    short_tmp: Path, redis_server: RedisServer, namespaces: None, request: pytest.FixtureRequest
) -> Callable[[], None]:
    def start() -> None:
        agent = AgentProcess(redis_server.unix_url, short_tmp / "work")
        request.addfinalizer(agent.stop)

    return start


def test_k58_a_job_with_such_a_mount_fails_before_it_begins(
    conductor: Conductor, start: Callable[[], None], tmp_path: Path
) -> None:
    start()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("from the mount")
    good = JobMount(source=str(tmp_path / "data"), destination="/no-such-directory-here/data")
    bad = JobMount(source=str(tmp_path / "data"), destination="/usr/no-such-directory")
    works = conductor.submit(
        "cat /no-such-directory-here/data/x", mounts=[good], mounts_allowed=True
    )
    fails = conductor.submit("true", mounts=[good, bad], mounts_allowed=True)
    assert conductor.finished(works).outcome is Outcome.complete
    assert conductor.stored_log(works, "stdout") == b"from the mount"
    finished = conductor.finished(fails)
    assert (finished.outcome, finished.exit_code) == (Outcome.error, None)
    assert f"{bad.source} at {bad.destination}" in (finished.reason or "")
    assert "exit code" not in (finished.reason or "")
