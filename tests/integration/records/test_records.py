"""The records on SQLite and on a real Postgres: schema, transactions, concurrency, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from valohai_dagster.errors import ConfigurationError, RecordsUnavailable
from valohai_dagster.records import capacity_tables, schema, tables
from valohai_dagster.records.engine import Records, make_engine, open_records
from valohai_dagster.records.store import get_fact, insert_ignore, set_fact, upsert
from valohai_dagster.settings import Settings

NOW = datetime(2026, 5, 4, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=3)))


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    values: dict[str, Any] = {"state_dir": tmp_path / "state"}
    if request.param == "postgres":
        values["database_url"] = request.getfixturevalue("postgres_url")
    return Settings(**values)


@pytest.fixture
def records(database: Settings) -> Any:
    opened = open_records(database)
    yield opened
    opened.close()


def test_opening_twice_finds_the_same_deployment(records: Records, database: Settings) -> None:
    again = open_records(database)
    assert again.deployment_id == records.deployment_id
    assert len(again.deployment_id) == 12
    again.close()


def test_the_migrations_make_exactly_the_tables_of_the_code(records: Records) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    options = {
        "version_table": schema.VERSION_TABLE,
        "compare_type": _differs,
        "include_name": lambda name, kind, _: kind != "table" or str(name).startswith("vh_"),
    }
    with records.read() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, capacity_tables.metadata) == []


def _differs(context: Any, column: Any, wanted: Any, found: Any, wanted_type: Any) -> bool | None:
    """Our aware datetime is a plain one to the database."""
    return False if isinstance(wanted_type, tables.UtcDateTime) else None


def test_head_names_the_newest_migration(records: Records) -> None:
    from alembic.script import ScriptDirectory

    with records.read() as connection:
        scripts = ScriptDirectory.from_config(schema.alembic_config(connection))
        assert scripts.get_heads() == [schema.HEAD]
        assert schema.current_revision(connection) == schema.HEAD


def test_dagsters_own_tables_in_the_same_database_are_left_alone(database: Settings) -> None:
    engine = make_engine(database.records_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('dagster')"))
    opened = open_records(database)
    with opened.read() as connection:
        kept = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    assert kept == "dagster"
    opened.close()
    engine.dispose()


def test_files_of_lost_attempts_get_their_maker_back(database: Settings) -> None:
    """Releases up to schema 0002 forgot which execution had made them; uploads never had one."""
    from alembic import command

    engine = make_engine(database.records_url)
    row = {
        "project_id": "p",
        "counter": 1,
        "step": "s",
        "commit": "c",
        "group_name": "g",
        "image": "i",
    }
    filled = {"tags": [], "spec": {}, "retry_number": 0, "cumulative_metadata": {}, "phases": []}
    states = {"status": "complete", "attempt": 2, "stop_requested": 0, "priority": 0, "ctime": NOW}
    file = {"name": "f", "size": 1, "store": "local", "key": "k", "tags": [], "metadata": {}}
    grant = {"attempt": 1, "kind": "output", "name": "f", "store": "local", "key": "k"}
    with engine.begin() as connection:
        command.upgrade(schema.alembic_config(connection), "0002")
        old = sa.MetaData()
        old.reflect(connection, only=lambda name, _: name.startswith("vh_"))
        add = lambda table, /, **values: connection.execute(  # noqa: E731
            old.tables[f"vh_{table}"].insert().values(**values)
        )
        add("projects", id="p", name="p", counter=1, ctime=NOW)
        add("executions", id="e", **row, **filled, **states)
        for ident, maker in (("lost", None), ("kept", "e"), ("upload", None)):
            add("datums", id=ident, execution_id=maker, **file, live=False, ctime=NOW, purged=False)
            if ident != "upload":
                known = {"upload_id": ident, "execution_id": "e", "granted_at": NOW}
                add("grants", **known, **grant, accepted=True)
    engine.dispose()
    opened = open_records(database)
    with opened.read() as connection:
        d = tables.datums.c
        query = sa.select(d.id, d.execution_id, d.withdrawn).order_by(d.id)
        found = [tuple(one) for one in connection.execute(query)]
    opened.close()
    assert found == [("kept", "e", False), ("lost", "e", True), ("upload", None, False)]


def test_a_schema_of_a_newer_release_is_refused(database: Settings) -> None:
    opened = open_records(database)
    with opened.write() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'"))
    opened.close()
    with pytest.raises(ConfigurationError, match=r"'9999'.*newer release.*Upgrade valohai-dagster"):
        open_records(database)


OPEN = """
import sys
from pathlib import Path
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings
url = sys.argv[2] or None
records = open_records(Settings(state_dir=Path(sys.argv[1]), database_url=url))
print(records.deployment_id)
"""


def test_processes_that_open_new_records_at_once_migrate_once(database: Settings) -> None:
    arguments = [sys.executable, "-c", OPEN, str(database.state_dir), database.database_url or ""]
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1


def test_a_write_is_committed_whole_or_not_at_all(records: Records) -> None:
    with records.write() as connection:
        set_fact(connection, "a", 1)
    with pytest.raises(ZeroDivisionError), records.write() as connection:
        set_fact(connection, "a", 1 // len(set_and_nothing(connection)))
    with records.read() as connection:
        assert get_fact(connection, "a") == 1
        assert get_fact(connection, "b") is None


def set_and_nothing(connection: sa.Connection) -> str:
    set_fact(connection, "a", 2)
    return ""


def test_writers_wait_for_each_other_and_lose_nothing(records: Records) -> None:
    c = tables.projects.c
    with records.write() as connection:
        insert_ignore(connection, tables.projects, id="p", name="p", counter=0, ctime=NOW)

    def count() -> None:
        for _ in range(10):
            with records.write() as connection:
                connection.execute(
                    tables.projects.update().where(c.id == "p").values(counter=c.counter + 1)
                )
                connection.execute(sa.select(c.counter)).scalar_one()

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with records.read() as connection:
        assert connection.execute(sa.select(c.counter)).scalar_one() == 60


def test_times_come_back_aware_in_utc_with_microseconds(records: Records) -> None:
    with records.write() as connection:
        insert_ignore(connection, tables.projects, id="p", name="p", counter=0, ctime=NOW)
    with records.read() as connection:
        found = connection.execute(sa.select(tables.projects.c.ctime)).scalar_one()
    assert found == NOW
    assert found.utcoffset() == timedelta(0)


def test_a_naive_time_is_refused(records: Records) -> None:
    naive = NOW.replace(tzinfo=None)
    with (
        pytest.raises(exc.StatementError, match="naive datetime"),
        records.write() as connection,
    ):
        insert_ignore(connection, tables.projects, id="p", name="p", counter=0, ctime=naive)


def test_insert_ignore_and_upsert(records: Records) -> None:
    with records.write() as connection:
        assert insert_ignore(connection, tables.facts, name="x", value=[1])
        assert not insert_ignore(connection, tables.facts, name="x", value=[2])
        assert get_fact(connection, "x") == [1]
        upsert(connection, tables.facts, name="x", value={"y": "ä\n"})
        assert get_fact(connection, "x") == {"y": "ä\n"}


def test_foreign_keys_hold(records: Records) -> None:
    with pytest.raises(exc.IntegrityError), records.write() as connection:
        insert_ignore(
            connection, tables.attempts, execution_id="nobody", number=1, last_seq=0, logs={}
        )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nonsense", r"database_url: 'nonsense' is not a database URL"),
        ("no password here@", r"database_url: the value is not a database URL"),
        ("mysql://u:hunter2@h/d", r"mysql is not supported; use postgresql://"),
        ("postgresql+nodriver://u:hunter2@h/d", r"database_url"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_password(
    url: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=expected) as caught:
        open_records(Settings(state_dir=tmp_path, database_url=url))
    assert "hunter2" not in str(caught.value)


def test_a_database_that_is_down_is_unavailable_and_named_without_its_password(
    tmp_path: Path,
) -> None:
    settings = Settings(state_dir=tmp_path, database_url="postgres://u:hunter2@127.0.0.1:1/d")
    with pytest.raises(
        RecordsUnavailable, match=r"u:\*\*\*@127.0.0.1:1/d.*refused.*doctor"
    ) as caught:
        open_records(settings)
    assert "hunter2" not in str(caught.value)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RecordsUnavailable, match=r"cannot make the directory .*file/state.*VALOHAI_STATE"
    ):
        open_records(Settings(state_dir=tmp_path / "file" / "state"))


def test_a_damaged_records_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(
        RecordsUnavailable, match=r"records\.db cannot be opened: file is not a database"
    ):
        open_records(Settings(state_dir=tmp_path))
