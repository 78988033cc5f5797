"""Joining a group and asking again later, over HTTP; and fetching the agent that the answer names."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from valohai_agent.errors import AgentError
from valohai_agent.machine.messages import (
    JOIN_PATH,
    REFRESH_PATH,
    AgentFile,
    JoinAnswer,
    JoinRequest,
    NotForUs,
    SealedAnswer,
    new_key,
    unseal,
)
from valohai_agent.machine.places import Machine, Places
from valohai_agent.machine.program import FILE_VARIABLE
from valohai_agent.redis_link import Backoff
from valohai_agent.version import __version__

logger = logging.getLogger(__name__)

ASK_SECONDS = 30.0
PATIENCE_SECONDS = 600.0  # of a machine that boots while the control plane is away
FETCH_SECONDS = 600.0
TRY_SECONDS = 120.0
UPDATE_SECONDS = ASK_SECONDS + FETCH_SECONDS + TRY_SECONDS  # longest time of `bring_up_to_date`
CHUNK = 1024 * 1024


class CannotJoin(AgentError):
    """The control plane refuses this machine; asking again changes nothing."""


class NoAnswer(AgentError):
    """The control plane did not answer in time."""


class BadFile(AgentError):
    """The published agent cannot be fetched, or is not what was published."""


def join(
    url: str, token: str, machine_id: str, *, hostname: str, patience: float = PATIENCE_SECONDS
) -> Machine:
    """Exchanges a join token. Waits for a control plane that is away. Raises CannotJoin, NoAnswer."""
    private, public = new_key()
    request = _request(token, machine_id, public, hostname)
    address = url.rstrip("/")

    def ask() -> JoinAnswer:
        return unseal(_post(address + JOIN_PATH, request), private)

    return Machine(url=address, machine_id=machine_id, answer=_patiently(ask, patience))


def refresh(machine: Machine, *, hostname: str, patience: float = 0.0) -> Machine:
    """What the group has for this machine now. Raises CannotJoin, NoAnswer."""
    private, public = new_key()
    request = _request(machine.answer.ticket, machine.machine_id, public, hostname)

    def ask() -> JoinAnswer:
        return unseal(_post(machine.url + REFRESH_PATH, request), private)

    return machine.model_copy(update={"answer": _patiently(ask, patience)})


def take_release(release: AgentFile | None, file: Path) -> bool:
    """Puts the published agent in the place of `file` if it is another one; tells whether it did. Raises BadFile."""
    if release is None or (file.is_file() and sha256_of(file) == release.sha256):
        return False
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        digest = _fetch(release, half)
        if digest != release.sha256:
            raise BadFile(
                f"The agent {release.version} that was fetched is not the published one: its sha256 is {digest}, published "
                f"is {release.sha256}. Publish it again with `valohai-dagster agents publish`."
            )
        half.chmod(0o755)
        _try(release, half)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
    logger.info("fetched agent %s", release.version, extra={"action": "agent-fetched"})
    return True


def _try(release: AgentFile, file: Path) -> None:
    """It has to start here before it takes the place of one that does; it unpacks itself on the way, as root if that is us."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [sys.executable, str(file), "version"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TRY_SECONDS,
            check=False,
        )
        trouble = (done.stderr or done.stdout).strip()[-300:] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = str(error)
    if trouble:
        raise BadFile(
            f"The published agent {release.version} does not start on this machine: {trouble}"
        )


def own_file() -> Path | None:
    """Where this agent lies, when it is one file; None when it was installed otherwise."""
    stated = os.environ.get(FILE_VARIABLE)
    return Path(stated) if stated else None


def bring_up_to_date(places: Places, *, hostname: str) -> Machine:
    """Asks the control plane and takes what it gives; goes on with what is there where that does not work.

    Raises NotJoined.
    """
    machine = places.load()
    try:
        machine = refresh(machine, hostname=hostname)
        places.save(machine)
        file = own_file()
        if file is not None:
            take_release(machine.answer.release, file)
    except CannotJoin as error:
        text = "goes on with what is there, and gets no newer agent or password until it joins again: %s"
        logger.error(text, error, extra={"action": "refresh-refused"})
    except AgentError as error:
        logger.warning("goes on with what is there: %s", error, extra={"action": "refresh-failed"})
    return machine


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _request(token: str, machine_id: str, public: str, hostname: str) -> JoinRequest:
    try:
        return JoinRequest(
            token=token,
            machine_id=machine_id,
            public_key=public,
            hostname=hostname[:255],
            version=__version__,
        )
    except ValidationError as error:
        raise CannotJoin(
            f"The token or the machine's id ({machine_id!r}) is not one; check what was given to `join`."
        ) from error


def _patiently(ask: Callable[[], JoinAnswer], patience: float) -> JoinAnswer:
    backoff, until = Backoff(first=1.0, longest=20.0), time.monotonic() + patience
    while True:
        try:
            return ask()
        except NoAnswer as error:
            if time.monotonic() >= until:
                raise
            logger.warning("%s Trying again.", error, extra={"action": "join-waits"})
        except NotForUs as error:
            raise CannotJoin(f"The control plane's answer cannot be used: {error}.") from error
        time.sleep(backoff.seconds())


def _post(url: str, request: JoinRequest) -> SealedAnswer:
    body = request.model_dump_json().encode()
    headers = {"Content-Type": "application/json", "User-Agent": f"valohai-agent/{__version__}"}
    asked = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310 - the operator gives it
    where = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
    try:
        with urllib.request.urlopen(asked, timeout=ASK_SECONDS) as answer:  # noqa: S310
            return SealedAnswer.model_validate_json(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            words = _words(error)
        if error.code in (403, 404, 410, 413, 421, 422):
            raise CannotJoin(
                f"The control plane at {where} refuses this machine: {words}"
            ) from None
        raise NoAnswer(f"The control plane at {where} cannot take machines now: {words}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NoAnswer(f"The control plane at {where} cannot be reached: {reason}.") from None
    except ValidationError:
        raise CannotJoin(
            f"What answers at {where} is no control plane; check the address that was given to `join`."
        ) from None


def _words(error: urllib.error.HTTPError) -> str:
    try:
        told = json.loads(error.read(4096)).get("error")
    except (OSError, ValueError, AttributeError):
        told = None
    return f"{told or 'no reason given'} (HTTP {error.code})."


def _fetch(release: AgentFile, target: Path) -> str:
    """The digest of what has come. The address may be signed, so it stands in no message."""
    digest, came, until = hashlib.sha256(), 0, time.monotonic() + FETCH_SECONDS
    try:
        with (
            urllib.request.urlopen(release.url, timeout=ASK_SECONDS) as answer,  # noqa: S310 - given by the control plane
            target.open("wb") as out,
        ):
            while chunk := answer.read1(CHUNK):
                came += len(chunk)
                if came > release.size:
                    break
                if time.monotonic() > until:
                    raise BadFile(
                        f"The published agent {release.version} cannot be fetched: after {FETCH_SECONDS:.0f} s there were "
                        f"{came} of {release.size} bytes."
                    )
                digest.update(chunk)
                out.write(chunk)
    except (OSError, http.client.HTTPException) as error:
        reason = (
            getattr(error, "code", None) or getattr(error, "reason", None) or type(error).__name__
        )
        raise BadFile(
            f"The published agent {release.version} cannot be fetched: {reason}."
        ) from None
    return digest.hexdigest()
