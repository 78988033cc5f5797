"""The commit that a launch runs, found without user code: records, mirrors, directories."""

from __future__ import annotations

import itertools
import shutil
import tarfile
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.git import YAML, Work
from valohai_agent.protocol import utcnow
from valohai_dagster.data import own_uploads
from valohai_dagster.errors import ProjectError
from valohai_dagster.executions import archives
from valohai_dagster.executions.archives import choose_commit
from valohai_dagster.executions.ledger import ensure_commit, ensure_project
from valohai_dagster.executions.retention import carry_out, plan_records
from valohai_dagster.executions.spec import StepConfig
from valohai_dagster.plugin import commits
from valohai_dagster.plugin.commits import LaunchCommit, commit_for, publish_commit
from valohai_dagster.plugin.step_tag import StepTag, read_step_tag, step_tag
from valohai_dagster.projects.project import load_project
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_retention import RetentionSettings
from valohai_dagster.stores.registry import open_stores


class Conductor:
    """The part that looks for commits, with its own state: another host than the one that loaded the project."""

    def __init__(self, root: Path, *, shared: bool, **more: Any) -> None:
        values: dict[str, Any] = {
            "state_dir": root,
            "redis_url": "redis://redis.example" if shared else None,
            **more,
        }
        self.settings = Settings(**values)
        self.records: Records = open_records(self.settings)
        self.stores = open_stores(self.settings)

    def find(self, tag: StepTag, **config: Any) -> LaunchCommit:
        return commit_for(
            tag,
            StepConfig(**config),
            records=self.records,
            stores=self.stores,
            settings=self.settings,
        )

    def content(self, found: LaunchCommit, name: str) -> str:
        store = self.stores[found.commit.archive_store]
        with store.open(found.commit.archive_key) as file, tarfile.open(fileobj=file) as archive:
            member = archive.extractfile(name)
            assert member is not None
            return member.read().decode()


@pytest.fixture
def conductor(tmp_path: Path) -> Iterator[Conductor]:
    found = Conductor(tmp_path / "state", shared=False)
    yield found
    found.records.close()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Conductor]:
    found = Conductor(tmp_path / "shared", shared=True)
    yield found
    found.records.close()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    work = Work(tmp_path / "digits")
    work.git("init", "-q", "-b", "main")
    work.write("valohai.yaml", YAML)
    work.write("train.py", "print(1)\n")
    work.commit()
    return work


def tag_of(source: Path | str, tmp_path: Path, **options: Any) -> StepTag:
    """As a code server writes it into its assets."""
    project = load_project(source, name="digits", cache_dir=tmp_path / "code-server", **options)
    tag = step_tag(project, project.step("train"), code_version="v")
    return read_step_tag(tag.to_text())


def remote(work: Work) -> str:
    """The repository as a bare one, which is read like a Git URL."""
    bare = work.path.parent / "remote.git"
    if not bare.exists():
        work.git("clone", "-q", "--bare", str(work.path), str(bare))
        work.git("remote", "add", "origin", str(bare))
    work.git("push", "-q", "origin", "HEAD")
    return str(bare)


def test_a_directory_runs_as_it_is_now_in_the_embedded_default(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(work.path, tmp_path)
    first = conductor.find(tag)
    assert first.commit.identifier == tag.commit.identifier
    assert first.tag is tag
    assert not first.warnings
    work.write("train.py", "print(2)\n")
    second = conductor.find(tag)
    assert second.commit.identifier.startswith("~")
    assert conductor.content(second, "train.py") == "print(2)\n"
    assert "the directory changed since the project was loaded" in second.warnings[0]
    assert second.tag.commit.identifier == second.commit.identifier


def test_steps_are_those_of_the_commit_that_runs(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(work.path, tmp_path)
    work.write("valohai.yaml", YAML.replace("default: 3", "default: 9"))
    newer = work.commit()
    work.write("valohai.yaml", YAML.replace("default: 3", "default: 11"))
    found = conductor.find(tag, commit=newer)
    assert found.tag.step.step.parameters["epochs"].default == 9
    assert found.tag.asset_key == tag.asset_key
    assert not found.warnings
    adhoc = conductor.find(tag, adhoc=True)
    assert adhoc.commit.adhoc
    assert adhoc.tag.step.step.parameters["epochs"].default == 11


def test_a_shared_deployment_runs_what_its_code_location_loaded(
    shared: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(work.path, tmp_path)
    work.write("train.py", "print(2)\n")
    found = shared.find(tag)
    assert found.commit.identifier == tag.commit.identifier
    assert shared.content(found, "train.py") == "print(1)\n"


@pytest.mark.parametrize("dirty", [False, True])
def test_a_published_commit_needs_no_source(
    shared: Conductor, work: Work, tmp_path: Path, dirty: bool
) -> None:
    if dirty:
        work.write("train.py", "print(2)\n")
    project = load_project(work.path, name="digits", cache_dir=tmp_path / "code-server")
    tag = step_tag(project, project.step("train"), code_version="v")
    published = publish_commit(project, shared.settings)
    shutil.rmtree(work.path)
    found = shared.find(tag)
    assert found.commit == published
    assert found.commit.adhoc is dirty


def test_a_commit_that_ran_before_needs_no_source(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(remote(work), tmp_path)
    first = conductor.find(tag)
    with conductor.records.write() as connection:
        project = ensure_project(connection, "digits", utcnow())
        ensure_commit(connection, project, first.commit, utcnow())
    commits._CACHES.clear()
    shutil.rmtree(tmp_path / "remote.git")
    shutil.rmtree(conductor.settings.state_dir / "projects")
    assert conductor.find(tag).commit == first.commit


@pytest.mark.parametrize("source_is_there", [False, True])
def test_a_commit_follows_the_code_store_when_another_one_is_chosen(
    shared: Conductor, work: Work, tmp_path: Path, source_is_there: bool
) -> None:
    tag = tag_of(remote(work), tmp_path)
    first = shared.find(tag)
    commits._CACHES.clear()
    if source_is_there:  # and the archive is not
        shared.stores.code.delete(first.commit.archive_key)
    else:
        shutil.rmtree(tmp_path / "remote.git")
        shutil.rmtree(shared.settings.state_dir / "projects")
    later = Conductor(
        shared.settings.state_dir,
        shared=True,
        stores={"other": {"kind": "local", "path": tmp_path / "other"}},
        code_store="other",
    )
    found = later.find(tag)
    assert found.commit.archive_store == "other"
    assert later.content(found, "train.py") == "print(1)\n"
    commits._CACHES.clear()
    assert later.find(tag).commit == found.commit
    chosen = choose_commit(later.records, "digits", tag.commit.identifier, utcnow())
    assert chosen is not None
    assert chosen.archive_store == "other"
    later.records.close()


def test_a_remotes_commit_is_fetched_and_stays_known(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(remote(work), tmp_path)
    work.write("train.py", "print(2)\n")
    work.commit()
    remote(work)
    first = conductor.find(tag)
    assert first.commit.identifier == tag.commit.identifier
    assert conductor.content(first, "train.py") == "print(1)\n"
    shutil.rmtree(tmp_path / "remote.git")
    assert conductor.find(tag).commit == first.commit


def test_a_branch_of_a_remote_runs_with_its_steps(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(remote(work), tmp_path)
    work.git("switch", "-q", "-c", "deeper")
    work.write("valohai.yaml", YAML.replace("default: 3", "default: 30"))
    deeper = work.commit()
    remote(work)
    found = conductor.find(tag, commit="deeper")
    assert found.commit.identifier == deeper
    assert found.tag.step.step.parameters["epochs"].default == 30


def test_a_source_that_is_elsewhere_is_named_with_what_to_do(
    shared: Conductor, work: Work, tmp_path: Path
) -> None:
    tag = tag_of(work.path, tmp_path)
    shutil.rmtree(work.path)
    with pytest.raises(ProjectError) as caught:
        shared.find(tag)
    text = str(caught.value)
    for part in (
        str(work.path),
        tag.commit.identifier,
        "reload the code location",
        "valohai/engine",
    ):
        assert part in text


def test_commit_and_adhoc_exclude_each_other(
    conductor: Conductor, work: Work, tmp_path: Path
) -> None:
    with pytest.raises(ProjectError, match="exclude each other"):
        conductor.find(tag_of(work.path, tmp_path), commit="main", adhoc=True)


def test_an_unchanged_directory_is_read_once(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "SETTLED_NS", 0)
    tag = tag_of(work.path, tmp_path)
    first = conductor.find(tag)
    monkeypatch.setattr(commits, "load_project", None)
    assert conductor.find(tag).commit == first.commit
    work.write("train.py", "print(2)\n")
    with pytest.raises(TypeError):
        conductor.find(tag)


def test_a_directory_that_has_just_changed_is_read_again(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = tag_of(work.path, tmp_path)
    conductor.find(tag)
    monkeypatch.setattr(commits, "load_project", None)
    with pytest.raises(TypeError):
        conductor.find(tag)


def test_an_archive_that_the_store_lost_is_built_again(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "SETTLED_NS", 0)
    monkeypatch.setattr(commits, "TRUSTED_SECONDS", 0)
    tag = tag_of(work.path, tmp_path)
    found = conductor.find(tag)
    conductor.stores.code.delete(found.commit.archive_key)
    assert conductor.content(conductor.find(tag), "train.py") == "print(1)\n"


def test_many_launches_at_once_build_one_archive(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    publish = commits.publish_archive

    def counted(*given: Any, **named: Any) -> Any:
        built.append(1)
        return publish(*given, **named)

    monkeypatch.setattr(commits, "publish_archive", counted)
    tag, found = tag_of(remote(work), tmp_path), list[str]()
    threads = [
        threading.Thread(target=lambda: found.append(conductor.find(tag).commit.identifier))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tag.commit.identifier] * 8
    assert len(built) == 1


# -- retention -----------------------------------------------------------------------------------------------------

RETAIN = RetentionSettings(code_days=7)
MUCH_LATER = utcnow() + timedelta(days=30)


def old_and_new(conductor: Conductor, work: Work, tmp_path: Path) -> StepTag:
    """The older one of two commits that have run."""
    old = tag_of(remote(work), tmp_path)
    conductor.find(old)
    work.write("train.py", "print(2)\n")
    newer = work.commit()
    remote(work)
    conductor.find(old, commit=newer)
    return old


@pytest.fixture
def much_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes at each look at the clock."""
    seconds = itertools.count()
    monkeypatch.setattr(commits, "utcnow", lambda: MUCH_LATER + timedelta(seconds=next(seconds)))
    monkeypatch.setattr(commits, "TRUSTED_SECONDS", -1)


@pytest.mark.parametrize("kind", ["conductor", "shared"])
@pytest.mark.usefixtures("much_later")
def test_a_launch_that_begins_after_the_plan_keeps_its_archive(
    request: pytest.FixtureRequest,
    kind: str,
    work: Work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no execution yet."""
    conductor: Conductor = request.getfixturevalue(kind)
    tag = old_and_new(conductor, work, tmp_path)
    plan = plan_records(conductor.records, RETAIN, MUCH_LATER + timedelta(days=8))
    assert [item.name for item in plan.of("code")] == [f"commit {tag.commit.identifier[:13]}"]
    later = MUCH_LATER + timedelta(days=8)
    monkeypatch.setattr(commits, "utcnow", lambda: later)
    found = conductor.find(tag)
    done = carry_out(conductor.records, conductor.stores, RETAIN, plan, later)
    assert done.counts["code"] == 0
    assert conductor.content(found, "train.py") == "print(1)\n"


@pytest.mark.usefixtures("much_later")
def test_a_launch_in_the_middle_of_a_removal_publishes_under_another_key(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is still in the store when the launch looks, and is deleted then."""
    tag = old_and_new(conductor, work, tmp_path)
    later = MUCH_LATER + timedelta(days=8)
    plan = plan_records(conductor.records, RETAIN, later)
    found: list[LaunchCommit] = []
    delete = conductor.stores.code.delete

    def meanwhile(key: str) -> None:
        commits._CACHES.clear()
        found.append(conductor.find(tag))
        delete(key)

    monkeypatch.setattr(conductor.stores.code, "delete", meanwhile)
    carry_out(conductor.records, conductor.stores, RETAIN, plan, later)
    assert found[0].commit.archive_key.endswith("-1.tar.gz")
    assert conductor.content(found[0], "train.py") == "print(1)\n"
    assert conductor.find(tag).commit == found[0].commit
    keys = [item.key for item in conductor.stores.code.list("commits/")]
    assert len(keys) == 2  # with that of the newest commit


@pytest.mark.usefixtures("much_later")
def test_an_archive_that_another_commit_is_about_to_share_stays(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention comes right after the launch has found it in the store, and does all it does before the launch goes on."""
    tag = old_and_new(conductor, work, tmp_path)
    work.write("train.py", "print(1)\n")
    same = work.commit()
    remote(work)
    later = MUCH_LATER + timedelta(days=8)
    plans = [plan_records(conductor.records, RETAIN, later)]
    assert [item.name for item in plans[0].of("code")] == [f"commit {tag.commit.identifier[:13]}"]
    stat = conductor.stores.code.stat

    def meanwhile(key: str) -> Any:
        found = stat(key)
        if plans:
            carry_out(conductor.records, conductor.stores, RETAIN, plans.pop(), later)
        return found

    monkeypatch.setattr(conductor.stores.code, "stat", meanwhile)
    monkeypatch.setattr(commits, "utcnow", lambda: later)
    found = conductor.find(tag, commit=same)
    assert plans == []
    assert found.commit.identifier != tag.commit.identifier
    assert conductor.content(found, "train.py") == "print(1)\n"
    assert len(list(conductor.stores.code.list("commits/"))) == 2


@pytest.mark.usefixtures("much_later")
def test_a_removal_between_upload_and_record_makes_the_launch_upload_again(
    conductor: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same content belongs to a commit that goes."""
    tag = tag_of(remote(work), tmp_path)
    calls: list[str] = []

    def removed(archive: Any, store: Any, key: str) -> Any:
        published = publish(archive, store, key)
        if not calls:
            with conductor.records.write() as conn:
                place = {"kind": "code", "name": "same", "store": store.name, "key": key}
                own_uploads.note_removal(conn, **place, now=utcnow())
        calls.append(key)
        return published

    publish = archives.publish
    monkeypatch.setattr(archives, "publish", removed)
    found = conductor.find(tag)
    assert calls == [calls[0], found.commit.archive_key]
    assert calls[0] != calls[1]


# -- code servers --------------------------------------------------------------------------------------------------


def test_a_code_server_publishes_what_it_loads_in_a_shared_deployment(
    shared: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valohai_dagster import load_valohai_project
    from valohai_dagster.plugin import assets

    monkeypatch.setenv("VALOHAI_STATE", str(shared.settings.state_dir))
    monkeypatch.setenv("VALOHAI_REDIS_URL", "redis://redis.example")
    load_valohai_project(work.path, name="digits", cache_dir=tmp_path / "c")
    monkeypatch.setattr(assets, "is_first_load", lambda: True)
    load_valohai_project(work.path, name="digits", cache_dir=tmp_path / "c")
    (thread,) = [one for one in threading.enumerate() if one.name == "publish digits"]
    thread.join()
    head = work.git("rev-parse", "HEAD")
    assert choose_commit(shared.records, "digits", head, utcnow()) is not None


def test_publishing_waits_for_the_parts_that_are_not_up_yet(
    shared: Conductor, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_project(work.path, name="digits", cache_dir=tmp_path / "c")
    tries: list[int] = []
    publish = commits.publish_commit

    def late(*given: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("not up yet")
        return publish(*given)

    monkeypatch.setattr(commits, "publish_commit", late)
    commits._publish_patiently(project, shared.settings, pauses=(0, 0, 0))
    assert len(tries) == 3
    assert shared.find(step_tag(project, project.step("train"), code_version="v")).commit
