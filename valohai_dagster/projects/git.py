"""Running git: one place that decides its environment, hides its secrets and explains its failures.

Secrets go to git through environment variables of that one process and a script that reads them, or through a key file
that lives as long as the command. They are in no argument list, no git configuration and no message. Git asks
for a password by naming the host; the script answers for the project's own host only, so that a submodule or a redirect
elsewhere learns nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from valohai_dagster.errors import ProjectError

LOCAL_SECONDS = 120.0
NETWORK_SECONDS = 900.0

_ASKPASS = """#!/bin/sh
# Answers git's questions for one host from its environment. Holds no secret.
case "$1" in
  "Username for '$VALOHAI_GIT_SCHEME://$VALOHAI_GIT_HOST': ") printf '%s\\n' "$VALOHAI_GIT_USERNAME" ;;
  "Password for '$VALOHAI_GIT_SCHEME://"*"@$VALOHAI_GIT_HOST': ") printf '%s\\n' "$VALOHAI_GIT_TOKEN" ;;
  *) exit 1 ;;
esac
"""

_SETTINGS = {  # beat every configuration file
    "core.hooksPath": os.devnull,  # a repository must not run programs on this host
    "core.fsmonitor": "false",
    "core.autocrlf": "false",  # the same commit is the same archive everywhere
    "gc.auto": "0",  # checkouts borrow objects from the mirror
    "maintenance.auto": "false",
    "advice.detachedHead": "false",
}

Kind = Literal["denied", "unreachable", "missing", "other"]
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"authentication failed|could not read (username|password)|permission denied|access denied|\b40[13]\b|host key verification failed", "denied"),
    (r"could not resolve|connection (refused|timed out|reset)|failed to connect|couldn't connect|network is unreachable|timed out|no route to host", "unreachable"),
    (r"not found|does not exist|does not appear to be a git repository|no such file", "missing"),
)  # fmt: skip
_NEXT_STEP: dict[Kind, str] = {
    "denied": "check the token or the deploy key of this project, and that it may read the repository",
    "unreachable": "check the address and the network, then fetch again",
    "missing": "check the address; many hosts also say `not found` when a credential is missing",
    "other": "try the same with `git ls-remote`",
}


class GitError(ProjectError):
    """A git command that failed; `kind` tells whether trying again later can help (`unreachable`)."""

    def __init__(
        self, headline: str, problems: Sequence[str] = (), *, kind: Kind = "other"
    ) -> None:
        super().__init__(headline, problems)
        self.kind: Kind = kind


@dataclass(frozen=True, kw_only=True)
class GitAuth:
    """How to reach a private repository. Secrets never appear in argv, git configuration, logs or reprs."""

    token: str | None = field(default=None, repr=False)
    username: str = "git"  # sent with the token; most hosts take any name
    ssh_key: Path | str | None = field(default=None, repr=False)  # a path, or the key's text
    known_hosts: Path | None = (
        None  # None: a host is trusted on first use and remembered in the cache
    )

    def secrets(self) -> tuple[str, ...]:
        return (self.token,) if self.token else ()


@dataclass(frozen=True, kw_only=True)
class Git:
    """Git for one remote. `cache_dir` holds the answering script and the hosts seen."""

    url: str = ""
    auth: GitAuth | None = None
    cache_dir: Path = Path(".")

    def run(self, *arguments: str, cwd: Path, network: bool = False, what: str = "") -> str:
        """Standard output; GitError with git's own words otherwise. `network` passes the credentials."""
        git = shutil.which("git")
        if git is None:
            raise GitError(
                "git is not installed: install it, or use a directory without Git as source"
            )
        with self._environment(network) as environment:
            code, out, err = _communicate(
                [git, *arguments],
                cwd=cwd,
                environment=environment,
                seconds=NETWORK_SECONDS if network else LOCAL_SECONDS,
            )
        if code:
            raise self._error(what or f"git {arguments[0]}", code, err)
        return out

    def succeeds(self, *arguments: str, cwd: Path) -> bool:
        try:
            self.run(*arguments, cwd=cwd)
        except GitError:
            return False
        return True

    def _error(self, what: str, code: int, err: str) -> GitError:
        words = self.redact(err).strip() or f"exit code {code}"
        kind = _kind_of(words)
        lines = [line for line in words.splitlines() if line.strip()]
        place = f" {self.url}" if self.url else ""
        return GitError(f"{what}{place} failed: {_NEXT_STEP[kind]}", lines[-10:], kind=kind)

    def redact(self, text: str) -> str:
        for secret in self.auth.secrets() if self.auth else ():
            text = text.replace(secret, "***")
        return re.sub(r"(?<=://)[^/@\s']+:[^/@\s']+@", "***@", text)

    # -- environment ---------------------------------------------------------------------------------------------

    @contextmanager
    def _environment(self, network: bool) -> Iterator[dict[str, str]]:
        environment = _clean_environment(os.environ)
        settings = dict(_SETTINGS)
        with tempfile.TemporaryDirectory(prefix="valohai-git-") as private:
            if network:
                environment["GIT_ALLOW_PROTOCOL"] = self._protocols()
                self._add_ssh(environment, Path(private))
                self._add_token(environment, settings)
            _add_settings(environment, settings)
            yield environment

    def _protocols(self) -> str:
        """Local paths only for local sources: a submodule of a remote one must not read this host's files."""
        local = "://" not in self.url and not is_scp_like(self.url)
        return (
            "file:http:https:ssh:git"
            if local or self.url.startswith("file://")
            else "http:https:ssh:git"
        )

    def _add_ssh(self, environment: dict[str, str], private: Path) -> None:
        key = self.auth.ssh_key if self.auth else None
        if key is None:
            environment.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
            return
        known_hosts = self.auth.known_hosts if self.auth else None
        hosts_file = known_hosts or self.cache_dir / "known_hosts"
        options = [
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            f'UserKnownHostsFile="{hosts_file.absolute()}"',
            f"StrictHostKeyChecking={'yes' if known_hosts else 'accept-new'}",
        ]
        command = ["ssh", "-F", os.devnull, "-i", str(_key_file(key, private))]
        command += [part for option in options for part in ("-o", option)]
        environment["GIT_SSH_COMMAND"] = shlex.join(command)

    def _add_token(self, environment: dict[str, str], settings: dict[str, str]) -> None:
        parts = urlsplit(self.url)
        if self.auth is None or not self.auth.token or parts.scheme not in ("http", "https"):
            return
        if re.search(r"[\r\n\0]", self.auth.token + self.auth.username):
            raise GitError(
                f"the token for {self.url} holds a line break: store it without", kind="denied"
            )
        settings["credential.helper"] = (
            ""  # an empty entry clears the list: nobody else sees or keeps it
        )
        settings["credential.useHttpPath"] = "false"
        environment |= {
            "GIT_ASKPASS": str(self._askpass()),
            "VALOHAI_GIT_SCHEME": parts.scheme,
            "VALOHAI_GIT_HOST": parts.netloc,
            "VALOHAI_GIT_USERNAME": self.auth.username,
            "VALOHAI_GIT_TOKEN": self.auth.token,
        }

    def _askpass(self) -> Path:
        """Written once, replaced atomically: several processes share the cache."""
        path = (self.cache_dir / "askpass").absolute()
        if not path.exists() or path.read_text() != _ASKPASS:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(_ASKPASS)
            os.chmod(name, 0o700)
            os.replace(name, path)
        return path


def _kind_of(words: str) -> Kind:
    for pattern, kind in _KINDS:
        if re.search(pattern, words, re.IGNORECASE):
            return kind
    return "other"


def _clean_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The user's environment (proxies, agents, certificates) without what would point git at another repository."""
    keep = {"GIT_SSH", "GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_EXEC_PATH", "GIT_TEMPLATE_DIR"}
    prefixes = ("GIT_SSL_", "GIT_CONFIG_", "GIT_PROXY_", "GIT_HTTP_")
    environment = {
        name: value
        for name, value in base.items()
        if not name.startswith("GIT_") or name in keep or name.startswith(prefixes)
    }
    environment.pop("GIT_CONFIG_PARAMETERS", None)
    return environment | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}


def _add_settings(environment: dict[str, str], settings: Mapping[str, str]) -> None:
    count = int(environment.get("GIT_CONFIG_COUNT") or 0)
    for number, (key, value) in enumerate(settings.items(), start=count):
        environment[f"GIT_CONFIG_KEY_{number}"] = key
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    environment["GIT_CONFIG_COUNT"] = str(count + len(settings))


def _key_file(key: Path | str, private: Path) -> Path:
    if isinstance(key, str) and "PRIVATE KEY" in key:
        path = private / "key"
        path.touch(mode=0o600)
        path.write_text(key.strip().replace("\r\n", "\n") + "\n")
        return path
    path = Path(key).expanduser().absolute()
    if not path.is_file():
        raise GitError(
            f"the SSH key {path} does not exist: give the path of a deploy key", kind="denied"
        )
    return path


def _communicate(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int, str, str]:
    """A session of its own: on a time-out ssh and helpers end with git."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 124, "", f"timed out after {seconds:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, os.fsdecode(out), err.decode("utf-8", "replace")


# -- addresses ---------------------------------------------------------------------------------------------------

_SCP_LIKE = re.compile(r"(?:[\w.-]+@[\w.-]+|\w[\w.-]+):(?!//)[^\\]+")


def is_scp_like(text: str) -> bool:
    """`git@host:path`, git's short form of an SSH address."""
    return bool(_SCP_LIKE.fullmatch(text))


def is_git_url(text: str) -> bool:
    """An address of a remote; an existing local directory is never one."""
    if re.match(r"(?:git\+)?(?:https?|ssh|git|file)://", text):
        return True
    return is_scp_like(text) and not Path(text).exists()


def split_credentials(url: str, auth: GitAuth | None) -> tuple[str, GitAuth | None]:
    """The URL without user and password, and the auth that they stand for; explicit auth beats them."""
    url = url.removeprefix("git+")
    if url.startswith("-") or re.search(r"[\s\x00-\x1f]", url):
        raise ProjectError(f"{url!r} is not a Git URL")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return url, auth
    user, _, host = parts.netloc.rpartition("@")
    name, _, password = (unquote(part) for part in user.partition(":"))
    clean = urlunsplit(parts._replace(netloc=host))
    if auth is not None and (auth.token or auth.ssh_key):
        return clean, auth
    return clean, GitAuth(token=password, username=name) if password else GitAuth(token=name)
