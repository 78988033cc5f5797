"""`[groups.NAME]`: worker groups, one model per kind, chosen by `kind` (CONTRACT 12.1).

A group is a queue and the machines that serve it: one instance type in one region. Whatever the kind, `slots` and the
options of agents mean the same; groups of clouds have machines that come when there is work and go after it.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Optional, Union

from pydantic import Field, SecretStr, Tag, field_validator, model_validator

from valohai_dagster.settings_base import Section, by_kind


class AnyGroupSettings(Section):
    """What all of them have."""

    runtime: Literal["auto", "docker", "process"] = Field(
        default="auto",
        description="How agents run commands; `auto` is Docker when its daemon answers, else processes.",
    )
    slots: int = Field(
        default=2, ge=1, description="Executions that one agent runs at the same time."
    )
    mounts_allowed: bool = Field(
        default=False,
        description="Let steps mount directories of the worker machine (`mounts` of valohai.yaml).",
    )
    local_stores: bool = Field(
        default=True,
        description="The group's workers see the directories of `local` stores at the same paths: they run on this host, "
        "or mount them. With `false`, executions that need such a store are refused when they are submitted. "
        "Groups of kind `local` always see them.",
    )
    fail_fast: bool = Field(
        default=False,
        description="End a step at its first failing command instead of its last.",
    )
    respect_image_user: bool = Field(
        default=False,
        description="Run containers as the user that the image names instead of root.",
    )
    file_inputs: list[Path] = Field(
        default_factory=list,
        description="Directories below which `file:///...` inputs may be read. Needs a group on this host.",
    )
    cache_max_gb: float | None = Field(
        default=None,
        ge=0,
        description="Input files that each worker keeps for later executions, in GB (10^9 bytes). Default: as many as "
        "the disk allows.",
    )
    cache_disk_percent: float = Field(
        default=80.0,
        ge=1,
        le=100,
        description="How full a worker's disk may get before input files that it keeps are removed.",
    )
    shared_cache: Path | None = Field(
        default=None,
        description="Directory of a file server (NFS, SMB) that all workers of the group have mounted: inputs are fetched "
        "once for all of them and used there. Agents that somebody else starts have `--shared-cache`.",
    )
    shared_cache_copy: bool = Field(
        default=False,
        description="Copy inputs from the shared cache to the worker's own disk before they are used.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the agent processes (not of the executions).",
    )
    enabled: bool = Field(
        default=True, description="`false`: nothing can be launched in the group (E-01)."
    )
    owner: str | None = Field(
        default=None,
        description="Who may use the group: `user:NAME`, `team:NAME` or `organization:NAME`. Default: everybody.",
    )
    per_user_quota: int = Field(
        default=0,
        ge=0,
        description="Executions that one user may have on the group's machines at once; 0: no limit (L-11).",
    )
    team_quotas: dict[str, int] = Field(
        default_factory=dict,
        description="The same for all members of a team together. With any entry, teams without one and teams with 0 have no "
        "access (L-12).",
    )
    price_per_hour: Decimal | None = Field(
        default=None,
        ge=0,
        description="What one machine costs per hour, for the prices of executions (L-40). Default: unknown.",
    )

    @field_validator("owner")
    @classmethod
    def _owner_is_named(cls, value: str | None) -> str | None:
        kind, _, name = (value or "").partition(":")
        if value is not None and (kind not in ("user", "team", "organization") or not name):
            raise ValueError("must be user:NAME, team:NAME or organization:NAME")
        return value

    @field_validator("team_quotas")
    @classmethod
    def _not_negative(cls, quotas: dict[str, int]) -> dict[str, int]:
        for team, quota in quotas.items():
            if quota < 0:
                raise ValueError(f"{team} = {quota} is negative; 0 means no access")
        return quotas


class LocalGroupSettings(AnyGroupSettings):
    """Agent processes on this host, started when there is work."""

    kind: Literal["local"] = Field(default="local", description="`local`, also when not stated.")
    max_agents: int = Field(default=1, ge=0, description="Most agent processes at once.")
    scale_down_grace_seconds: float = Field(
        default=60.0, ge=0, description="Idle time after which an agent is stopped."
    )


class StaticGroupSettings(AnyGroupSettings):
    """Registered machines, on your premises or anywhere: agents that somebody else starts. No scaling."""

    kind: Literal["static"] = Field(description="`static`.")


class CloudGroupSettings(AnyGroupSettings):
    """What all groups have whose machines come and go."""

    slots: int = Field(
        default=1, ge=1, description="Executions that one agent runs at the same time (E-30)."
    )
    local_stores: bool = Field(
        default=False,
        description="The group's machines have the directories of `local` stores mounted at the same paths.",
    )
    agents_per_machine: Union[int, Literal["gpu"]] = Field(
        default=1,
        description="Agents on each machine; `gpu`: one for each GPU of it, which has this GPU alone (E-31, E-32).",
    )
    gpus: int = Field(
        default=0, ge=0, description="GPUs of one machine of this type, 0 for machines without."
    )
    region: str = Field(default="", description="Region of the group (AWS, Google Cloud, Azure).")
    zones: list[str] = Field(
        default_factory=list,
        description="Zones in which machines may be launched, in order of preference. Default: one that the cloud chooses.",
    )
    instance_type: str = Field(description="Type of the machines as the cloud calls it.")
    image: str = Field(
        default="", description="Machine image. Default: Ubuntu LTS, where the cloud has one."
    )
    disk_gb: int = Field(default=50, ge=10, description="Disk of each machine, in GB (E-46).")
    spot: bool = Field(
        default=False, description="Machines that the cloud may take back, at a lower price."
    )
    spot_max_price: Decimal | None = Field(
        default=None, ge=0, description="Most to pay per hour for spot. Default: no limit."
    )
    spot_price_per_hour: Decimal | None = Field(
        default=None,
        ge=0,
        description="What a spot machine costs per hour. Default: `price_per_hour`, as any other.",
    )
    on_demand_fallback: bool = Field(
        default=False, description="Where spot has no capacity, launch at the ordinary price."
    )
    min_machines: int = Field(default=0, ge=0, description="Machines that are always kept (E-01).")
    max_machines: int = Field(
        default=5, ge=0, description="Machines at most; the rest waits (E-01)."
    )
    scale_down_grace_seconds: float = Field(
        default=900.0, ge=0, description="Idle time after which a machine goes (E-01)."
    )
    stop_when_idle: bool = Field(
        default=False,
        description="Idle machines are first stopped, so that they are back in seconds with all that is on their disk, and "
        "destroyed later. Where the cloud can stop machines of the group.",
    )
    destroy_stopped_after_seconds: float = Field(
        default=86400.0, ge=0, description="How long a stopped machine is kept."
    )
    boot_seconds: float = Field(
        default=900.0,
        gt=0,
        description="A machine whose agent has not checked in after so long is replaced (E-07).",
    )
    dead_man_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="A machine that has had no word from the control plane for so long, and nothing to do, powers itself off.",
    )
    network: str = Field(
        default="", description="Network (VPC) of the machines. Default: the account's default."
    )
    subnets: list[str] = Field(
        default_factory=list, description="Subnets, one for each zone at most."
    )
    security_groups: list[str] = Field(
        default_factory=list, description="Security groups, or network tags on Google Cloud."
    )
    public_address: bool = Field(
        default=True, description="Give machines an address in the internet, for outgoing traffic."
    )
    service_account: str = Field(
        default="",
        description="Identity of the machines: instance profile (AWS), service account (Google Cloud), managed identity "
        "(Azure). It needs no right of ours; user code may use it (E-49).",
    )
    tags: dict[str, str] = Field(
        default_factory=dict, description="Further tags (labels) of the machines."
    )
    bootstrap_extra: str = Field(
        default="",
        description="Shell commands that a machine runs as root before its agent starts.",
    )

    stops: ClassVar[bool] = True  # whether this kind can stop a machine and start it again

    @property
    def agents(self) -> int:
        """Agents on one machine."""
        return max(1, self.gpus) if self.agents_per_machine == "gpu" else self.agents_per_machine

    @model_validator(mode="after")
    def _fits(self) -> CloudGroupSettings:
        if self.min_machines > self.max_machines:
            raise ValueError(
                f"min_machines = {self.min_machines} is more than max_machines = {self.max_machines}"
            )
        if self.agents_per_machine == "gpu" and not self.gpus:
            raise ValueError('agents_per_machine = "gpu" needs gpus, the number of a machine')
        if isinstance(self.agents_per_machine, int) and self.agents_per_machine < 1:
            raise ValueError("agents_per_machine must be 1 or more")
        if self.stop_when_idle and not self.stops:
            raise ValueError(
                "stop_when_idle: machines of this kind cannot be stopped, only destroyed"
            )
        if self.spot_max_price is not None and not self.spot:
            raise ValueError("spot_max_price needs spot = true")
        return self


class AwsGroupSettings(CloudGroupSettings):
    """Amazon EC2: an Auto Scaling group with a launch template, both made and kept up to date by us (E-40 to E-47)."""

    kind: Literal["aws"] = Field(description="`aws`.")
    instance_types: list[str] = Field(
        default_factory=list,
        description="Further instance types that may stand in for `instance_type` (mixed instances).",
    )
    scaling_role_arn: str | None = Field(
        default=None, description="Role to assume, for workers in another account (E-47)."
    )
    role_external_id: str | None = Field(
        default=None, description="External id that the role's trust policy asks for."
    )
    profile: str | None = Field(
        default=None, description="Profile of the AWS configuration files to take credentials from."
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of the EC2 and Auto Scaling APIs other than that of AWS."
    )

    @model_validator(mode="after")
    def _stops_no_spot(self) -> AwsGroupSettings:
        if self.stop_when_idle and self.spot:
            raise ValueError("stop_when_idle: EC2 stops no spot machines, it only destroys them")
        return self


class GcpGroupSettings(CloudGroupSettings):
    """Google Compute Engine: a managed instance group with an instance template, both made by us (E-60)."""

    kind: Literal["gcp"] = Field(description="`gcp`.")
    project: str = Field(description="Project of the machines.")
    accelerator: str = Field(
        default="", description="GPU type to attach, `gpus` of them, such as `nvidia-tesla-t4`."
    )
    credentials_file: Path | None = Field(
        default=None,
        description="Key file of a service account (JSON). Default: Application Default Credentials.",
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of the Compute API other than that of Google."
    )


class AzureGroupSettings(CloudGroupSettings):
    """Azure: a virtual machine scale set, made by us (E-61)."""

    kind: Literal["azure"] = Field(description="`azure`.")
    subscription_id: str = Field(description="Subscription of the machines.")
    resource_group: str = Field(description="Resource group of the machines; it exists already.")
    tenant_id: str | None = Field(default=None, description="Directory of the app registration.")
    client_id: str | None = Field(
        default=None,
        description="App registration. Default: what azure-identity finds (environment, managed identity, Azure CLI).",
    )
    client_secret: Optional[SecretStr] = Field(
        default=None,
        description="Its secret. Better from the environment: `VALOHAI_GROUPS__<NAME>__CLIENT_SECRET`.",
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of the Resource Manager API other than that of Azure."
    )


class OpenStackGroupSettings(CloudGroupSettings):
    """OpenStack Nova: servers, made one by one."""

    kind: Literal["openstack"] = Field(description="`openstack`.")
    cloud: str | None = Field(
        default=None,
        description="Entry of clouds.yaml. Default: the settings below, else the `OS_*` variables.",
    )
    auth_url: str | None = Field(default=None, description="Address of Keystone, version 3.")
    username: str | None = Field(default=None, description="User, with `password` and `project`.")
    password: Optional[SecretStr] = Field(
        default=None,
        description="Better from the environment: `VALOHAI_GROUPS__<NAME>__PASSWORD`.",
    )
    project: str | None = Field(default=None, description="Project (tenant) of the machines.")
    domain: str = Field(default="Default", description="Domain of the user and the project.")
    application_credential_id: str | None = Field(
        default=None, description="Instead of user and password."
    )
    application_credential_secret: Optional[SecretStr] = Field(
        default=None,
        description="Better from the environment: "
        "`VALOHAI_GROUPS__<NAME>__APPLICATION_CREDENTIAL_SECRET`.",
    )
    ca_file: Path | None = Field(
        default=None, description="Certificate authority of the cloud's API, if a private one."
    )
    boot_from_volume: bool = Field(
        default=False, description="Make a volume of `disk_gb` for each machine."
    )


class DockerGroupSettings(CloudGroupSettings):
    """Containers on one Docker host that stand for machines: real isolation without a cloud."""

    kind: Literal["docker"] = Field(description="`docker`.")
    instance_type: str = Field(default="container", description="Any word.")
    image: str = Field(
        description="Image of the machines; it needs Python and what commands need. Commands run as processes in it. "
        "Its entrypoint, if it has one, is given the command that starts the machine."
    )
    docker_host: str | None = Field(
        default=None,
        description="Address of the Docker daemon. Default: `DOCKER_HOST`, else this host's.",
    )
    cpus: float | None = Field(default=None, gt=0, description="Cores of one machine.")
    memory_gb: float | None = Field(default=None, gt=0, description="Memory of one machine, in GB.")


class SimulatedGroupSettings(CloudGroupSettings):
    """A cloud that is not there, for trying out scaling and for tests: agents on this host stand for machines, and the
    cloud around them misbehaves as often as it is told to."""

    kind: Literal["simulated"] = Field(description="`simulated`.")
    instance_type: str = Field(default="simulated", description="Any word.")
    local_stores: bool = Field(
        default=True, description="The machines are on this host and see `local` stores."
    )
    seed: int = Field(default=0, description="Of all chances below.")
    boot_delay_seconds: float = Field(
        default=5.0, ge=0, description="From the launch until the agent starts."
    )
    capacity_error_rate: float = Field(
        default=0.0, ge=0, le=1, description="Launches that find no capacity, 0 to 1."
    )
    throttle_rate: float = Field(
        default=0.0, ge=0, le=1, description="Calls that are refused as too many, 0 to 1."
    )
    never_registers_rate: float = Field(
        default=0.0, ge=0, le=1, description="Machines whose agent never starts, 0 to 1."
    )
    preemption_rate_per_hour: float = Field(
        default=0.0, ge=0, description="Reclaims of one spot machine per hour."
    )
    listing_lag_seconds: float = Field(
        default=0.0, ge=0, description="How old what the cloud lists may be."
    )


GROUP_KINDS: dict[str, type[AnyGroupSettings]] = {
    "local": LocalGroupSettings,
    "static": StaticGroupSettings,
    "aws": AwsGroupSettings,
    "gcp": GcpGroupSettings,
    "azure": AzureGroupSettings,
    "openstack": OpenStackGroupSettings,
    "docker": DockerGroupSettings,
    "simulated": SimulatedGroupSettings,
}


GroupSettings = Annotated[
    Union[
        Annotated[LocalGroupSettings, Tag("local")],
        Annotated[StaticGroupSettings, Tag("static")],
        Annotated[AwsGroupSettings, Tag("aws")],
        Annotated[GcpGroupSettings, Tag("gcp")],
        Annotated[AzureGroupSettings, Tag("azure")],
        Annotated[OpenStackGroupSettings, Tag("openstack")],
        Annotated[DockerGroupSettings, Tag("docker")],
        Annotated[SimulatedGroupSettings, Tag("simulated")],
    ],
    by_kind("group", GROUP_KINDS, default="local"),
]
