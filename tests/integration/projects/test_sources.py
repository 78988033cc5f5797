"""Projects from directories and Git remotes (T-02, T-03, A-20, A-21, Y-07, Y-17)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.git import YAML, GitServer, Work, serving
from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.project import (
    GitAuth,
    Project,
    fetch_project,
    load_project,
    project_at,
)


def load(source: Path | str, cache: Path, **more: object) -> Project:
    return load_project(source, cache_dir=cache, **more)  # type: ignore[arg-type]


# -- directories -------------------------------------------------------------------------------------------------


def test_a_clean_directory_is_its_head_commit(work: Work, cache: Path) -> None:
    project = load(work.path, cache)
    assert project.commit.identifier == work.git("rev-parse", "HEAD")
    assert (project.commit.ref, project.commit.adhoc) == ("main", False)
    assert (project.name, project.asset_name) == ("my project", "my_project")
    assert list(project.steps) == ["train"]
    assert project.steps["train"].line == 2
    assert project.root == work.path


def test_t03_a_changed_directory_is_ad_hoc_and_equal_trees_are_equal(
    work: Work, cache: Path, tmp_path: Path
) -> None:
    work.write("train.py", "print(2)\n")
    project = load(work.path, cache)
    assert project.commit.adhoc
    assert project.commit.ref == "adhoc"
    assert project.commit.identifier.startswith("~")
    assert len(project.commit.identifier) == 65
    os.utime(work.path / "train.py", (1, 1))
    assert load(work.path, cache).commit == project.commit
    copy = Work(tmp_path / "elsewhere")
    for name in ("train.py", "valohai.yaml"):
        copy.write(name, (work.path / name).read_text())
    assert load(copy.path, tmp_path / "other-cache").commit == project.commit


def test_an_edit_within_the_same_clock_tick_is_seen(work: Work, cache: Path) -> None:
    path = work.write("train.py", "print(2)\n")
    stamp = path.stat().st_mtime_ns
    first = load(work.path, cache).commit
    path.write_text("print(3)\n")
    os.utime(path, ns=(stamp, stamp))
    assert load(work.path, cache).commit != first


@pytest.mark.parametrize("name", ["new.py", "sub/new.py"])
def test_an_untracked_file_makes_the_directory_ad_hoc(work: Work, cache: Path, name: str) -> None:
    work.write(name)
    assert load(work.path, cache).commit.adhoc


def test_untracked_files_that_are_never_packed_keep_the_commit(work: Work, cache: Path) -> None:
    work.write(".gitignore", "build/\n")
    work.write(".vhignore", "data/\n*.tmp\n")
    work.commit()
    work.write(".valohai/state.db")
    work.write("build/x.o")
    work.write("data/big.bin")
    work.write("x.tmp")
    assert not load(work.path, cache).commit.adhoc


def test_a_directory_without_git_or_without_commits_is_ad_hoc(tmp_path: Path, cache: Path) -> None:
    plain = Work(tmp_path / "plain")
    plain.write("valohai.yaml", YAML)
    assert load(plain.path, cache).commit.adhoc
    plain.git("init", "-q")
    assert load(plain.path, cache).commit.adhoc


def test_a_project_below_the_top_of_a_repository(work: Work, cache: Path) -> None:
    work.write("examples/digits/valohai.yaml", YAML.replace("train", "fit"))
    sha = work.commit()
    project = load(work.path / "examples/digits", cache)
    assert (project.name, list(project.steps), project.commit.identifier) == (
        "digits",
        ["fit"],
        sha,
    )
    work.write("elsewhere.py")
    assert not load(work.path / "examples/digits", cache).commit.adhoc
    work.write("examples/digits/here.py")
    assert load(work.path / "examples/digits", cache).commit.adhoc
    assert project_at(project, commit=sha).root.name == "digits"


def test_a_project_that_git_ignores_is_taken_as_it_is(work: Work, cache: Path) -> None:
    work.write(".gitignore", "generated/\n")
    work.commit()
    work.write("generated/valohai.yaml", YAML)
    assert load(work.path / "generated", cache).commit.adhoc


def test_several_projects_have_their_own_names(work: Work, cache: Path) -> None:
    assert load(work.path, cache, name="Other é").asset_name == "Other_e"


def test_a_custom_yaml_path_and_its_mistakes(work: Work, cache: Path) -> None:
    work.write("ml/valohai.yaml", YAML.replace("train", "other"))
    work.commit()
    assert list(load(work.path, cache, yaml_path="ml/valohai.yaml").steps) == ["other"]
    with pytest.raises(ProjectError, match=r"no nope.yaml .*\n.*valohai.yaml"):
        load(work.path, cache, yaml_path="nope.yaml")
    for bad in ("/etc/passwd", "../x.yaml", "a/../../x"):
        with pytest.raises(ProjectError, match="below the project's root"):
            load(work.path, cache, yaml_path=bad)
    (work.path / "link.yaml").symlink_to("/etc/passwd")
    with pytest.raises(ProjectError, match="link"):
        load(work.path, cache, yaml_path="link.yaml")


def test_no_directory_and_no_yaml_are_clear_errors(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ProjectError, match="is no directory"):
        load(tmp_path / "gone", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProjectError, match=r"has no valohai\.yaml"):
        load(tmp_path / "empty", cache)
    Work(tmp_path / "hidden").write("valohai.yaml", YAML)
    (tmp_path / "hidden" / ".vhignore").write_text("*.yaml\n")
    with pytest.raises(ProjectError, match="must be packed"):
        load(tmp_path / "hidden", cache)


def test_a_broken_yaml_lists_every_problem(work: Work, cache: Path) -> None:
    work.write("valohai.yaml", "- step:\n    name: a\n    imge: x\n- step:\n  name: b\n")
    with pytest.raises(ProjectError) as caught:
        load(work.path, cache)
    assert "project `my project`: valohai.yaml of ~" in caught.value.headline
    assert any(p.startswith("line 3:") and "`image`" in p for p in caught.value.problems)
    assert any(p.startswith("line 4:") and "indent" in p for p in caught.value.problems)


def test_a_repository_of_another_user_is_taken_as_it_is_with_gits_reason(
    work: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    from valohai_dagster.projects import git

    monkeypatch.setattr(
        git, "_clean_environment", lambda base: {**base, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    )
    project = load(work.path, cache)
    assert project.commit.adhoc
    assert any("dubious ownership" in problem.message for problem in project.problems)


def test_programs_of_a_local_repository_are_not_run(work: Work, cache: Path) -> None:
    marker = work.path.parent / "ran"
    script = work.path.parent / "program"
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    work.git("config", "core.fsmonitor", str(script))
    work.git("config", "core.hooksPath", str(work.path.parent))
    (work.path.parent / "post-checkout").symlink_to(script)
    marker.unlink(missing_ok=True)  # `git config` itself may have asked the monitor
    project = load(work.path, cache)
    project_at(project, commit="main")
    assert not marker.exists()


# -- other commits -----------------------------------------------------------------------------------------------


def test_y17_another_commit_has_its_own_steps(work: Work, cache: Path) -> None:
    first = work.git("rev-parse", "HEAD")
    work.git("tag", "v1")
    work.write("valohai.yaml", YAML.replace("train", "newer"))
    work.commit()
    project = load(work.path, cache)
    for name in (first, first[:8], "v1"):
        older = project_at(project, commit=name)
        assert (list(older.steps), older.commit.identifier) == (["train"], first)
    assert project_at(project) is project
    assert project_at(project, commit="main") is project
    with pytest.raises(ProjectError, match=r"no branch, tag or commit `nope`"):
        project_at(project, commit="nope")
    with pytest.raises(ProjectError, match=r"has no step `train`.*it has `newer`"):
        project.step("train")


def test_ad_hoc_means_the_directory_as_it_is_now(work: Work, cache: Path) -> None:
    project = load(work.path, cache)
    work.write("valohai.yaml", YAML.replace("train", "edited"))
    now = project_at(project, adhoc=True)
    assert now.commit.adhoc
    assert list(now.steps) == ["edited"]
    with pytest.raises(ProjectError, match="exclude each other"):
        project_at(project, commit="main", adhoc=True)


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("--upload-pack=touch /tmp/x", "is no branch"),
        ("main~1", "is no branch"),
        ("a b", "is no branch"),
        ("~abc", "is ad-hoc"),
        ("library:x/y", "not supported"),
        ("0" * 40, "has no branch, tag or commit"),
    ],
)
def test_odd_revisions_are_refused(remote: Path, cache: Path, revision: str, words: str) -> None:
    with pytest.raises(ProjectError, match=words):
        load(f"file://{remote}", cache, revision=revision)


def test_a_directory_without_git_has_no_commits(tmp_path: Path, cache: Path) -> None:
    plain = Work(tmp_path / "plain")
    plain.write("valohai.yaml", YAML)
    with pytest.raises(ProjectError, match="not under Git"):
        load(plain.path, cache, revision="main")


# -- remotes -----------------------------------------------------------------------------------------------------


def test_a_remote_at_its_default_branch_a_branch_a_tag_and_a_commit(
    work: Work, remote: Path, cache: Path
) -> None:
    first = work.git("rev-parse", "HEAD")
    work.git("checkout", "-q", "-b", "dev/x")
    work.write("valohai.yaml", YAML.replace("train", "devel"))
    second = work.commit()
    work.git("tag", "-a", "-m", "t", "v2")
    work.git("push", "-q", "origin", "dev/x", "v2")
    url = f"file://{remote}"
    project = load(url, cache)
    assert (project.name, project.commit.identifier, project.commit.ref) == (
        "project",
        first,
        "main",
    )
    assert not (project.root / ".git" / "index.lock").exists()
    for revision, ref in (("dev/x", "dev/x"), ("v2", "v2"), (second, None), (second[:10], None)):
        other = load(url, cache, revision=revision)
        assert (other.commit.identifier, other.commit.ref, list(other.steps)) == (
            second,
            ref,
            ["devel"],
        )
    assert load(str(remote), cache).commit.identifier == first


def test_a20_new_commits_appear_only_when_fetched(work: Work, remote: Path, cache: Path) -> None:
    url = f"file://{remote}"
    before = load(url, cache)
    work.write("more.py")
    sha = work.commit()
    work.git("push", "-q", "origin", "main")
    assert load(url, cache).commit == before.commit
    fetched = fetch_project(before)
    assert [(ref.ref, ref.identifier) for ref in fetched] == [("main", sha)]
    assert load(url, cache).commit.identifier == sha
    assert fetch_project(before) == []
    assert fetch_project(load(work.path, cache)) == []


def test_an_unknown_commit_is_looked_for_once_at_the_remote(
    work: Work, remote: Path, cache: Path
) -> None:
    url = f"file://{remote}"
    load(url, cache)
    work.write("more.py")
    sha = work.commit()
    work.git("push", "-q", "origin", "main")
    assert load(url, cache, revision=sha).commit.identifier == sha


def test_a_remote_that_moved_its_branch_back_keeps_commits_that_were_seen(
    work: Work, remote: Path, cache: Path
) -> None:
    first = work.git("rev-parse", "HEAD")
    work.write("more.py")
    second = work.commit()
    work.git("push", "-q", "origin", "main")
    url = f"file://{remote}"
    assert load(url, cache).commit.identifier == second
    work.git("push", "-q", "--force", "origin", f"{first}:main")
    assert load(url, cache, fetch=True).commit.identifier == first
    assert load(url, cache, revision=second).commit.identifier == second


def test_an_unreachable_remote_falls_back_to_what_is_known(remote: Path, cache: Path) -> None:
    auth = GitAuth(token="s3cret-token")
    with serving(GitServer(remote.parent, "git", "s3cret-token")) as server:
        url = f"{server.url}/project.git"
        before = load(url, cache, auth=auth)
    after = load(url, cache, auth=auth, fetch=True)
    assert after.commit == before.commit
    assert any("could not fetch" in problem.message for problem in after.problems)
    with pytest.raises(ProjectError, match="check the address and the network"):
        load(url, cache, auth=auth, revision="other")


def test_missing_and_empty_remotes_say_so(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ProjectError, match="check the address"):
        load(f"file://{tmp_path}/nope.git", cache)
    empty = Work(tmp_path / "empty.git")
    empty.git("init", "-q", "--bare")
    with pytest.raises(ProjectError, match="has no commits yet"):
        load(f"file://{empty.path}", cache)


def test_a_remote_cannot_run_ad_hoc(remote: Path, cache: Path) -> None:
    project = load(f"file://{remote}", cache)
    with pytest.raises(ProjectError, match="cannot run ad-hoc"):
        project_at(project, adhoc=True)


def test_submodules_are_part_of_a_commit(
    work: Work, remote: Path, cache: Path, tmp_path: Path
) -> None:
    library = Work(tmp_path / "library")
    library.git("init", "-q", "-b", "main")
    library.write("lib.py")
    library.commit()
    library.git("clone", "-q", "--bare", ".", str(remote.parent / "library.git"))
    work.git("submodule", "add", "-q", str(remote.parent / "library.git"), "vendor/library")
    work.git("config", "-f", ".gitmodules", "submodule.vendor/library.url", "../library.git")
    work.commit()
    work.git("push", "-q", "origin", "main")
    project = load(f"file://{remote}", cache)
    assert (project.root / "vendor/library/lib.py").is_file()


def test_many_processes_may_load_one_remote_at_once(remote: Path, cache: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        projects = list(pool.map(lambda _: load(f"file://{remote}", cache), range(6)))
    assert len({project.commit.identifier for project in projects}) == 1
    assert len({project.root for project in projects}) == 1
    assert len(list(projects[0].root.parent.iterdir())) == 1
