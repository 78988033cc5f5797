"""Private repositories: the secret reaches the host, and nothing else ever sees it."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.support.git import GitServer, Work, serving
from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.git import is_git_url, split_credentials
from valohai_dagster.projects.project import GitAuth, fetch_project, load_project

TOKEN = "s3cret-token"
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0LWtleQ==\n-----END OPENSSH PRIVATE KEY-----"


def spy_on_git(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `git` first on PATH that writes down its arguments and the arguments of its ancestors' children."""
    import shutil

    real, log = shutil.which("git"), directory / "argv.log"
    script = directory / "bin" / "git"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {log}\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return log


def everything_below(*directories: Path) -> bytes:
    files = [p for directory in directories for p in directory.rglob("*") if p.is_file()]
    return b"".join(path.read_bytes() for path in files)


@pytest.mark.parametrize("in_url", [False, True])
def test_a_token_opens_the_repository_and_leaves_no_trace(
    git_server: GitServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, in_url: bool,
) -> None:  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    store = tmp_path / "stored-credentials"
    (home / ".gitconfig").write_text(f"[credential]\n helper = store --file {store}\n")
    monkeypatch.setenv("HOME", str(home))
    log = spy_on_git(tmp_path, monkeypatch)
    url = f"{git_server.url}/project.git"
    if in_url:
        project = load_project(url.replace("://", f"://git:{TOKEN}@"), cache_dir=cache)
    else:
        project = load_project(url, cache_dir=cache, auth=GitAuth(token=TOKEN))
    fetch_project(project)
    assert list(project.steps) == ["train"]
    assert git_server.expected in git_server.authorizations
    assert project.source.location == url
    argv = log.read_text()
    assert "fetch" in argv
    for place in (argv, repr(project), caplog.text, json.dumps(str(project.source))):
        assert TOKEN not in place
    assert TOKEN.encode() not in everything_below(cache, home)
    assert not store.exists()


def test_a_wrong_token_is_a_clear_error_without_the_token(
    git_server: GitServer, cache: Path
) -> None:
    with pytest.raises(ProjectError) as caught:
        load_project(
            f"{git_server.url}/project.git", cache_dir=cache, auth=GitAuth(token="wr0ng-token")
        )
    assert "check the token or the deploy key" in str(caught.value)
    assert "wr0ng-token" not in str(caught.value)
    assert caught.value.kind == "denied"  # type: ignore[attr-defined]


def test_without_a_token_nobody_is_asked_and_the_error_says_what_to_do(
    git_server: GitServer, cache: Path
) -> None:
    with pytest.raises(ProjectError, match="check the token"):
        load_project(f"{git_server.url}/project.git", cache_dir=cache)


def test_a_redirect_to_another_host_does_not_get_the_token(
    git_server: GitServer, remote: Path, cache: Path
) -> None:
    other = GitServer(remote.parent, "git", TOKEN)
    git_server.redirect_to = other.url.replace("127.0.0.1", "localhost")
    with serving(other), pytest.raises(ProjectError):
        load_project(f"{git_server.url}/project.git", cache_dir=cache, auth=GitAuth(token=TOKEN))
    assert other.authorizations
    assert set(other.authorizations) == {None}


def test_a_submodule_on_another_host_does_not_get_the_token(
    git_server: GitServer, work: Work, remote: Path, cache: Path
) -> None:
    other = GitServer(remote.parent, "git", TOKEN)
    work.write(".gitmodules", f'[submodule "x"]\n path = x\n url = {other.url}/project.git\n')
    work.git("update-index", "--add", "--cacheinfo", f"160000,{work.git('rev-parse', 'HEAD')},x")
    (work.path / "x").mkdir()
    work.git("add", ".gitmodules")
    work.git("commit", "-q", "-m", "module")
    work.git("push", "-q", "origin", "main")
    with serving(other), pytest.raises(ProjectError, match="reading submodules"):
        load_project(f"{git_server.url}/project.git", cache_dir=cache, auth=GitAuth(token=TOKEN))
    assert other.authorizations
    assert set(other.authorizations) == {None}


def test_a_submodule_of_a_remote_cannot_read_this_hosts_files(
    git_server: GitServer, work: Work, remote: Path, cache: Path
) -> None:
    work.write(".gitmodules", f'[submodule "x"]\n path = x\n url = {remote}\n')
    work.git("update-index", "--add", "--cacheinfo", f"160000,{work.git('rev-parse', 'HEAD')},x")
    (work.path / "x").mkdir()
    work.git("add", ".gitmodules")
    work.git("commit", "-q", "-m", "module")
    work.git("push", "-q", "origin", "main")
    with pytest.raises(ProjectError, match="transport 'file' not allowed"):
        load_project(f"{git_server.url}/project.git", cache_dir=cache, auth=GitAuth(token=TOKEN))


@pytest.mark.parametrize(
    "url", ["ext::sh -c touch% /tmp/x", "-oProxyCommand=x:y", "https://host/a b"]
)
def test_addresses_that_run_programs_or_hold_spaces_are_no_sources(url: str, cache: Path) -> None:
    with pytest.raises(ProjectError):
        load_project(url, cache_dir=cache)


# -- SSH ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` that notes its arguments and the key file's content and mode, then serves the repository itself."""
    log = tmp_path / "ssh.json"
    script = tmp_path / "fakebin" / "ssh"
    script.parent.mkdir()
    script.write_text(
        f"""#!{sys.executable}
import json, os, subprocess, sys
arguments = sys.argv[1:]
if "-G" in arguments:
    sys.exit(0)
key = arguments[arguments.index("-i") + 1] if "-i" in arguments else None
with open({str(log)!r}, "a") as file:
    file.write(json.dumps({{
        "argv": arguments,
        "key": open(key).read() if key else None,
        "mode": os.stat(key).st_mode if key else None,
        "environment": dict(os.environ),
    }}) + "\\n")
sys.exit(subprocess.call(["sh", "-c", arguments[-1]]))
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return log


def calls(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("as_text", [True, False])
def test_an_ssh_deploy_key_reaches_ssh_as_a_private_file_only(
    remote: Path, cache: Path, tmp_path: Path, fake_ssh: Path, as_text: bool
) -> None:
    path = tmp_path / "deploy key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    auth = GitAuth(ssh_key=KEY if as_text else path)
    project = load_project(f"ssh://git@example.com{remote}", cache_dir=cache, auth=auth)
    assert list(project.steps) == ["train"]
    for call in calls(fake_ssh):
        argv = call["argv"]
        assert isinstance(argv, list)
        assert call["key"] == KEY + "\n"
        assert stat.S_IMODE(int(str(call["mode"]))) == 0o600
        assert "c2VjcmV0LWtleQ" not in json.dumps([argv, call["environment"]])
        assert {"IdentitiesOnly=yes", "BatchMode=yes", "StrictHostKeyChecking=accept-new"} <= set(
            argv
        )
        if as_text:
            assert not Path(argv[argv.index("-i") + 1]).exists()
    assert b"c2VjcmV0LWtleQ" not in everything_below(cache)
    assert "c2VjcmV0LWtleQ" not in repr(project)


def test_scp_like_addresses_and_known_hosts(
    remote: Path, cache: Path, tmp_path: Path, fake_ssh: Path
) -> None:
    hosts = tmp_path / "my hosts"
    hosts.write_text("")
    auth = GitAuth(ssh_key=KEY, known_hosts=hosts)
    project = load_project(f"git@example.com:{remote}", cache_dir=cache, auth=auth)
    assert project.name == "project"
    argv = calls(fake_ssh)[0]["argv"]
    assert isinstance(argv, list)
    assert "StrictHostKeyChecking=yes" in argv
    assert f'UserKnownHostsFile="{hosts}"' in argv


def test_without_a_key_the_users_own_ssh_is_used_without_questions(
    remote: Path, cache: Path, fake_ssh: Path
) -> None:
    load_project(f"ssh://git@example.com{remote}", cache_dir=cache)
    assert "BatchMode=yes" in str(calls(fake_ssh)[0]["argv"])


def test_a_missing_key_file_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="gone does not exist"):
        load_project(
            "git@example.com:a/b.git", cache_dir=cache, auth=GitAuth(ssh_key=tmp_path / "gone")
        )


# -- addresses ---------------------------------------------------------------------------------------------------


def test_addresses_are_told_from_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (
        "https://h/a.git",
        "ssh://h/a",
        "git@h:a/b.git",
        "git+https://h/a",
        "file:///a",
        "myhost:a/b",
    ):
        assert is_git_url(url)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name").mkdir()
    for path in ("/abs", "rel/dir", ".", "odd:name", "C:\\dir"):
        assert not is_git_url(path)


def test_credentials_leave_the_address() -> None:
    assert split_credentials("https://u:p%40ss@h:1/a.git", None) == (
        "https://h:1/a.git",
        GitAuth(token="p@ss", username="u"),
    )
    assert split_credentials("https://tok@h/a", None) == ("https://h/a", GitAuth(token="tok"))
    own = GitAuth(token="mine")
    assert split_credentials("git+https://u:p@h/a", own) == ("https://h/a", own)
    assert split_credentials("ssh://git@h/a", None) == ("ssh://git@h/a", None)
