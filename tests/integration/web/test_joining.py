"""Machines join over real HTTP with a real Redis: who is let in, what they are given, and what nobody else learns."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import redis
import sqlalchemy as sa
import uvicorn
from redis.exceptions import NoPermissionError

from tests.support.machines import small_agent_file
from tests.support.ports import free_port, wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.machine.joining import (
    BadFile,
    CannotJoin,
    NoAnswer,
    bring_up_to_date,
    join,
    refresh,
    take_release,
)
from valohai_agent.machine.messages import (
    JOIN_PATH,
    AgentFile,
    JoinRequest,
    SealedAnswer,
    new_key,
    unseal,
)
from valohai_agent.machine.places import Machine, Places
from valohai_agent.protocol import Keys, utcnow
from valohai_agent.redis_link import connect
from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.bootstrap import prepare_launch
from valohai_dagster.capacity.bootstrap.joining import (
    NotAdmitted,
    Passwords,
    admit_machines,
    change_password,
    fresh_token,
    machines_user,
    make_user,
    redeem,
)
from valohai_dagster.capacity.bootstrap.releases import current_release, publish
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import Machine as MachineOfCloud
from valohai_dagster.capacity.model import MachineState, Purchase
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.records.capacity_tables import join_tokens, machines
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    AwsGroupSettings,
    SimulatedGroupSettings,
    StaticGroupSettings,
)
from valohai_dagster.stores.registry import Stores, open_stores
from valohai_dagster.web.joining import FAILURES, Joining
from valohai_dagster.web.service_app import make_app

GPU = AwsGroupSettings(
    kind="aws", instance_type="g5.12xlarge", gpus=4, agents_per_machine="gpu", dead_man_seconds=900
)


@dataclass(frozen=True, kw_only=True)
class Site:
    settings: Settings
    records: Records
    stores: Stores
    key: SecretKey
    url: str

    def token(self, group: str = "gpu", uses: int = 1, **life: float) -> str:
        token = fresh_token()
        with self.records.write() as conn:
            admit_machines(
                conn,
                token,
                group=group,
                uses=uses,
                now=utcnow(),
                life=timedelta(**(life or {"hours": 1})),
            )
        return token

    def prepare(self, **changed: str | None) -> Callable[[Launch], Launch]:
        """Of launches of the group `gpu`, by settings that machines elsewhere could use."""
        elsewhere = {"join_url": "https://control.example", "agent_redis_url": "rediss://r.example"}
        return prepare_launch(
            "gpu",
            GPU,
            settings=self.settings.model_copy(update={**elsewhere, **changed}),
            records=self.records,
            stores=self.stores,
            secret_key=self.key,
        )

    def listed(self, launch: str, *ids: str) -> None:
        """The cloud tells of these machines of a launch."""
        book = MachineRecords(self.records, "gpu", kind="aws", clock=utcnow)
        now = utcnow()
        for machine_id in ids:
            machine = MachineOfCloud(
                id=machine_id,
                zone="a",
                purchase=Purchase.on_demand,
                state=MachineState.running,
                created_at=now,
                token=launch,
            )
            book.save(Known(machine=machine, listed_at=now))

    def join(self, token: str, machine: str = "i-1") -> Machine:
        return join(self.url, token, machine, hostname="host", patience=0)


@pytest.fixture
def site(redis_server: RedisServer, tmp_path: Path) -> Iterator[Site]:
    port = free_port()
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=redis_server.url,
        http_port=port,
        groups={"gpu": GPU, "near": StaticGroupSettings(kind="static")},
        default_group="near",
    )
    records, stores = open_records(settings), open_stores(settings)
    key = SecretKey(b"k" * 32)
    joining = Joining(settings, records=records, stores=stores, secret_key=key)
    app = make_app(records, stores, host="127.0.0.1", further=joining.routes())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started, what="the server")
    yield Site(settings=settings, records=records, stores=stores, key=key, url=settings.base_url)
    server.should_exit = True
    thread.join()
    records.close()


@pytest.fixture
def small_agent(tmp_path: Path) -> Path:
    return small_agent_file(tmp_path / "valohai-agent.pyz")


def test_a_machine_gets_a_user_of_its_group_that_reaches_nothing_else(site: Site) -> None:
    answer = site.join(site.token()).answer
    environment = answer.environment
    assert (answer.agents, answer.gpu_each, answer.dead_man_seconds) == (4, True, 900)
    assert environment["VALOHAI_AGENT_MACHINE_ID"] == "i-1"
    link = connect(environment["VALOHAI_AGENT_REDIS"])
    keys = Keys(environment["VALOHAI_AGENT_DEPLOYMENT"])
    try:
        assert link.client.zrange(keys.ready("gpu"), 0, -1) == []
        with pytest.raises(NoPermissionError):
            link.client.zrange(keys.ready("near"), 0, -1)
        with pytest.raises(NoPermissionError):
            link.client.keys("*")
    finally:
        link.close()


def test_a_token_is_good_for_as_many_machines_as_it_says(site: Site) -> None:
    token = site.token(uses=2)
    site.join(token, "i-1")
    site.join(token, "i-2")
    with pytest.raises(CannotJoin, match="used up"):
        site.join(token, "i-3")
    with pytest.raises(CannotJoin):  # code on the machine that has read its user data
        site.join(token, "i-1")


def test_an_answer_that_got_lost_can_be_asked_for_again_by_the_same_machine_only(
    site: Site,
) -> None:
    token, (private, public) = site.token(), new_key()
    request = {"token": token, "machine_id": "i-1", "public_key": public}

    def post() -> SealedAnswer:
        reply = httpx.post(site.url + JOIN_PATH, json=request)
        reply.raise_for_status()
        return SealedAnswer.model_validate_json(reply.content)

    assert unseal(post(), private) == unseal(post(), private)
    assert b"redis" not in bytes.fromhex(post().sealed)


def test_an_expired_token_and_an_unknown_one_are_refused_alike(site: Site) -> None:
    words = set()
    for token in (site.token(seconds=-1), fresh_token()):
        with pytest.raises(CannotJoin) as refused:
            site.join(token)
        words.add(str(refused.value))
    assert len(words) == 1


def test_many_refusals_of_one_address_are_slowed_down_and_hold_up_no_machine_of_ours(
    site: Site,
) -> None:
    """Behind a proxy, machines and strangers have the same address."""
    machine = site.join(site.token())
    for _ in range(FAILURES):
        with pytest.raises(CannotJoin):
            site.join(fresh_token())
    with pytest.raises(NoAnswer, match="wait"):
        site.join(fresh_token())
    site.join(site.token(), "i-2")
    refresh(machine, hostname="host")


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_machines_of_one_launch_that_come_together_are_all_let_in(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgres" else None
    records = open_records(Settings(state_dir=tmp_path / "state", database_url=url))
    machines, token, now = 8, fresh_token(), utcnow()
    together = threading.Barrier(machines + 1)

    def come(number: int) -> str:
        wanted = JoinRequest(token=token, machine_id=f"i-{number}", public_key=f"{number:064x}")
        together.wait(10)
        try:
            with records.write() as conn:
                return redeem(conn, wanted, now=now).machine_id
        except NotAdmitted:
            return "refused"

    try:
        for _ in range(3):
            token = fresh_token()
            with records.write() as conn:
                life = timedelta(hours=1)
                admit_machines(conn, token, group="gpu", uses=machines, now=now, life=life)
            with ThreadPoolExecutor(machines + 1) as pool:  # one more than may come
                told = sorted(pool.map(come, range(machines + 1)))
            assert told.count("refused") == 1, told
    finally:
        records.close()


def test_deployments_on_one_redis_leave_each_other_the_machines_of_groups_of_one_name(
    site: Site,
) -> None:
    address = site.join(site.token()).answer.environment["VALOHAI_AGENT_REDIS"]
    make_user(site.settings, Keys("another"), "gpu", Passwords(current="p"))
    connect(address).close()


def test_a_ticket_brings_its_machine_back_and_no_other(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    machine = site.join(site.token())
    assert refresh(machine, hostname="host").answer.ticket == machine.answer.ticket
    other = machine.model_copy(update={"machine_id": "i-2"})
    with pytest.raises(CannotJoin):
        refresh(other, hostname="host")
    with pytest.raises(CannotJoin):  # a ticket is no token
        site.join(machine.answer.ticket)
    again = site.join(site.token())
    assert "give one of them another name with `join --machine-id`" in caplog.text
    with pytest.raises(CannotJoin):  # the machine has begun anew
        refresh(machine, hostname="host")
    assert again.answer.ticket != machine.answer.ticket


def test_a_machine_that_counts_as_gone_hears_no_word_any_more(site: Site) -> None:
    """So it ends itself, wherever it is: its group's region may have been changed."""
    machine = site.join(site.token())
    site.listed("one", machine.machine_id)
    refresh(machine, hostname="host")
    with site.records.write() as conn:
        conn.execute(machines.update().values(gone_at=utcnow()))
    with pytest.raises(CannotJoin):
        refresh(machine, hostname="host")


def test_a_machine_whose_ticket_is_not_good_any_more_says_that_it_has_to_join_again(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = Places(config=tmp_path / "config", work=tmp_path)
    machine = site.join(site.token())
    places.save(machine)
    with site.records.write() as conn:
        conn.execute(join_tokens.update().values(expires_at=utcnow() - timedelta(minutes=1)))
    assert bring_up_to_date(places, hostname="host") == machine
    assert "until it joins again" in caplog.text


def test_the_records_hold_neither_tokens_nor_passwords(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = site.token()
    answer = site.join(token).answer
    password = answer.environment["VALOHAI_AGENT_REDIS"].partition("@")[0].rpartition(":")[2]
    with site.records.read() as conn:
        rows = str(conn.execute(sa.select(join_tokens)).all())
    for secret in (token, answer.ticket, password):
        assert secret not in rows
        assert secret not in caplog.text
        assert secret not in repr(answer)


def test_a_changed_password_comes_with_the_next_start_and_the_old_one_opens_until_the_next_change(
    site: Site,
) -> None:
    machine = site.join(site.token())
    first = machine.answer.environment["VALOHAI_AGENT_REDIS"]
    with site.records.write() as conn:
        change_password(conn, "gpu", at_once=False)
    second = refresh(machine, hostname="host").answer.environment["VALOHAI_AGENT_REDIS"]
    assert first != second
    for url in (first, second):
        connect(url).close()
    with site.records.write() as conn:
        change_password(conn, "gpu", at_once=True)
    third = refresh(machine, hostname="host").answer.environment["VALOHAI_AGENT_REDIS"]
    connect(third).close()
    for url in (first, second):
        with redis.Redis.from_url(url) as client, pytest.raises(redis.AuthenticationError):
            client.ping()


def test_a_redis_that_forgot_its_users_gets_them_back_when_a_machine_comes(
    site: Site, redis_client: redis.Redis
) -> None:
    machine = site.join(site.token())
    redis_client.acl_deluser(machines_user(site.records.deployment_id, "gpu"))
    connect(refresh(machine, hostname="host").answer.environment["VALOHAI_AGENT_REDIS"]).close()


def test_a_machine_of_a_group_that_is_gone_is_told_so(site: Site) -> None:
    with pytest.raises(CannotJoin, match="no worker group 'gone' any more"):
        site.join(site.token("gone"))


def test_what_is_no_request_is_refused(site: Site) -> None:
    assert httpx.post(site.url + JOIN_PATH, content=b"x" * 20_000).status_code == 413
    assert httpx.post(site.url + JOIN_PATH, json={"token": "t"}).status_code == 422
    assert httpx.get(site.url + JOIN_PATH).status_code == 405


def test_the_published_agent_comes_through_the_service_when_its_store_signs_no_address(
    site: Site, small_agent: Path, tmp_path: Path
) -> None:
    publish(site.records, site.stores.default, small_agent, now=utcnow())
    release = site.join(site.token()).answer.release
    assert release is not None
    assert release.url.startswith(site.url)
    fetched = tmp_path / "fetched.pyz"
    assert take_release(release, fetched)
    assert fetched.read_bytes() == small_agent.read_bytes()
    assert not take_release(release, fetched)
    damaged = release.model_copy(update={"sha256": hashlib.sha256(b"other").hexdigest()})
    with pytest.raises(BadFile, match="not the published one"):
        take_release(damaged, fetched)
    assert fetched.read_bytes() == small_agent.read_bytes()


def test_an_agent_that_does_not_start_does_not_take_the_place_of_one_that_does(
    site: Site, tmp_path: Path
) -> None:
    broken, file = tmp_path / "broken.pyz", tmp_path / "agent.pyz"
    broken.write_text("raise SystemExit('no such processor')")
    file.write_text("the one that works")
    content = broken.read_bytes()
    release = AgentFile(
        version="9",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        url=broken.as_uri(),
    )
    with pytest.raises(BadFile, match="does not start on this machine: no such processor"):
        take_release(release, file)
    assert file.read_text() == "the one that works"


def test_a_launch_gets_user_data_with_its_own_token(site: Site, small_agent: Path) -> None:
    prepare = site.prepare()
    with pytest.raises(CloudError, match="no agent is published"):
        prepare(Launch(token="one"))
    publish(site.records, site.stores.default, small_agent, now=utcnow())
    one, again = prepare(Launch(token="one", count=2)), prepare(Launch(token="one", count=2))
    other = prepare(Launch(token="two", tags={"team": "vision"}))
    token, repeated, another = (_token(launch) for launch in (one, again, other))
    assert token == repeated != another
    with site.records.read() as conn:
        release = current_release(conn)
    assert release is not None
    assert other.tags == {"team": "vision", "valohai-bootstrap": release.version}
    site.listed("one", "i-1", "i-2", "i-3")
    site.join(token, "i-1")
    site.join(token, "i-2")
    with pytest.raises(CannotJoin):
        site.join(token, "i-3")


def test_a_token_of_a_launch_lets_in_what_its_cloud_lists_and_each_machine_once(
    site: Site, small_agent: Path
) -> None:
    """User code on the first machine reads the token while the second one boots."""
    publish(site.records, site.stores.default, small_agent, now=utcnow())
    token = _token(site.prepare()(Launch(token="one", count=2)))
    with pytest.raises(NoAnswer, match="has not listed a machine 'i-1'"):  # lists lag behind
        site.join(token, "i-1")
    site.listed("one", "i-1")
    site.listed("another", "i-9")
    site.join(token, "i-1")
    with pytest.raises(CannotJoin, match="used up"):
        site.join(token, "i-1")
    for machine in ("made-up", "i-9"):
        with pytest.raises(NoAnswer, match="has not listed"):
            site.join(token, machine)
    site.listed("one", "i-2")
    site.join(token, "i-2")


def test_nothing_is_launched_that_could_reach_only_itself(site: Site, small_agent: Path) -> None:
    publish(site.records, site.stores.default, small_agent, now=utcnow())
    prepare = site.prepare(join_url=None, agent_redis_url=None)
    with pytest.raises(CloudError, match=r"redis_url is .*; join_url is http://127") as refused:
        prepare(Launch(token="one"))
    assert refused.value.trouble is Trouble.invalid


def test_simulated_machines_need_no_user_data(site: Site) -> None:
    group = SimulatedGroupSettings(kind="simulated")
    prepare = prepare_launch(
        "sim",
        group,
        settings=site.settings,
        records=site.records,
        stores=site.stores,
        secret_key=site.key,
    )
    assert prepare(Launch(token="one")) == Launch(token="one")


def _token(launch: Launch) -> str:
    line = next(one for one in launch.user_data.splitlines() if one.startswith("token="))
    assert len(launch.user_data.encode()) < 16 * 1024
    return line.removeprefix("token=").strip("'")
