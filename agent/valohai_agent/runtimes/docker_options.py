"""Decides the options of a container from the job's variables; no I/O (K-23 to K-25, K-51 to K-58)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from valohai_agent.protocol import JobMount
from valohai_agent.runtimes.base import RunSpec

UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
GPU_DEFAULTS = {
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resources of one container; None means as the machine has it."""

    memory: int | None = None
    shm: int | None = None
    nano_cpus: int | None = None
    cpuset: str | None = None
    ports: Mapping[str, int] | None = None
    network: str = "bridge"


def plan_limits(environment: Mapping[str, str], machine_memory: int) -> Limits:
    """Reads VH_CPU_LIMIT, VH_MEMORY_LIMIT, VH_SHM_SIZE, VH_EXPOSE_PORTS and VH_DOCKER_NETWORK.

    Raises ValueError naming the variable. Shared memory is half of the machine's memory unless given
    (K-57); with the host's network there are no ports to expose (K-24).
    """
    network = environment.get("VH_DOCKER_NETWORK", "").strip() or "bridge"
    nano_cpus, cpuset = _cpus(environment.get("VH_CPU_LIMIT", "").strip())
    return Limits(
        memory=_size(environment, "VH_MEMORY_LIMIT"),
        shm=_size(environment, "VH_SHM_SIZE") or machine_memory // 2 or None,
        nano_cpus=nano_cpus,
        cpuset=cpuset,
        ports=None if network == "host" else _ports(environment.get("VH_EXPOSE_PORTS", "")),
        network=network,
    )


_OF_THE_CONTAINER = frozenset(
    {"entrypoint", "environment", "working_dir", "stdin_open", "tty", "user"}
)


def container_options(
    spec: RunSpec, limits: Limits, *, gpus: bool, image: Mapping[str, str]
) -> dict[str, Any]:
    """Keyword arguments as for `containers.create`. `image` holds the variables the image defines."""
    from docker.types import LogConfig

    environment = {"TINI_KILL_PROCESS_GROUP": "1", **spec.environment}
    options: dict[str, Any] = {
        "entrypoint": [],
        "environment": environment,
        "working_dir": "/valohai/repository",
        "init": True,
        "stdin_open": False,
        "tty": False,
        "network_mode": limits.network,
        "mounts": _mounts(spec),
        # SELinux would hide the bind mounts; systems without it ignore the option.
        "security_opt": ["label=disable"],
        # Our attach reads the output; a second copy on the host would hold unmasked secrets.
        "log_config": LogConfig(type="none"),
        "shm_size": limits.shm,
        "mem_limit": limits.memory,
        "memswap_limit": limits.memory,
        "nano_cpus": limits.nano_cpus,
        "cpuset_cpus": limits.cpuset,
        "ports": limits.ports,
    }
    if limits.network == "bridge":
        options["extra_hosts"] = {"host.docker.internal": "host-gateway"}
    if not spec.respect_image_user:
        options["user"] = "0:0"
    if gpus and spec.gpus != "none":
        options["device_requests"] = [_gpu_request(spec.gpus)]
        options["environment"] = {
            **{k: v for k, v in GPU_DEFAULTS.items() if k not in image},
            **environment,
        }
    return {key: value for key, value in options.items() if value is not None}


def split_options(
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """The same as the API has them: of the container, of its host, and the ports it listens on."""
    own = {key: value for key, value in options.items() if key in _OF_THE_CONTAINER}
    host = {key: value for key, value in options.items() if key not in _OF_THE_CONTAINER}
    bindings: Mapping[str, int] = host.pop("ports", {})
    if bindings:
        host["port_bindings"] = bindings
    ports = [(number, protocol) for number, _, protocol in (p.partition("/") for p in bindings)]
    return own, host, ports


def _mounts(spec: RunSpec) -> list[Any]:
    from docker.types import Mount

    workspace = spec.workspace
    mounts = [
        Mount("/valohai/repository", str(workspace.repository), type="bind"),
        Mount("/valohai/inputs", str(workspace.inputs), type="bind", read_only=True),
        Mount("/valohai/outputs", str(workspace.outputs), type="bind"),
        Mount("/valohai/config", str(workspace.config), type="bind", read_only=True),
        Mount("/valohai/.command", str(workspace.run / "command"), type="bind", read_only=True),
    ]
    mounts += [
        Mount(f"/valohai/inputs/{name}", str(workspace.inputs / name), type="bind")
        for name in spec.writable_inputs
    ]
    mounts += [
        Mount(f"/valohai/inputs/{name}", str(directory), type="bind", read_only=True)
        for name, directory in workspace.in_place.items()
    ]
    return mounts + [_user_mount(mount) for mount in spec.mounts]


def _user_mount(mount: JobMount) -> Any:
    """A directory of the machine, or a volume such as NFS that Docker's local driver mounts."""
    from docker.types import DriverConfig, Mount

    if mount.type in (None, "", "bind"):
        return Mount(mount.destination, mount.source, type="bind", read_only=mount.readonly)
    options = {str(k): str(v) for k, v in mount.options.items()}
    options.setdefault("type", mount.type)
    if mount.type == "nfs":
        host, _, path = mount.source.partition(":")
        options.setdefault("device", f":{path}")
        options["o"] = ",".join(filter(None, (f"addr={host}", options.get("o"))))
    else:
        options.setdefault("device", mount.source)
    driver = DriverConfig("local", options)
    return Mount(
        mount.destination, None, type="volume", read_only=mount.readonly, driver_config=driver
    )


def _gpu_request(gpus: str) -> Any:
    from docker.types import DeviceRequest

    if gpus in ("", "all"):
        return DeviceRequest(count=-1, capabilities=[["gpu"]])
    return DeviceRequest(device_ids=gpus.split(","), capabilities=[["gpu"]])


def _cpus(text: str) -> tuple[int | None, str | None]:
    """`2` is a number of cores, `0,2,4` a list of core indexes (K-23)."""
    if not text:
        return None, None
    if "," in text:
        if not all(part.strip().isdigit() for part in text.split(",") if part.strip()):
            raise ValueError(f"VH_CPU_LIMIT={text!r} is neither a number of cores nor a list")
        return None, ",".join(part.strip() for part in text.split(",") if part.strip())
    try:
        cores = float(text)
    except ValueError:
        cores = 0.0
    if not 0 < cores < 10_000:
        raise ValueError(f"VH_CPU_LIMIT={text!r} is neither a number of cores nor a list")
    return int(cores * 10**9), None


def _size(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip().lower()
    if not text:
        return None
    number = text.rstrip("bkmgt")
    unit = text[len(number) :]
    unit = unit[0] if len(unit) == 2 and unit[1] == "b" else unit
    try:
        value = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError(f"{name}={text!r} is no size; write for example 512m or 8g")
    return value


def _ports(text: str) -> dict[str, int] | None:
    """`host:container,...` as Docker wants it: container port to host port."""
    ports: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        host, _, container = pair.partition(":")
        container = container or host
        number, _, protocol = container.partition("/")
        if not (host.isdigit() and number.isdigit()) or protocol not in ("", "tcp", "udp"):
            raise ValueError(f"VH_EXPOSE_PORTS={text!r}: {pair!r} is not host:container")
        ports[f"{number}/{protocol or 'tcp'}"] = int(host)
    return ports or None
