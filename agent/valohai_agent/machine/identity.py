"""How a machine finds out what its cloud calls it: the id by which the control plane knows the machine."""

from __future__ import annotations

import json
import os
from enum import Enum

from valohai_agent.errors import AgentError
from valohai_agent.host import observe_machine_id
from valohai_agent.metadata_service import MetadataService, Unanswered

ID_VARIABLE, METADATA_VARIABLE = "VALOHAI_AGENT_MACHINE_ID", "VALOHAI_AGENT_METADATA_URL"
LINK_LOCAL = "http://169.254.169.254"
_TOKEN_LIFE = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}


class CloudOfMachine(str, Enum):
    """Clouds that tell a machine who it is."""

    aws = "aws"
    gcp = "gcp"
    azure = "azure"
    openstack = "openstack"


class NoIdentity(AgentError):
    """What the cloud calls this machine is not known."""


def machine_id(cloud: CloudOfMachine | None, *, base_url: str | None = None) -> str:
    """AWS: instance id. Google Cloud: instance name. Azure: VM name. OpenStack: server id. Without a cloud: the
    machine's own id. What `VALOHAI_AGENT_MACHINE_ID` says goes first. Raises NoIdentity."""
    stated = os.environ.get(ID_VARIABLE)
    if stated:
        return stated
    if cloud is None:
        found = observe_machine_id()
        if found:
            return found
        raise NoIdentity(
            f"This machine has no /etc/machine-id; say how to call it with {ID_VARIABLE}."
        )
    service = MetadataService(base_url or os.environ.get(METADATA_VARIABLE) or LINK_LOCAL)
    try:
        answer = _ask(service, cloud)
    except (Unanswered, ValueError, KeyError, TypeError) as error:
        raise NoIdentity(
            f"The metadata service of {cloud.value} does not tell what this machine is called: {error}. "
            f"Check that the machine may reach it, or set {ID_VARIABLE}."
        ) from error
    if not answer:
        raise NoIdentity(
            f"The metadata service of {cloud.value} knows no name of this machine; set {ID_VARIABLE}."
        )
    return answer


def _ask(service: MetadataService, cloud: CloudOfMachine) -> str | None:
    if cloud is CloudOfMachine.aws:
        token = service.ask("PUT", "/latest/api/token", _TOKEN_LIFE) or ""
        return service.get("/latest/meta-data/instance-id", {"X-aws-ec2-metadata-token": token})
    if cloud is CloudOfMachine.gcp:
        return service.get("/computeMetadata/v1/instance/name", {"Metadata-Flavor": "Google"})
    if cloud is CloudOfMachine.azure:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        return service.get(path, {"Metadata": "true"})
    return str(json.loads(service.get("/openstack/latest/meta_data.json") or "{}")["uuid"])
