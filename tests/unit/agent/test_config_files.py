"""The ten files and the variables of a job (CONTRACT 4.2 to 4.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from valohai_agent.config_files import HostFacts, build_environment, switch, write_config_files
from valohai_agent.host import host_facts, observe_host
from valohai_agent.protocol import Job, JobInput
from valohai_agent.workspace import Workspace


def _job(**fields: Any) -> Job:
    return Job(
        execution_id="e-1",
        group="gpu",
        project_id="p-1",
        project_name="o/p",
        step="train",
        commit="c",
        archive_sha256="",
        image="python:3.11",
        commands=["true"],
        **fields,
    )


def _written(tmp_path: Path, job: Job, **content: Any) -> dict[str, Any]:
    workspace = Workspace.create(tmp_path, "e-1", 1, "w")
    values = {"inputs": {}, "api": {}, "facts": HostFacts(hostname="h"), **content}
    write_config_files(workspace, job, **values)
    names = sorted(path.name for path in workspace.config.iterdir())
    stems = ["api", "execution", "inputs", "parameters", "runtime"]
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("json", "yaml"))
    read = {}
    for stem in stems:
        read[stem] = json.loads((workspace.config / f"{stem}.json").read_text())
        assert yaml.safe_load((workspace.config / f"{stem}.yaml").read_text()) == read[stem]
    return read


def test_k30_k31_ten_files_with_typed_flat_parameters(tmp_path: Path) -> None:
    values = {
        "lr": 1e-5,
        "n": 3,
        "flag": False,
        "names": ["a", "ü"],
        "date": "2026-01-01",
        "no": "no",
    }
    assert _written(tmp_path, _job(parameters=values))["parameters"] == values


def test_v30_k32_parameters_without_value_are_not_written(tmp_path: Path) -> None:
    assert _written(tmp_path, _job(parameters={"a": None, "b": 0}))["parameters"] == {"b": 0}


def test_k35_every_declared_input_is_listed(tmp_path: Path) -> None:
    job = _job(inputs=[JobInput(name="d", input_id="i")])
    assert _written(tmp_path, job)["inputs"] == {"d": {"input_id": "i", "files": []}}


def test_k36_k37_execution_and_runtime(tmp_path: Path) -> None:
    config = {"valohai.execution-id": "e-1", "valohai.environment-slug": "gpu-slug"}
    read = _written(tmp_path, _job(execution_config=config))
    assert read["execution"] == config
    assert read["runtime"]["environment_slug"] == "gpu-slug"
    assert read["runtime"]["queue"] == "gpu"


def test_k10_k73_identity_variables_win_and_users_variables_beat_secrets(tmp_path: Path) -> None:
    job = _job(
        environment_variables={"VH_JOB_ID": "mine", "A": "job", "VALOHAI_PORT": "80"},
        execution_config={"valohai.pipeline-id": "pl"},
    )
    environment = build_environment(
        job,
        secrets={"A": "secret", "B": "secret"},
        valohai_dir="/valohai",
        facts=HostFacts(local_ip="10.0.0.1"),
    )
    assert environment["VH_JOB_ID"] == "exec-e-1"
    assert environment["VH_CONFIG_DIR"] == "/valohai/config"
    assert environment["VH_PIPELINE_ID"] == "pl"
    assert (environment["A"], environment["B"]) == ("job", "secret")
    assert environment["VH_PUBLIC_IP"] == environment["VH_LOCAL_IP"] == "10.0.0.1"
    assert "VALOHAI_PORT" not in environment
    assert "VH_TASK_ID" not in environment


def test_k11_addresses_are_set_when_known_and_the_private_one_stands_in_for_the_public(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On every kind of machine; stated by the bootstrap, else found by the agent."""
    monkeypatch.setenv("VALOHAI_AGENT_LOCAL_IP", "10.1.2.3")

    def made() -> dict[str, str]:
        facts = host_facts(observe_host(), worker="w", runtime="process")
        return build_environment(_job(), secrets={}, valohai_dir="/v", facts=facts)

    assert (made()["VH_LOCAL_IP"], made()["VH_PUBLIC_IP"]) == ("10.1.2.3", "10.1.2.3")
    monkeypatch.setenv("VALOHAI_AGENT_PUBLIC_IP", "203.0.113.9")
    assert (made()["VH_LOCAL_IP"], made()["VH_PUBLIC_IP"]) == ("10.1.2.3", "203.0.113.9")


def test_c28_python_is_unbuffered_unless_the_user_says_otherwise() -> None:
    def made(**variables: str) -> dict[str, str]:
        job = _job(environment_variables=variables)
        return build_environment(job, secrets={}, valohai_dir="/v", facts=HostFacts())

    assert made()["PYTHONUNBUFFERED"] == "1"
    assert made(PYTHONUNBUFFERED="")["PYTHONUNBUFFERED"] == ""
    assert "VH_LOCAL_IP" not in made()


def test_switches_know_three_words_for_yes() -> None:
    assert all(switch({"X": value}, "X") for value in ("1", "yes", "TRUE"))
    assert not any(switch({"X": value}, "X") for value in ("0", "no", "", "on"))


def test_the_command_gets_the_trace_that_its_execution_belongs_to() -> None:
    def variables(**fields: Any) -> dict[str, str]:
        facts = HostFacts(hostname="h")
        return build_environment(_job(**fields), secrets={}, valohai_dir="/v", facts=facts)

    trace = {"traceparent": "00-1-2-01", "other": "x"}
    assert variables(trace=trace)["TRACEPARENT"] == "00-1-2-01"
    own = variables(trace=trace, environment_variables={"TRACEPARENT": "mine"})
    assert own["TRACEPARENT"] == "mine"
    assert "TRACEPARENT" not in variables()
