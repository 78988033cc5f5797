"""How many vCPUs of a family an account may run: GPU families begin with none, and nobody tells before the first launch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from valohai_dagster.capacity.clouds.aws_access import AwsAccess
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AwsGroupSettings


class Quota(NamedTuple):
    """As Service Quotas calls it: codes for on demand and for spot, and whose machines it is about."""

    on_demand: str
    spot: str
    families: str

    def code(self, purchase: Purchase) -> str:
        return self.spot if purchase is Purchase.spot else self.on_demand


# By the letters that a type begins with, such as `g` of g4dn.xlarge.
_STANDARD = Quota("L-1216C47A", "L-34B43A08", "Standard (A, C, D, H, I, M, R, T, Z)")
_GRAPHICS = Quota("L-DB2E81BA", "L-3819A6DF", "G and VT")
_QUOTAS = {
    **dict.fromkeys(("a", "c", "d", "h", "i", "m", "r", "t", "z", "im", "is"), _STANDARD),
    **dict.fromkeys(("g", "gr", "vt"), _GRAPHICS),
    "p": Quota("L-417A185B", "L-7212CCBC", "P"),
    "inf": Quota("L-1945791B", "L-B5D1601B", "Inf"),
    "trn": Quota("L-2C3B7624", "L-6B0D517C", "Trn"),
    "dl": Quota("L-6E869C2A", "L-85EED4F7", "DL"),
    "f": Quota("L-74FC7D96", "L-88CF9481", "F"),
    "x": Quota("L-7295265B", "L-E3A00192", "X"),
}


def quota_of(instance_type: str) -> Quota | None:
    """None for families whose quota is not known here.

    >>> quota_of("g4dn.xlarge").families
    'G and VT'
    """
    found = re.match(r"[a-z]+", instance_type)
    return _QUOTAS.get(found[0]) if found else None


def problem_of_quota(
    instance_type: str, *, vcpus: int, wanted: int, allowed: float, purchase: Purchase, name: str
) -> str | None:
    """What an account with `allowed` vCPUs cannot do of `wanted` machines with `vcpus` each."""
    fits = int(allowed // vcpus)
    if fits >= wanted:
        return None
    how = "spot" if purchase is Purchase.spot else "on demand"
    which = f"quota of {allowed:g} vCPUs for {name} instances, {how}"
    ask = "ask AWS for more (Service Quotas, Amazon EC2)"
    if not fits:
        return f"quota: {which}, and one {instance_type} has {vcpus}; {ask}"
    return f"quota: {which} is enough for {fits} {instance_type} of max_machines = {wanted}; {ask}, or lower max_machines"


def problems_of_quotas(settings: AwsGroupSettings, access: AwsAccess) -> Iterator[str]:
    """Nothing where the credentials may not ask: a launch that is refused tells it too."""
    name = settings.instance_type
    quota = quota_of(name)
    if quota is None:
        return
    types = access.client("ec2").describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
    vcpus = types[0]["VCpuInfo"]["DefaultVCpus"]
    purchases = [Purchase.spot] if settings.spot else [Purchase.on_demand]
    if settings.spot and settings.on_demand_fallback:
        purchases.append(Purchase.on_demand)
    for purchase in purchases:
        allowed = _allowed(access, quota.code(purchase))
        if allowed is None:
            continue
        problem = problem_of_quota(
            name,
            vcpus=vcpus,
            wanted=max(1, settings.max_machines),
            allowed=allowed,
            purchase=purchase,
            name=quota.families,
        )
        if problem:
            yield problem


def _allowed(access: AwsAccess, code: str) -> float | None:
    """vCPUs; the default where none was ever set for the account, None when it cannot be told."""
    client = access.client("service-quotas")
    for ask in (client.get_service_quota, client.get_aws_default_service_quota):
        try:
            return float(ask(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"])
        except (BotoCoreError, ClientError):
            continue
    return None
