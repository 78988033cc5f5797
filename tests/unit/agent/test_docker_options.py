"""What the job's variables mean to a container (K-23 to K-25, K-51 to K-58)."""

from __future__ import annotations

from pathlib import Path

import pytest

from valohai_agent.protocol import JobMount
from valohai_agent.runtimes.base import RunSpec
from valohai_agent.runtimes.docker_options import Limits, container_options, plan_limits
from valohai_agent.workspace import Workspace


def _options(tmp_path: Path, *, gpus: bool = False, image: dict | None = None, **fields) -> dict:
    workspace = Workspace(tmp_path, "e", 1, "w", -1)
    spec = RunSpec(workspace=workspace, image="i", commands=["true"], **fields)
    return container_options(
        spec, plan_limits(spec.environment, 8 * 2**30), gpus=gpus, image=image or {}
    )


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("VH_CPU_LIMIT", "2", {"nano_cpus": 2 * 10**9}),
        ("VH_CPU_LIMIT", "0.5", {"nano_cpus": 5 * 10**8}),
        ("VH_CPU_LIMIT", "0,2,4", {"cpuset": "0,2,4"}),
        ("VH_MEMORY_LIMIT", "512m", {"memory": 512 * 2**20}),
        ("VH_MEMORY_LIMIT", "8GB", {"memory": 8 * 2**30}),
        ("VH_SHM_SIZE", "1.5g", {"shm": 3 * 2**29}),
        ("VH_EXPOSE_PORTS", "8080:80, 9000", {"ports": {"80/tcp": 8080, "9000/tcp": 9000}}),
        ("VH_DOCKER_NETWORK", "host", {"network": "host"}),
    ],
)
def test_k23_to_k25_limits_are_read(variable: str, value: str, expected: dict) -> None:
    limits = plan_limits({variable: value}, 0)
    assert limits == Limits(**expected)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VH_CPU_LIMIT", "many"),
        ("VH_CPU_LIMIT", "0"),
        ("VH_CPU_LIMIT", "1,x"),
        ("VH_MEMORY_LIMIT", "lots"),
        ("VH_MEMORY_LIMIT", "-1g"),
        ("VH_SHM_SIZE", "1q"),
        ("VH_EXPOSE_PORTS", "web:80"),
    ],
)
def test_a_wrong_limit_is_refused_by_name(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=variable):
        plan_limits({variable: value}, 0)


def test_k24_the_host_network_exposes_no_ports() -> None:
    limits = plan_limits({"VH_DOCKER_NETWORK": "host", "VH_EXPOSE_PORTS": "1:1"}, 0)
    assert limits.ports is None


def test_k57_shared_memory_is_half_of_the_machine(tmp_path: Path) -> None:
    assert _options(tmp_path)["shm_size"] == 4 * 2**30


def test_k51_k52_root_init_and_no_entrypoint(tmp_path: Path) -> None:
    options = _options(tmp_path)
    assert options["user"] == "0:0"
    assert options["init"] is True
    assert options["entrypoint"] == []
    assert options["network_mode"] == "bridge"


def test_k51_the_images_user_is_kept_if_asked(tmp_path: Path) -> None:
    assert "user" not in _options(tmp_path, respect_image_user=True)


def test_k03_inputs_and_config_are_read_only_but_on_demand_inputs(tmp_path: Path) -> None:
    mounts = {
        m["Target"]: m.get("ReadOnly", False) or False
        for m in _options(tmp_path, writable_inputs=["lazy"])["mounts"]
    }
    assert mounts["/valohai/inputs"] is True
    assert mounts["/valohai/config"] is True
    assert mounts["/valohai/inputs/lazy"] is False
    assert mounts["/valohai/outputs"] is False


def test_k55_k56_gpus_and_their_variables_unless_the_image_has_them(tmp_path: Path) -> None:
    options = _options(tmp_path, gpus=True, image={"NVIDIA_VISIBLE_DEVICES": "0"})
    assert options["device_requests"][0]["Count"] == -1
    assert "NVIDIA_VISIBLE_DEVICES" not in options["environment"]
    assert options["environment"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_k55_one_gpu_by_its_id(tmp_path: Path) -> None:
    request = (
        _options(tmp_path, gpus=True, image={})
        and _options(tmp_path, gpus=True)["device_requests"][0]
    )
    assert request["DeviceIDs"] == []
    workspace = Workspace(tmp_path, "e", 1, "w", -1)
    spec = RunSpec(workspace=workspace, image="i", commands=[], gpus="GPU-1")
    options = container_options(spec, plan_limits({}, 0), gpus=True, image={})
    assert options["device_requests"][0]["DeviceIDs"] == ["GPU-1"]


def test_no_gpus_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    assert "device_requests" not in _options(tmp_path)


def test_k58_an_nfs_mount_becomes_a_volume(tmp_path: Path) -> None:
    mount = JobMount(source="10.0.0.1:/share", destination="/mnt/s", type="nfs", readonly=True)
    made = _options(tmp_path, mounts=[mount])["mounts"][-1]
    assert made["Type"] == "volume"
    options = made["VolumeOptions"]["DriverConfig"]["Options"]
    assert options == {"type": "nfs", "device": ":/share", "o": "addr=10.0.0.1"}
