"""What a machine does to become and stay a worker: its files, its services, its identity, its dead man's switch."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ports import wait_for
from tests.support.web import content, serve
from valohai_agent.machine import dead_man, joining
from valohai_agent.machine.becoming import Wanted, become_worker
from valohai_agent.machine.identity import CloudOfMachine, NoIdentity, machine_id
from valohai_agent.machine.joining import (
    UPDATE_SECONDS,
    BadFile,
    CannotJoin,
    NoAnswer,
    bring_up_to_date,
    take_release,
)
from valohai_agent.machine.messages import AgentFile, JoinAnswer
from valohai_agent.machine.places import Machine, NotJoined, Places
from valohai_agent.machine.services import units

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens there


def machine_of(url: str = NOBODY, **answer: object) -> Machine:
    values = {
        "group": "gpu",
        "deployment": "d",
        "ticket": "vht_1",
        "environment": {
            "VALOHAI_AGENT_REDIS": 'rediss://u:p"w@h/0?ssl_ca_certs={dir}/redis-ca.crt'
        },
        "files": {"redis-ca.crt": "CA"},
        **answer,
    }
    return Machine(url=url, machine_id="i-1", answer=JoinAnswer.model_validate(values))


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "work").mkdir()
    return Places(config=tmp_path / "config", work=tmp_path / "work")


def test_what_was_given_is_kept_for_root_alone(places: Places) -> None:
    machine = machine_of()
    places.save(machine)
    assert places.load() == machine
    assert (places.config / "redis-ca.crt").read_text() == "CA"
    for secret in (places.machine_file, places.environment_file):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    line = next(
        one for one in places.environment_file.read_text().splitlines() if "AGENT_REDIS" in one
    )
    assert line == (
        f'VALOHAI_AGENT_REDIS="rediss://u:p\\"w@h/0?ssl_ca_certs={places.config}/redis-ca.crt"'
    )
    assert "vht_1" not in repr(machine)


def test_a_machine_that_has_not_joined_is_told_how_to(places: Places) -> None:
    with pytest.raises(NotJoined, match="`valohai-agent join` does it"):
        places.load()


def test_e31_each_of_several_agents_has_one_gpu(places: Places) -> None:
    machine = machine_of(agents=4, gpu_each=True)
    assert [places.environment_of(machine, n)["VALOHAI_AGENT_GPUS"] for n in range(4)] == list(
        "0123"
    )
    assert places.environment_of(machine_of(agents=2), 1) == {}


def test_the_services_are_what_systemd_takes(places: Places, tmp_path: Path) -> None:
    """Checked by systemd itself where it is installed; no systemd runs in tests."""
    made = units(places, ["/bin/true"])
    assert set(made) == {
        "valohai-agent@.service",
        "valohai-watch.service",
        "valohai-watch.timer",
    }
    agent = made["valohai-agent@.service"]
    for hardened in ("NoNewPrivileges=yes", "ProtectSystem=full", "CapabilityBoundingSet=\n"):
        assert hardened in agent
    assert "User=valohai-agent\n" in agent
    assert f"TimeoutStartSec={UPDATE_SECONDS + 60:.0f}\n" in agent
    assert "UMask=0022\n" in agent  # code and inputs are read by the users of images
    assert "ExecStartPre=-+" in agent  # an update that fails ends no agent
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    for name, text in made.items():
        (tmp_path / name.replace("@", "@1")).write_text(
            text.replace("User=valohai-agent", "User=root")
        )
    files = [str(tmp_path / name.replace("@", "@1")) for name in made]
    done = subprocess.run([analyze, "verify", *files], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "valohai" in line]
    assert not ours, ours


# -- keeping agents running without systemd --------------------------------------------------------------------------

KEEP = """
import logging, sys
from pathlib import Path
from valohai_agent.machine.keeping import Keeper
from valohai_agent.machine.places import Places
logging.basicConfig(level=logging.INFO)
places = Places(config=Path(sys.argv[1]), work=Path(sys.argv[2]))
sys.exit(Keeper(places, places.load(), [sys.executable, sys.argv[3]]).run())
"""
AGENT = """
import os, sys
from pathlib import Path
log = Path(os.environ["VALOHAI_AGENT_WORK_DIR"]) / "starts"
with log.open("a") as file:
    file.write(os.environ["VALOHAI_AGENT_QUEUE"] + "\\n")
sys.exit({1: 4, 2: 1}.get(len(log.read_text().splitlines()), 0))
"""


def test_an_agent_is_started_again_when_it_makes_way_or_fails_and_not_when_it_has_drained(
    places: Places, tmp_path: Path
) -> None:
    """Exit codes 4 (update), 1 (failure) and 0 (drained), with a control plane that is away all the time."""
    places.save(machine_of(environment={"VALOHAI_AGENT_QUEUE": "gpu"}))
    (tmp_path / "agent.py").write_text(AGENT)
    arguments = [str(places.config), str(places.work), str(tmp_path / "agent.py")]
    with (tmp_path / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen([sys.executable, "-c", KEEP, *arguments], stderr=log)
    said = tmp_path / "keeper.log"
    try:
        wait_for(lambda: "has drained" in said.read_text(), seconds=30, what="the drain")
        assert keeper.poll() is None  # it waits for whoever drained it
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(10) == 0
    finally:
        keeper.kill()
        keeper.wait()
    assert _starts(places) == 3, said.read_text()


def _starts(places: Places) -> int:
    log = places.work / "starts"
    return log.read_text().count("gpu") if log.exists() else 0


# -- identity --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VALOHAI_AGENT_MACHINE_ID", "VALOHAI_JOIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("cloud", "path", "answer", "header"),
    [
        ("aws", "/latest/meta-data/instance-id", b"i-0abc", "x-aws-ec2-metadata-token"),
        ("gcp", "/computeMetadata/v1/instance/name", b"i-0abc", "metadata-flavor"),
        ("azure", "/metadata/instance/compute/name", b"i-0abc", "metadata"),
        ("openstack", "/openstack/latest/meta_data.json", b'{"uuid": "i-0abc"}', "host"),
    ],
)
def test_each_cloud_tells_a_machine_its_id(
    cloud: str, path: str, answer: bytes, header: str
) -> None:
    """Stand-ins for the metadata services, which exist on machines of the clouds only."""
    with serve() as web:
        web.answers["/latest/api/token"] = [content(b"token")]
        web.answers[path] = [content(answer)]
        assert machine_id(CloudOfMachine(cloud), base_url=web.url("")) == "i-0abc"
        assert header in {name.lower() for name in web.requests[-1][2]}


def test_a_metadata_service_that_is_silent_is_named() -> None:
    with pytest.raises(NoIdentity, match="metadata service of aws"):
        machine_id(CloudOfMachine.aws, base_url=NOBODY)


def test_what_the_environment_says_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALOHAI_AGENT_MACHINE_ID", "stated")
    assert machine_id(CloudOfMachine.aws, base_url=NOBODY) == "stated"


# -- joining ---------------------------------------------------------------------------------------------------------


def test_a_control_plane_that_is_away_changes_nothing(places: Places) -> None:
    machine = machine_of()
    places.save(machine)
    assert bring_up_to_date(places, hostname="h") == machine


def test_join_without_a_token_says_where_one_comes_from(places: Places) -> None:
    wanted = Wanted(url=NOBODY, config_dir=places.config, work_dir=places.work, machine_id="m")
    with pytest.raises(CannotJoin, match="join-token GROUP"):
        become_worker(wanted)


def test_a_copy_of_a_machines_disk_is_another_machine(places: Places) -> None:
    places.save(machine_of())
    wanted = Wanted(url=NOBODY, config_dir=places.config, work_dir=places.work, machine_id="i-2")
    with pytest.raises(CannotJoin, match="There is no token"):
        become_worker(wanted)


def test_what_is_no_control_plane_is_refused(places: Places) -> None:
    with serve() as web:
        web.answers["/agents/join"] = [content(b"<html>")]
        wanted = Wanted(
            url=web.url(""),
            token="t",
            config_dir=places.config,
            work_dir=places.work,
            machine_id="m",
        )
        with pytest.raises(CannotJoin, match="is no control plane"):
            become_worker(wanted)


def test_an_agent_that_trickles_in_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "FETCH_SECONDS", -1.0)
    with serve() as web:
        web.answers["/agent"] = [content(b"abc")]
        release = AgentFile(version="9", sha256="0" * 64, size=6, url=web.url("/agent"))
        with pytest.raises(BadFile, match="there were 3 of 6 bytes"):
            take_release(release, tmp_path / "agent.pyz")


# -- the dead man's switch -------------------------------------------------------------------------------------------


def aged(path: Path, seconds: float) -> None:
    path.touch()
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


@pytest.fixture
def old_machine(places: Places, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Joined an hour ago, up for longer, and its control plane does not answer."""
    monkeypatch.setattr(dead_man, "_booted_at", lambda places: 0.0)
    places.save(machine_of(dead_man_seconds=600))
    aged(places.word_mark, 3600)
    return places


def test_an_abandoned_idle_machine_is_to_be_powered_off(old_machine: Places) -> None:
    assert dead_man.look(old_machine, hostname="h")


def test_a_machine_on_which_something_runs_is_not(old_machine: Places) -> None:
    (old_machine.work / "busy").touch()
    assert not dead_man.look(old_machine, hostname="h")


def test_a_machine_that_has_just_booted_is_not(
    old_machine: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_man, "_booted_at", lambda places: time.time() - 10)
    assert not dead_man.look(old_machine, hostname="h")


def test_machines_of_groups_without_the_switch_stay(places: Places) -> None:
    places.save(machine_of())
    aged(places.word_mark, 10**6)
    assert not dead_man.look(places, hostname="h")


@pytest.mark.parametrize("limit", [None, 3600.0])
def test_a_ticket_is_renewed_once_a_day_also_where_something_always_runs(
    places: Places, monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    asked: list[str] = []

    def away(machine: Machine, hostname: str) -> Machine:
        asked.append(machine.machine_id)
        raise NoAnswer("away")

    monkeypatch.setattr(dead_man, "refresh", away)
    places.save(machine_of(dead_man_seconds=limit))
    (places.work / "busy").touch()
    assert not dead_man.look(places, hostname="h")
    assert asked == []
    aged(places.word_mark, dead_man.RENEW_SECONDS + 1)
    for _ in range(3):  # one that is away is asked again the next day
        assert not dead_man.look(places, hostname="h")
    assert asked == ["i-1"]
    aged(places.asked_mark, dead_man.RENEW_SECONDS + 1)
    assert not dead_man.look(places, hostname="h")
    assert asked == ["i-1", "i-1"]


def test_it_asks_once_more_before_the_switch_falls(
    old_machine: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that jumped powers nothing off while the control plane is there."""
    monkeypatch.setattr(dead_man, "refresh", lambda machine, hostname: machine)
    assert not dead_man.look(old_machine, hostname="h")
    assert dead_man.quiet_seconds(old_machine, now=time.time(), booted_at=0) < 60


def test_it_does_not_ask_while_word_is_fresh(
    old_machine: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_machine.word_mark.touch()

    def nobody(machine: Machine, hostname: str) -> Machine:
        raise NoAnswer("asked")

    monkeypatch.setattr(dead_man, "refresh", nobody)
    assert not dead_man.look(old_machine, hostname="h")


def test_powering_off_does_not_wait_for_agents_that_hang() -> None:
    called: list[list[str]] = []
    dead_man.power_off(lambda command, check: called.append(command))
    assert [one[:2] for one in called] == [["systemctl", "kill"], ["systemctl", "poweroff"]]
