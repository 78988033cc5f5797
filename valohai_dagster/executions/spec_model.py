"""`ExecutionSpec`: one execution as the user asked for it, before the execution service resolves it.

It is what a client submits and what the records keep; it holds no secrets and needs no user code to be read.
"""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from valohai_agent.protocol import JobMount, RemoteDebug
from valohai_dagster.data.input_spec import InputSpec

_NAMESPACE = uuid.UUID("5f1c1f4e-6d0f-5b7c-9b62-6c8e3f1f0a11")


def execution_id_of(instance_id: str, run_id: str, step_key: str, retry_number: int) -> str:
    """The one execution of that try of a step: who submits it twice gets the same execution."""
    return str(uuid.uuid5(_NAMESPACE, f"{instance_id}/{run_id}/{step_key}/{retry_number}"))


class Spec(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")


class ProjectRef(Spec):
    name: str


class CommitRef(Spec):
    """A commit whose archive is already in the code store."""

    identifier: str = Field(description="Git SHA, or ~ and the sha256 of the tarball (T-02, T-03).")
    ref: str | None = None
    adhoc: bool = False
    archive_store: str
    archive_key: str
    archive_sha256: str
    archive_size: int | None = None


class ExecutionSpec(Spec):
    v: int = 1
    execution_id: str
    instance_id: str = ""
    run_id: str | None = None
    step_key: str | None = None
    retry_number: int = 0
    log_key: list[str] | None = Field(
        None, description="Dagster compute-log key that shows this execution's log."
    )
    asset_key: list[str] | None = None
    partition_key: str | None = None
    project: ProjectRef
    commit: CommitRef
    step: str
    image: str
    commands: list[str] = Field(description="Built by Step.build_command, not joined.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Typed values; null means left out."
    )
    inputs: list[InputSpec] = Field(default_factory=list)
    sealed_uris: dict[str, str] = Field(
        default_factory=dict,
        description="Input URLs that hold credentials, encrypted, by `<input>/<position>`.",
    )
    environment: str | None = Field(
        None, description="Environment (worker group) asked for; None = default."
    )
    environment_variables: dict[str, str] = Field(
        default_factory=dict, description="Step defaults under launch values."
    )
    environment_variable_groups: list[str] = Field(default_factory=list)
    required_environment_variables: list[str] = Field(default_factory=list, description="Y-51.")
    mounts: list[JobMount] = Field(default_factory=list)
    upload_store: str | None = Field(
        None, description="Store of the outputs; None = the default of the deployment (O-15)."
    )
    time_limit_seconds: float | None = None
    no_output_timeout_seconds: float | None = None
    stop_condition: str | None = Field(None, description="Expression on metadata (M-40).")
    fail_fast: bool = False
    autorestart: bool = Field(
        False, description="Another execution continues it when its machine is reclaimed (L-30)."
    )
    remote_debug: RemoteDebug | None = None
    title: str | None = None
    tags: list[str] = Field(default_factory=list)
    creator: str = Field("", description="The user who launched it, as the run's tags say.")
    teams: list[str] = Field(default_factory=list, description="Teams of that user, likewise.")
    organization: str = Field("", description="Likewise.")
    priority: int = 0
    client: dict[str, Any] = Field(
        default_factory=dict,
        description="What the client wants to find again with the execution; the service does not read it.",
    )
    warnings: list[str] = Field(
        default_factory=list, description="Unsupported keys and the like; shown in the log."
    )
