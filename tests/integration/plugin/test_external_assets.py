"""External inputs as observable assets: observing, what fires then, and what is said when it fails."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey, DagsterInstance
from dagster._core.definitions.observe import observe as observe_now

from tests.support.dagster_face import FakeBackend
from tests.support.servers.s3_stores import s3_store
from tests.support.web import Web, content, serve, status
from valohai_agent.protocol import utcnow
from valohai_dagster import build_observe_sensor, load_valohai_project
from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.datasets import create_version
from valohai_dagster.data.datums import Datum, create_datum
from valohai_dagster.data.observation import version_used
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.executions.stream import InputView
from valohai_dagster.plugin.compat import DATA_VERSION_TAG
from valohai_dagster.plugin.external import observe_all
from valohai_dagster.projects.names import legal_name
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

PREP = AssetKey(["digits", "prep"])


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as found:
        yield found


def defs_of(tmp_path: Path, *uris: str, **options: Any) -> dg.Definitions:
    project = tmp_path / "digits"
    project.mkdir(exist_ok=True)
    inputs = "".join(f"      - {{name: i{n}, default: '{uri}'}}\n" for n, uri in enumerate(uris))
    (project / "valohai.yaml").write_text(
        f"- step:\n    name: prep\n    image: i\n    command: c\n    inputs:\n{inputs}"
    )
    backend = FakeBackend()
    return load_valohai_project(project, open_backend=lambda: backend, **options)


def sources(defs: dg.Definitions) -> list[dg.AssetsDefinition]:
    return [one for one in definitions_of(defs) if one.is_observable]


def definitions_of(defs: dg.Definitions) -> list[dg.AssetsDefinition]:
    return [one for one in defs.assets or () if isinstance(one, dg.AssetsDefinition)]


def versions(instance: DagsterInstance, key: AssetKey) -> list[str]:
    """Oldest first."""
    records = instance.fetch_observations(key, limit=100).records
    found = [record.asset_observation for record in reversed(records)]
    return [(one.tags or {})[DATA_VERSION_TAG] for one in found if one is not None]


def test_a_web_file_is_known_by_its_etag_or_by_its_content(
    tmp_path: Path, web: Web, instance: DagsterInstance
) -> None:
    web.answers["/a.csv"] = [
        content(b"abc", ETag='"v1"', Last_Modified="Mon, 01 Jan 2026 00:00:00 GMT")
    ]
    web.answers["/b.csv"] = [content(b"abc")]
    defs = defs_of(tmp_path, web.url("/a.csv") + "?token=geheim", web.url("/b.csv"))
    (observable,) = sources(defs)
    assert observe_now([observable], instance=instance).success
    by_name = {key.path[-1].partition("_csv")[0]: key for key in observable.keys}
    assert versions(instance, by_name["a"]) == ["v1"]
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert versions(instance, by_name["b"]) == [digest]
    record = instance.fetch_observations(by_name["a"], limit=1).records[0]
    assert record.asset_observation is not None
    metadata = record.asset_observation.metadata
    assert (metadata["size"].value, metadata["count"].value) == (3, 1)
    assert "mtime" in metadata
    texts = [str(key) for key in observable.keys] + [str(metadata), str(observable.specs_by_key)]
    assert "geheim" not in "".join(texts)


def test_the_log_does_not_repeat_the_credentials_of_an_address_that_is_observed(web: Web) -> None:
    """In a process of its own, which has not met any store."""
    web.answers["/a.csv"] = [content(b"abc")]
    url = web.url("/a.csv").replace("//", "//me:geheim@") + "?token=geheim"
    code = (
        "import logging, sys; logging.basicConfig(level='INFO')\n"
        "from valohai_dagster.data.observation import ask_server\n"
        "print(ask_server(sys.argv[1], 'shown'))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, check=True, timeout=120
    )
    assert "HTTP Request: GET" in ran.stderr
    assert "size=3" in ran.stdout
    assert "geheim" not in ran.stderr + ran.stdout


def test_what_cannot_be_observed_is_named_and_keeps_nothing_else_from_it(
    tmp_path: Path, web: Web, instance: DagsterInstance
) -> None:
    web.answers["/denied.csv"] = [status(403)]
    web.answers["/good.csv"] = [content(b"abc", ETag='"v1"')]
    defs = defs_of(
        tmp_path,
        web.url("/denied.csv") + "?sig=geheim",
        "http://127.0.0.1:9/down.csv",
        "store://nowhere/x.csv",
        "store://local/missing.csv",
        "datum://nobody",
        web.url("/good.csv"),
    )
    (observable,) = sources(defs)
    result = observe_now([observable], instance=instance, raise_on_error=False)
    assert not result.success
    failure = next(event for event in result.all_events if event.is_step_failure)
    text = str(failure.step_failure_data.user_failure_data or failure.step_failure_data.error)
    assert "geheim" not in text
    for words in (
        "answers 403, denied",
        "does not answer (ConnectError)",
        "there is no such store",
        "store://local/missing.csv cannot be observed",
        "datum://nobody",
    ):
        assert words in text
    good = next(key for key in observable.keys if key.path[-1] == "good_csv")
    assert versions(instance, good) == ["v1"]


def test_an_alias_and_a_listing_change_with_what_they_name(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    settings = load_settings()
    store = settings.state_dir / "store"
    (store / "in").mkdir(parents=True)
    (store / "in" / "a.csv").write_text("a")
    defs = defs_of(tmp_path, "datum://weights", "store://local/in/*.csv")
    alias, listing = (
        AssetKey(["digits", "external", *path])
        for path in (("datum", "weights"), ("store", "local", "in_any_csv"))
    )
    records = open_records(settings)
    for number in (1, 2):
        datum = Datum(
            id=f"0000000{number}-0000-4000-8000-000000000000",
            name="w",
            size=1,
            store="local",
            key=f"w{number}",
            ctime=utcnow(),
            sha256=str(number) * 64,
        )
        with records.write() as connection:
            project = ensure_project(connection, "digits", utcnow())
            create_datum(connection, datum)
            set_alias(
                connection, project_id=project, name="weights", datum_id=datum.id, now=utcnow()
            )
        (store / "in" / f"{number}.csv").write_text("b")
        (store / "in" / f"{number}.txt").write_text("not of the pattern")
        assert observe_now(sources(defs), instance=instance).success
    records.close()
    assert versions(instance, alias) == ["1" * 64, "2" * 64]
    first, second = versions(instance, listing)
    assert first != second
    record = instance.fetch_observations(listing, limit=1).records[0]
    assert record.asset_observation is not None
    assert record.asset_observation.metadata["count"].value == 3


def test_a_dataset_is_known_by_the_names_and_checksums_of_its_files(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    """Other datums with the same content are no change, and what an execution took of them is the same version."""
    defs = defs_of(tmp_path, "dataset://faces/latest")
    records = open_records(load_settings())
    contents = [
        {"a/x.png": "1", "b/y.png": "2"},
        {"a/x.png": "1", "b/y.png": "2"},
        {"a/x.png": "1", "b/z.png": "2"},
        {"a/x.png": "1", "b/z.png": "3"},
    ]
    made: list[list[Datum]] = []
    for number, names in enumerate(contents):
        files = [
            Datum(
                id=f"0000000{number}-0000-4000-8000-{position:012}",
                name=name,
                size=1,
                store="local",
                key=f"{number}/{position}",
                ctime=utcnow(),
                sha256=digit * 64,
            )
            for position, (name, digit) in enumerate(names.items())
        ]
        made.append(files)
        with records.write() as connection:
            project = ensure_project(connection, "digits", utcnow())
            for datum in files:
                create_datum(connection, datum)
            create_version(
                connection,
                project_id=project,
                uri=f"dataset://faces/v{number}",
                datum_ids=[datum.id for datum in files],
                now=utcnow(),
            )
        assert observe_now(sources(defs), instance=instance).success
    records.close()
    key = AssetKey(["digits", "external", "dataset", "faces", "latest"])
    first, second, renamed, changed = versions(instance, key)
    assert first == second
    assert len({first, renamed, changed}) == 3
    used = [
        InputView(input="i", name=d.name, uri=d.uri, datum_id=d.id, sha256=d.sha256)
        for d in made[0]
    ]
    assert version_used(used, is_pattern=True) == first


def test_the_sensor_tells_changes_only_and_eager_then_requests_the_step(
    tmp_path: Path, web: Web, instance: DagsterInstance
) -> None:
    """Upstream changed: the observation sees it, and the automation condition of the step fires."""
    web.answers["/a.csv"] = [content(b"abc", ETag='"v1"')]
    loaded = defs_of(tmp_path, web.url("/a.csv"))
    eager = dg.AutomationCondition.eager()
    assets = dg.map_asset_specs(
        lambda spec: (
            spec.replace_attributes(automation_condition=eager) if spec.key == PREP else spec
        ),
        definitions_of(loaded),
    )
    sensor = build_observe_sensor(projects=["digits"])
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    defs = dg.Definitions(assets, sensors=[sensor])

    def tick() -> int:
        with dg.build_sensor_context(instance=instance) as context:
            found = sensor.evaluate_tick(context)
        for event in found.asset_events:
            assert isinstance(event, dg.AssetObservation)
            instance.report_runless_asset_event(event)
        return len(found.asset_events)

    assert tick() == 1
    assert dg.materialize(definitions_of(defs), instance=instance, selection=[PREP]).success
    first = dg.evaluate_automation_conditions(defs=defs, instance=instance)
    assert first.get_num_requested(PREP) == 0
    assert tick() == 0
    second = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=first.cursor)
    assert second.get_num_requested(PREP) == 0
    web.answers["/a.csv"] = [content(b"other", ETag='"v2"')]
    assert tick() == 1
    third = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=second.cursor)
    assert third.get_num_requested(PREP) == 1


def test_loading_warns_of_nothing_that_is_ours_to_decide(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sources(defs_of(tmp_path, "https://h/a.csv"))
    assert [str(one.message) for one in caught if one.category is dg.BetaWarning] == []


def test_external_assets_can_be_switched_off(tmp_path: Path) -> None:
    defs = defs_of(tmp_path, "s3://bucket/a.csv", external_assets=False)
    assert sources(defs) == []
    graph = dg.Definitions(defs.assets).resolve_asset_graph()
    assert graph.get(PREP).parent_keys == set()
    assert list(observe_all("digits", [])) == []


@pytest.mark.stores
def test_objects_of_a_bucket_are_known_as_their_store_calls_them(
    tmp_path: Path, moto_server: str, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the stores of the settings: one object by its ETag, a prefix by its listing, a bucket that is not there."""
    store = s3_store(moto_server)
    name = store.uri("x").split("/")[2]
    config = tmp_path / "valohai.toml"
    lines = ["[stores.cloud]", 'kind = "s3"', f'bucket = "{name}"']
    lines += [f'endpoint_url = "{moto_server}"', 'region = "us-east-1"']
    lines += ['access_key_id = "testing"', 'secret_access_key = "testing"']
    lines += ["[stores.gone]", 'kind = "s3"', 'bucket = "no-such-bucket"', *lines[3:]]
    config.write_text("\n".join(lines))
    monkeypatch.setenv("VALOHAI_CONFIG", str(config))
    etag = store.put("one.csv", b"one").version
    store.put("many/a.csv", b"a")
    uris = [f"s3://{name}/one.csv", f"s3://{name}/many/", "s3://no-such-bucket/x"]
    (observable,) = sources(defs_of(tmp_path, *uris))
    result = observe_now([observable], instance=instance, raise_on_error=False)
    assert not result.success
    bucket = legal_name(name)
    one = AssetKey(["digits", "external", "s3", bucket, "one_csv"])
    many = AssetKey(["digits", "external", "s3", bucket, "many_all_below"])
    assert versions(instance, one) == [etag]
    store.put("many/b.csv", b"b")
    observe_now([observable], instance=instance, raise_on_error=False)
    first, second = versions(instance, many)
    assert first != second
    failure = next(event for event in result.all_events if event.is_step_failure)
    text = str(failure.step_failure_data.user_failure_data or failure.step_failure_data.error)
    assert "s3://no-such-bucket/x cannot be observed" in text
    assert "testing" not in text
