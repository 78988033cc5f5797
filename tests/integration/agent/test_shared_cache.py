"""A cache that several machines share (I-34).

No NFS server can run where these tests do. Their share is a directory of another file system (tmpfs), their machines
are work directories with caches of their own. So links, renames and leases are tried for real, what a network does to
them is not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.agent_conductor import Conductor
from tests.support.agent_process import AgentProcess
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.cache import shared
from valohai_agent.cache.leases import Leases
from valohai_agent.cache.local import InputCache, Wanted
from valohai_agent.cache.locks import Waiting
from valohai_agent.cache.shared import Share
from valohai_agent.inputs import InputFetcher, InputOptions
from valohai_agent.protocol import (
    Checksums,
    InputReady,
    InputsReady,
    JobFile,
    JobInput,
    Outcome,
    OutputStored,
    Transfer,
)
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace

if TYPE_CHECKING:
    import docker


@pytest.fixture
def share_dir() -> Iterator[Path]:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("elsewhere: there is no second file system")
    path = Path(tempfile.mkdtemp(prefix="vt-share-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Machine:
    """One worker with its own disk; `downloads` counts what it fetched from the store."""

    def __init__(self, root: Path, share: Share | None) -> None:
        self.root, self.share = root, share
        self.cache = InputCache(root / "cache", usage=lambda path: (0, 10**15))
        self.warnings: list[str] = []
        self.status: list[str] = []
        self.ready: list[InputReady | InputsReady] = []
        self.jobs = 0

    def fetch(self, grants: dict[str, Transfer], *inputs: JobInput, **options: Any) -> Workspace:
        self.jobs += 1
        workspace = Workspace.create(self.root / "work", f"e{self.jobs}", 1, "w")
        in_place = self.share is not None and not self.share.copy
        fetcher = InputFetcher(
            workspace,
            valohai_dir="/valohai",
            transferer=Transferer(attempts=2, sleep=lambda seconds: None),
            options=InputOptions(
                cache=self.cache,
                share=self.share,
                tree=Share.tree if in_place else None,
                **options,
            ),
            status=self.status.append,
            warn=self.warnings.append,
            on_ready=self.ready.append,
        )
        self.content = fetcher.fetch(inputs, grants)
        return workspace

    @property
    def cached(self) -> list[bool]:
        return [one.cached for one in self.ready if isinstance(one, InputReady)]


@pytest.fixture
def machine(tmp_path: Path, share_dir: Path) -> Iterator[Any]:
    made: list[Machine] = []

    def make(directory: Path | None = share_dir, **options: Any) -> Machine:
        share = Share(directory, usage=lambda path: (0, 10**15), **options) if directory else None
        made.append(Machine(tmp_path / f"machine-{len(made)}", share))
        return made[-1]

    yield make
    for one in made:
        one.cache.close()
        if one.share is not None:
            one.share.close()


def store(tmp_path: Path, name: str, data: bytes) -> Transfer:
    path = tmp_path / "store" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return Transfer(url=path.as_uri())


def input_of(*ids: str, name: str = "d", **fields: Any) -> JobInput:
    files = [
        JobFile(**{"id": i, "name": f"sub/{i}", "uri": f"datum://{i}", "datum_id": i, **fields})
        for i in ids
    ]
    return JobInput(name=name, input_id=name, files=files)


def sums(data: bytes) -> Checksums:
    return Checksums(
        md5=hashlib.md5(data).hexdigest(),
        sha1=hashlib.sha1(data).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def publish(share: Share, data: bytes, *names: str) -> Path:
    assert share.trouble() is None
    with share.arrival() as arrived:
        arrived.write_bytes(data)
        wanted = Wanted(names=names)
        return share.publish(wanted, arrived, len(data), sums(data), seconds=1.0).path


# -- what jobs see --------------------------------------------------------------------------------------------------


def test_i34_inputs_are_used_in_place_and_fetched_once_for_all_machines(
    machine: Any, tmp_path: Path
) -> None:
    grants = {"1": store(tmp_path, "1", b"data")}
    first, second = machine(), machine()
    workspace = first.fetch(grants, input_of("1"))
    (tmp_path / "store/1").unlink()
    other = second.fetch(grants, input_of("1"))
    assert (first.cached, second.cached) == ([False], [True])
    for one in (workspace, other):
        placed = one.in_place["d"] / "sub/1"
        assert placed.read_bytes() == b"data"
        assert one.locate("inputs", "d", "sub", "1").status().st_ino == placed.stat().st_ino
        assert os.listdir(one.inputs / "d") == []  # where it is bound
    assert (workspace.in_place["d"] / "sub/1").stat().st_nlink == 3  # the content's and two jobs'
    assert second.content["d"]["files"][0]["path"] == "/valohai/inputs/d/sub/1"
    assert second.status == ["/valohai/inputs/d/sub/1: from cache, 4 B"]
    assert not first.cache.marks()


def test_i34_optionally_inputs_are_copied_to_the_local_disk_first(
    machine: Any, tmp_path: Path, share_dir: Path
) -> None:
    grants = {"1": store(tmp_path, "1", b"data")}
    first, second = machine(copy=True), machine(copy=True)
    first.fetch(grants, input_of("1"))
    (tmp_path / "store/1").unlink()
    workspace = second.fetch(grants, input_of("1"))
    assert second.cached == [True]
    assert not workspace.in_place
    assert (workspace.inputs / "d/sub/1").read_bytes() == b"data"
    shutil.rmtree(share_dir)  # from now on its own disk is enough
    share_dir.mkdir()
    again = second.fetch({}, input_of("1"))
    assert (again.inputs / "d/sub/1").read_bytes() == b"data"


def test_i34_what_a_machine_has_already_needs_no_share(machine: Any, tmp_path: Path) -> None:
    grants = {"1": store(tmp_path, "1", b"data"), "2": store(tmp_path, "2", b"more")}
    alone = machine(None)
    alone.fetch(grants, input_of("1"))
    alone.share = machine().share
    workspace = alone.fetch(grants, input_of("1"), input_of("1", "2", name="both"))
    assert list(workspace.in_place) == ["both"]
    assert (workspace.inputs / "d/sub/1").read_bytes() == b"data"
    assert sorted(os.listdir(workspace.in_place["both"] / "sub")) == ["1", "2"]


def test_files_that_nobody_can_name_lie_on_the_share_for_their_job_alone(
    machine: Any, tmp_path: Path, share_dir: Path
) -> None:
    source = store(tmp_path, "1", b"data")
    one = machine()
    grants = {"1": source, "2": store(tmp_path, "2", b"more")}
    workspace = one.fetch(grants, input_of("1", datum_id=None), input_of("2", name="e"))
    assert (workspace.in_place["d"] / "sub/1").read_bytes() == b"data"
    assert (workspace.in_place["e"] / "sub/2").read_bytes() == b"more"


@pytest.mark.parametrize("copy", [False, True])
def test_i34_bytes_are_published_under_the_version_that_they_have(
    machine: Any, tmp_path: Path, copy: bool
) -> None:
    """Another machine that looks for the version which was looked up before the file changed gets other bytes."""
    now, uri = store(tmp_path, "1", b"data"), "store://x/1"
    changed = (tmp_path / "store/1").stat()
    versions = ["4-17", f"4-{changed.st_mtime_ns}", "4-17"]
    machines = [machine(copy=copy) for _ in versions]
    for one, version in zip(machines, versions, strict=True):
        one.fetch({"1": now}, input_of("1", uri=uri, datum_id=None, cache_key=f"{uri}@{version}"))
    assert [one.cached for one in machines] == [[False], [True], [False]]
    assert {ready.version for one in machines for ready in one.ready} == {versions[1]}


def test_k20_no_data_cache_fetches_again_and_publishes(machine: Any, tmp_path: Path) -> None:
    first, second = machine(), machine()
    old = first.fetch({"1": store(tmp_path, "1", b"old")}, input_of("1"))
    second.fetch({"1": store(tmp_path, "1", b"new")}, input_of("1"), no_cache=True)
    assert (first.fetch({}, input_of("1")).in_place["d"] / "sub/1").read_bytes() == b"new"
    assert (old.in_place["d"] / "sub/1").read_bytes() == b"old"  # that job goes on with it


# -- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_i34_a_share_that_is_away_is_told_and_the_job_goes_the_local_way(
    machine: Any, tmp_path: Path, copy: bool
) -> None:
    one = machine(tmp_path / "not-mounted", copy=copy)
    workspace = one.fetch({"1": store(tmp_path, "1", b"data")}, input_of("1"))
    assert (workspace.inputs / "d/sub/1").read_bytes() == b"data"
    (warning,) = one.warnings
    assert "not-mounted is not used: there is no such directory on this worker" in warning
    assert one.cache.marks()


def test_i34_a_share_that_hangs_counts_as_away(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(shared, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(Share, "_try", lambda self: ended.wait() and None)
    one = machine()
    one.fetch({"1": store(tmp_path, "1", b"data")}, input_of("1"))
    ended.set()
    assert "does not answer" in one.warnings[0]


@pytest.fixture
def tiny_share(share_dir: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = share_dir / "tiny"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("elsewhere: only root can mount a small file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("copy", [False, True])
def test_i34_a_share_that_is_full_is_told_and_the_job_goes_the_local_way(
    machine: Any, tmp_path: Path, tiny_share: Path, copy: bool
) -> None:
    one = machine(tiny_share, copy=copy)
    data = b"x" * 3_000_000
    grants = {"1": store(tmp_path, "1", data), "2": store(tmp_path, "2", b"small")}
    workspace = one.fetch(grants, input_of("1", "2"))
    assert (workspace.inputs / "d/sub/1").read_bytes() == data
    assert (workspace.inputs / "d/sub/2").read_bytes() == b"small"
    assert not workspace.in_place
    assert "is not used" in one.warnings[0]
    assert not list(tiny_share.rglob("*.part"))
    coming = tiny_share / "valohai-cache-1/coming"
    assert not list(coming.iterdir())


def test_a_damaged_content_of_the_share_is_fetched_again(machine: Any, tmp_path: Path) -> None:
    first, second = machine(), machine()
    path = publish(first.share, b"data", "datum:1")
    path.write_bytes(b"dama")
    workspace = second.fetch({"1": store(tmp_path, "1", b"data")}, input_of("1"))
    assert second.cached == [False]
    assert (workspace.in_place["d"] / "sub/1").read_bytes() == b"data"


def test_a_name_on_the_share_that_contradicts_a_checksum_is_dropped(
    machine: Any, tmp_path: Path
) -> None:
    one = machine()
    publish(one.share, b"old", "s3://b/1@1")
    expected = Checksums(sha256=sums(b"new").sha256)
    wanted = Wanted(names=("s3://b/1@1",), checksums=expected)
    assert one.share.find(wanted) is None
    assert one.share.find(Wanted(names=("s3://b/1@1",))) is None
    assert one.share.find(Wanted(names=(f"sha256:{sums(b'old').sha256}",))) is not None


# -- locks and room -------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from valohai_agent.cache.shared import Share
share = Share(Path(sys.argv[1]))
assert share.trouble() is None
with share.fetching("k"), share.arrival() as arrived:
    arrived.write_bytes(b"half")
    print("holding", flush=True)
    time.sleep(600)
"""


def test_i34_a_dead_machines_lock_frees_itself_and_its_half_file_is_swept(
    share_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [sys.executable, "-c", HOLDER, str(share_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        os.kill(holder.pid, signal.SIGKILL)
    share = Share(share_dir, leases=Leases(renew_seconds=0.05, lease_seconds=0.3))
    assert share.trouble() is None
    with share.fetching("k"):
        pass
    root = share_dir / "valohai-cache-1"
    assert not list((root / "locks").iterdir())
    share.sweep()
    assert len(list((root / "coming").iterdir())) == 2  # it may be on its way still
    monkeypatch.setattr(shared, "TREE_SECONDS", -60.0)
    share.sweep()
    assert not list((root / "coming").iterdir())
    share.close()


def test_a_living_holder_keeps_its_lock_for_longer_than_a_lease(share_dir: Path) -> None:
    shares = [
        Share(share_dir, leases=Leases(renew_seconds=0.02, lease_seconds=0.3)) for _ in range(2)
    ]
    assert shares[0].trouble() is None
    order: list[str] = []
    looks: list[float] = []
    with shares[0].fetching("k"):
        waiting = Waiting(check=lambda: looks.append(time.monotonic()))

        def wait() -> None:
            with shares[1].fetching("k", waiting):
                order.append("second")

        thread = threading.Thread(target=wait)
        thread.start()
        while not looks or looks[-1] - looks[0] < 1.0:
            time.sleep(0.02)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    for share in shares:
        share.close()


def test_i34_machines_that_want_the_same_download_it_once(machine: Any, tmp_path: Path) -> None:
    grants = {str(n): store(tmp_path, str(n), b"%d" % n * 50_000) for n in range(5)}
    machines = [machine() for _ in range(4)]
    threads = [
        threading.Thread(target=one.fetch, args=(grants, input_of(*grants))) for one in machines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetched = [cached for one in machines for cached in one.cached]
    assert (len(fetched), fetched.count(False)) == (20, 5)


def test_i35_of_the_share_goes_what_is_cheap_and_old_but_nothing_in_use(
    share_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "IN_VAIN_SECONDS", 0.0)
    used = [0]
    share = Share(share_dir, usage=lambda path: (used[0], 100))
    used_now = publish(share, b"used by a job", "1")
    recent = publish(share, b"used a minute ago", "2")
    idle = publish(share, b"idle", "3")
    tree = share.tree()
    found = share.find(Wanted(names=("1",)))
    assert found is not None
    tree.link(found, PurePosixPath("d/a"))
    for path in (used_now, idle):
        os.utime(path.with_name(f"{path.name}.json"), (1, 1))
    used[0] = 99
    assert share.make_room() == len(b"idle")
    assert [path.exists() for path in (used_now, recent, idle)] == [True, True, False]
    assert share.find(Wanted(names=("3",))) is None
    tree.close()
    os.utime(used_now.with_name(f"{used_now.name}.json"), (1, 1))
    assert share.make_room() == len(b"used by a job")
    share.close()


def test_what_dead_machines_left_on_a_share_is_swept_once_it_is_old(
    share_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(share_dir)
    whole, lost = publish(share, b"whole", "1"), publish(share, b"lost", "2")
    half, bare = publish(share, b"half", "3"), publish(share, b"bare", "4")
    lost.unlink()  # its facts stay
    for path in (half, bare):  # a machine died before it wrote the facts
        path.with_name(f"{path.name}.json").unlink()
    root = share_dir / "valohai-cache-1"
    names = {name: share._name(name) for name in "1234"}
    for path in (whole.with_name(".12ab"), names["1"].with_name(".34cd")):
        path.write_text("hal")
    locks = root / "locks"
    for stray in ("dead", "dead.1234", "dead.aside"):
        (locks / stray).write_text("token")
        os.utime(locks / stray, (1, 1))
    monkeypatch.setattr(shared, "SWEPT_DIRECTORIES", 256)
    share.sweep()
    assert half.exists()  # it may be on its way still
    with share.fetching("5"):
        (held,) = locks.iterdir()
        monkeypatch.setattr(shared, "TREE_SECONDS", -60.0)
        os.utime(held, (2**33, 2**33))  # as its holder moves it
        share.sweep()
        assert list(locks.iterdir()) == [held]
    left = sorted(path.name for path in root.rglob("*") if path.is_file())
    assert left == sorted([whole.name, f"{whole.name}.json", names["1"].name])
    assert share.find(Wanted(names=("1",))) is not None
    share.close()


def test_links_of_a_dead_agents_job_are_swept(
    share_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(share_dir, leases=Leases(renew_seconds=0.02))
    assert share.trouble() is None
    dead, alive = share.tree(), share.tree()
    lease = dead.root.with_suffix(".lease")
    share._leases.let_go(lease)
    os.utime(lease, (1, 1))
    share.sweep()
    assert not dead.root.exists()
    assert alive.root.exists()
    alive.close()
    assert not list((share_dir / "valohai-cache-1/jobs").iterdir())
    share.close()


# -- both runtimes --------------------------------------------------------------------------------------------------


def _run_in_place(
    conductor: Conductor, agent: AgentProcess, tmp_path: Path, share_dir: Path, image: str
) -> None:
    source = tmp_path / "data.csv"
    source.write_text("1,2\n")
    conductor.input_urls = {"f1": source.as_uri(), "f2": source.as_uri()}
    file = JobFile(id="f1", name="sub/data.csv", uri="datum://x", datum_id="x")
    lazy = JobFile(id="f2", name="later.csv", uri="s3://b/x")
    execution_id = conductor.submit(
        "cat /valohai/inputs/train/sub/data.csv",
        "(echo x >> /valohai/inputs/train/sub/data.csv) 2>&1 | grep -c 'Read-only'",
        "(touch /valohai/inputs/train/new) 2>&1 | grep -c 'Read-only'",
        "touch /valohai/inputs/lazy/new",
        "ln -s /valohai/inputs/train/sub/data.csv /valohai/outputs/linked.csv",
        image=image,
        inputs=[
            JobInput(name="train", input_id="i1", files=[file]),
            JobInput(name="lazy", input_id="i2", files=[lazy], download="on-demand"),
        ],
    )
    finished = conductor.finished(execution_id, seconds=90)
    lines = [text for stream, text in conductor.live_lines(execution_id) if stream == "stdout"]
    assert (finished.outcome, finished.reason) == (Outcome.complete, None), agent.log
    assert lines == ["1,2", "1", "1"]
    outputs = conductor.applied(execution_id).bodies(OutputStored)
    assert [(one.name, one.size) for one in outputs] == [("linked.csv", 4)]
    root = share_dir / "valohai-cache-1"
    wait_for(lambda: not list((root / "jobs").iterdir()), what="the end of the job's links")
    (content,) = [
        path for path in (root / "objects").rglob("*") if path.suffix == "" and path.is_file()
    ]
    assert content.read_text() == "1,2\n"


def test_i34_processes_see_inputs_in_place_and_cannot_change_them(
    conductor: Conductor,
    redis_server: RedisServer,
    short_tmp: Path,
    tmp_path: Path,
    share_dir: Path,
    namespaces: None,
) -> None:
    options = ("--shared-cache", str(share_dir))
    agent = AgentProcess(redis_server.unix_url, short_tmp / "work", *options)
    try:
        _run_in_place(conductor, agent, tmp_path, share_dir, "not-used")
    finally:
        agent.stop()


def test_i34_containers_see_inputs_in_place_and_cannot_change_them(
    conductor: Conductor,
    redis_server: RedisServer,
    short_tmp: Path,
    tmp_path: Path,
    share_dir: Path,
    docker_client: docker.DockerClient,
    docker_image: str,
) -> None:
    options = ("--shared-cache", str(share_dir))
    agent = AgentProcess(redis_server.unix_url, short_tmp / "work", *options, runtime="docker")
    try:
        _run_in_place(conductor, agent, tmp_path, share_dir, docker_image)
    finally:
        agent.stop()
