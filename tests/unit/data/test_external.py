"""What the steps of a project read from outside, and how it is named."""

from __future__ import annotations

from tests.support.dagster_face import project_of
from valohai_dagster.data.external import ExternalSource, external_sources

YAML = """
- step:
    name: prep
    image: i
    command: c
    environment: gpu
    inputs:
      - {name: table, default: "s3://bucket/raw/data-1.csv"}
      - name: pictures
        default: ["s3://bucket/pictures/*", "https://me:pw@host.example:8443/a%20b.zip?v=2&token=abc"]
        keep-directories: suffix
      - {name: alias, default: "datum://weights"}
      - {name: fixed, default: "datum://0190a7c6-0000-4000-8000-000000000000"}
      - {name: set, default: "dataset://faces/latest"}
      - {name: dynamic, default: "s3://bucket/{parameter:day}/x.csv"}
      - {name: none}
    parameters:
      - {name: day, type: string, default: monday}
- step:
    name: train
    image: i
    command: c
    inputs:
      - {name: table, default: "s3://bucket/raw/data-1.csv"}
      - {name: fed, default: "s3://bucket/never"}
      - {name: dir, default: "file:///data/in/"}
- pipeline:
    name: all
    nodes:
      - {name: prep, type: execution, step: prep}
      - {name: train, type: execution, step: train}
    edges:
      - [prep.output.*, train.input.fed]
"""


def sources(text: str = YAML) -> dict[str, ExternalSource]:
    project = project_of(text)
    found = external_sources(project.asset_name, project.steps, project.edges)
    return {"/".join(source.path[2:]): source for source in found}


def test_keys_are_made_of_the_uri_alone() -> None:
    assert list(sources()) == [
        "s3/bucket/raw/data_1_csv",
        "s3/bucket/pictures_all_below",
        "https/host_example_8443/a_b_zip_" + list(sources())[2][-8:],
        "datum/weights",
        "dataset/faces/latest",
        "file/data/in_all_below",
    ]
    assert all(source.path[:2] == ("digits", "external") for source in sources().values())


def test_one_source_of_two_steps_is_one_asset() -> None:
    found = sources()["s3/bucket/raw/data_1_csv"]
    assert [(use.step, use.input) for use in found.uses] == [("prep", "table"), ("train", "table")]
    assert found.environment == "gpu"


def test_neither_keys_nor_uris_show_credentials() -> None:
    found = next(s for s in sources().values() if s.uri.startswith("https"))
    assert "pw" not in found.uri
    assert "abc" not in found.uri
    assert found.read == "https://me:pw@host.example:8443/a%20b.zip?v=2&token=abc"
    assert not {"pw", "abc", "me"} & set("_".join(found.path).split("_"))


def test_what_is_spelled_alike_is_told_apart() -> None:
    text = """
- step:
    name: a
    image: i
    command: c
    inputs:
      - {name: x, default: ["s3://b/data.csv", "s3://b/data-csv", "s3://b/other"]}
"""
    keys = list(sources(text))
    assert len(set(keys)) == 3
    assert keys[2] == "s3/b/other"
    assert all(key.startswith("s3/b/data_csv_") for key in keys[:2])
