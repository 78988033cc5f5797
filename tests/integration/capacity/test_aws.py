"""What is particular to AWS (CONTRACT 12.3), by the real client against moto with the corrections of
tests/support/clouds/moto.py; the contract suite has what all drivers do."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.support.clouds import moto
from tests.support.clouds.rig import DEPLOYMENT, GROUP
from tests.support.clouds.rigs import aws
from valohai_dagster.capacity.clouds import aws_places
from valohai_dagster.capacity.clouds.aws_groups import KEPT_VERSIONS
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import MachineState, Purchase

NAME = f"valohai-{DEPLOYMENT}-{GROUP}"
TOKEN = "6f0c3a4e8b1d4c2f9a7e5d3b1c0f8e6a"
OTHER_ACCOUNT = "111122223333"


@pytest.fixture(scope="module")
def account() -> Iterator[aws.Account]:
    with aws.serving() as account:
        yield account


@pytest.fixture
def rig(account: aws.Account, tmp_path: Path) -> Iterator[aws.AwsRig]:
    with aws.opened(account, tmp_path) as rig:
        yield rig


def launch(rig: aws.AwsRig, wanted: Launch, **settings: Any) -> list[str]:
    ids = rig.driver(**settings).launch(wanted)
    rig.settle()
    return list(ids)


def scaling_group(rig: aws.AwsRig, name: str = NAME) -> dict[str, Any]:
    answer = rig.scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    return answer["AutoScalingGroups"][0]


def versions(rig: aws.AwsRig, name: str = NAME) -> list[dict[str, Any]]:
    answer = rig.ec2.describe_launch_template_versions(LaunchTemplateName=name, MaxResults=200)
    return answer["LaunchTemplateVersions"]


def newest(rig: aws.AwsRig, name: str = NAME) -> dict[str, Any]:
    return max(versions(rig, name), key=lambda one: one["VersionNumber"])["LaunchTemplateData"]


def test_e46_the_auto_scaling_group_leaves_every_decision_to_the_planner(rig: aws.AwsRig) -> None:
    launch(rig, Launch(token=TOKEN, count=2), max_machines=7)
    group = scaling_group(rig)
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (0, 7, 2)
    assert group["NewInstancesProtectedFromScaleIn"] is True
    assert group["DefaultCooldown"] == 60
    suspended = {one["ProcessName"] for one in group["SuspendedProcesses"]}
    assert suspended >= {"AZRebalance", "ReplaceUnhealthy", "ScheduledActions"}
    assert not suspended & {"Launch", "Terminate"}


def test_e46_machines_have_an_encrypted_disk_and_the_second_metadata_service(
    rig: aws.AwsRig,
) -> None:
    launch(rig, Launch(token=TOKEN, user_data="#!/bin/sh\ntrue\n"))
    data = newest(rig)
    (disk,) = data["BlockDeviceMappings"]
    assert (disk["Ebs"]["VolumeSize"], disk["Ebs"]["Encrypted"]) == (50, True)
    assert disk["Ebs"]["DeleteOnTermination"] is True
    options = data["MetadataOptions"]
    assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 2)
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert base64.b64decode(data["UserData"]).decode() == "#!/bin/sh\ntrue\n"


def test_e41_everything_is_tagged_in_both_spellings(rig: aws.AwsRig) -> None:
    (machine_id,) = launch(rig, Launch(token=TOKEN), tags={"team": "vision"})
    template = rig.ec2.describe_launch_templates(LaunchTemplateNames=[NAME])["LaunchTemplates"][0]
    wanted = {
        "valohai": "1",
        "Valohai": "1",
        "Role": "ValohaiWorker",
        "team": "vision",
        "valohai-deployment": DEPLOYMENT,
        "valohai-group": GROUP,
    }
    for tags in (template["Tags"], scaling_group(rig)["Tags"]):
        assert wanted.items() <= {one["Key"]: one["Value"] for one in tags}.items()
    assert wanted.items() <= rig.tags(machine_id).items()
    assert rig.tags(machine_id)["valohai-launch"] == TOKEN
    marks = {one["ResourceType"]: one["Tags"] for one in newest(rig)["TagSpecifications"]}
    assert marks["volume"] == marks["instance"]


def test_e46_spot_machines_are_in_a_twin_group_without_a_price_cap(rig: aws.AwsRig) -> None:
    settings = {"spot": True, "on_demand_fallback": True, "instance_types": ["t3a.medium"]}
    launch(rig, Launch(token="t-1", purchase=Purchase.spot), **settings)
    launch(rig, Launch(token="t-2", purchase=Purchase.on_demand), **settings)
    policies = {
        name: scaling_group(rig, name)["MixedInstancesPolicy"] for name in (NAME, f"{NAME}-spot")
    }
    spot = policies[f"{NAME}-spot"]["InstancesDistribution"]
    assert (spot["OnDemandBaseCapacity"], spot["OnDemandPercentageAboveBaseCapacity"]) == (0, 0)
    assert spot["SpotAllocationStrategy"] == "capacity-optimized-prioritized"
    assert "SpotMaxPrice" not in spot
    assert policies[NAME]["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 100
    for policy in policies.values():
        types = [one["InstanceType"] for one in policy["LaunchTemplate"]["Overrides"]]
        assert types == ["t3.medium", "t3a.medium"]


def test_e46_a_price_cap_is_passed_on(rig: aws.AwsRig) -> None:
    launch(rig, Launch(token=TOKEN, purchase=Purchase.spot), spot=True, spot_max_price="0.0125")
    policy = scaling_group(rig, f"{NAME}-spot")["MixedInstancesPolicy"]
    assert policy["InstancesDistribution"]["SpotMaxPrice"] == "0.0125"
    assert policy["InstancesDistribution"]["SpotAllocationStrategy"] == "capacity-optimized"
    launch(rig, Launch(token="t-2", purchase=Purchase.spot), spot=True)
    policy = scaling_group(rig, f"{NAME}-spot")["MixedInstancesPolicy"]
    assert not policy["InstancesDistribution"].get("SpotMaxPrice")  # taken away again


def test_e47_machines_live_in_the_account_of_the_role(rig: aws.AwsRig) -> None:
    """moto keeps accounts apart, but lets anybody assume any role."""
    role = f"arn:aws:iam::{OTHER_ACCOUNT}:role/valohai-workers"
    driver = rig.driver(scaling_role_arn=role, role_external_id="x-1")
    (machine_id,) = driver.launch(Launch(token=TOKEN))
    assert [one.id for one in driver.list()] == [machine_id]
    assert list(rig.driver().list()) == []
    assert "AssumeRole" in rig.server.order("actions")


def test_few_versions_of_the_launch_template_are_kept(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    for number in range(KEPT_VERSIONS + 4):
        driver.launch(Launch(token=f"t-{number}"))
    kept = [one["VersionNumber"] for one in versions(rig)]
    last = KEPT_VERSIONS + 4
    assert kept == [1, *range(last - KEPT_VERSIONS + 1, last + 1)]


def test_an_auto_scaling_group_that_was_deleted_is_made_again(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    driver.launch(Launch(token="t-1"))
    rig.scaling.delete_auto_scaling_group(AutoScalingGroupName=NAME, ForceDelete=True)
    rig.ec2.delete_launch_template(LaunchTemplateName=NAME)
    (machine_id,) = driver.launch(Launch(token="t-2"))
    assert rig.alive(machine_id)
    assert scaling_group(rig)["DesiredCapacity"] == 1


def test_the_group_of_somebody_else_is_left_alone(rig: aws.AwsRig) -> None:
    rig.ec2.create_launch_template(
        LaunchTemplateName="theirs", LaunchTemplateData={"ImageId": aws.IMAGE}
    )
    rig.scaling.create_auto_scaling_group(
        AutoScalingGroupName=NAME,
        MinSize=0,
        MaxSize=1,
        LaunchTemplate={"LaunchTemplateName": "theirs"},
        AvailabilityZones=["eu-west-1a"],
    )
    driver = rig.driver()
    assert any(NAME in problem for problem in driver.check())
    with pytest.raises(CloudError, match=NAME):
        driver.launch(Launch(token=TOKEN))
    assert scaling_group(rig)["MaxSize"] == 1


def test_changed_settings_reach_the_group_with_the_next_launch(rig: aws.AwsRig) -> None:
    launch(rig, Launch(token="t-1", count=2), max_machines=9)
    rig.scaling.resume_processes(AutoScalingGroupName=NAME)
    launch(rig, Launch(token="t-2"), max_machines=4, disk_gb=80, tags={"team": "audio"})
    group = scaling_group(rig)
    assert (group["MaxSize"], group["DesiredCapacity"]) == (4, 3)
    assert group["SuspendedProcesses"]
    assert {"team": "audio"}.items() <= {one["Key"]: one["Value"] for one in group["Tags"]}.items()
    assert newest(rig)["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 80


def test_a_smaller_maximum_ends_no_machine(rig: aws.AwsRig) -> None:
    """An Auto Scaling group above its maximum would begin to terminate."""
    first = launch(rig, Launch(token="t-1", count=3), max_machines=9)
    (second,) = launch(rig, Launch(token="t-2"), max_machines=1)
    assert scaling_group(rig)["MaxSize"] == 4
    assert all(rig.alive(one) for one in (*first, second))


def test_without_a_zone_the_one_that_has_capacity_is_found(rig: aws.AwsRig) -> None:
    driver = rig.driver(zones=list(rig.zones))
    with rig.refuse(Trouble.capacity, zone="eu-west-1a"):
        for number in range(4):
            driver.launch(Launch(token=f"t-{number}"))
    assert {one.zone for one in driver.list()} == {"eu-west-1b"}


def test_no_capacity_in_any_zone_holds_none_in_particular(rig: aws.AwsRig) -> None:
    driver = rig.driver(zones=list(rig.zones))
    with rig.refuse(Trouble.capacity), pytest.raises(CloudError) as caught:
        driver.launch(Launch(token=TOKEN))
    assert (caught.value.zone, caught.value.trouble) == (None, Trouble.capacity)
    assert "eu-west-1a" in str(caught.value)
    assert "eu-west-1b" in str(caught.value)


def test_a_launch_that_is_filled_in_part_is_repeated_where_it_began(rig: aws.AwsRig) -> None:
    """Its calls are known to AWS there; in another zone they would make too many."""
    driver = rig.driver(zones=list(rig.zones))
    with rig.refuse(Trouble.capacity, room=1):
        with pytest.raises(CloudError) as first:
            driver.launch(Launch(token=TOKEN, count=3))
        with pytest.raises(CloudError) as again:
            rig.driver(zones=list(reversed(rig.zones))).launch(Launch(token=TOKEN, count=3))
    assert len(first.value.made) == 1
    assert list(again.value.made) == list(first.value.made)


def test_more_than_a_hundred_machines_take_several_calls(rig: aws.AwsRig) -> None:
    driver = rig.driver(max_machines=150)
    ids = driver.launch(Launch(token=TOKEN, count=101))
    assert len(set(ids)) == 101
    assert scaling_group(rig)["DesiredCapacity"] == 101
    assert len(driver.launch(Launch(token=TOKEN, count=101))) == 101


def test_a_machine_that_no_list_has_yet_is_not_taken_for_dead(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    with rig.lag():
        (machine_id,) = driver.launch(Launch(token=TOKEN))
        assert list(driver.list()) == []
    rig.settle()
    assert [one.id for one in driver.list()] == [machine_id]


def test_what_was_reclaimed_leaves_the_group_smaller(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    first, second = launch(rig, Launch(token=TOKEN, count=2))
    rig.vanish(first)
    assert set(rig.members()) == {first, second}
    assert {one.id: one.state for one in driver.list()}[first] is MachineState.gone
    assert set(rig.members()) == {second}
    assert scaling_group(rig)["DesiredCapacity"] == 1


def test_a_stopped_machine_waits_on_standby_and_is_not_replaced(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    first, second = launch(rig, Launch(token=TOKEN, count=2))
    driver.stop(first)
    assert rig.members()[first]["lifecycle"] == "Standby"
    assert scaling_group(rig)["DesiredCapacity"] == 1
    driver.start(first)
    driver.list()
    assert {one["lifecycle"] for one in rig.members().values()} == {"InService"}
    assert scaling_group(rig)["DesiredCapacity"] == 2
    assert rig.alive(second)


def test_terminating_a_stopped_machine_counts_it_once(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    first, second = launch(rig, Launch(token=TOKEN, count=2))
    driver.stop(first)
    driver.terminate(first)
    assert scaling_group(rig)["DesiredCapacity"] == 1
    assert (rig.alive(first), rig.alive(second)) == (False, True)


def test_a_machine_that_somebody_detached_is_still_ours(rig: aws.AwsRig) -> None:
    driver = rig.driver()
    (machine_id,) = launch(rig, Launch(token=TOKEN))
    rig.scaling.detach_instances(
        AutoScalingGroupName=NAME, InstanceIds=[machine_id], ShouldDecrementDesiredCapacity=True
    )
    assert [one.id for one in driver.list()] == [machine_id]
    driver.terminate(machine_id)
    assert not rig.alive(machine_id)


def test_machines_are_placed_in_the_subnets_of_the_settings(rig: aws.AwsRig) -> None:
    found = rig.ec2.describe_subnets()["Subnets"]
    wanted = next(one for one in found if one["AvailabilityZone"] == "eu-west-1c")
    (machine_id,) = launch(
        rig,
        Launch(token=TOKEN),
        subnets=[wanted["SubnetId"]],
        security_groups=["sg-0123456789abcdef0"],
        public_address=False,
        service_account="worker-profile",
    )
    assert rig.described(machine_id)["SubnetId"] == wanted["SubnetId"]
    (card,) = newest(rig)["NetworkInterfaces"]
    assert card["AssociatePublicIpAddress"] is False
    assert card["Groups"] == ["sg-0123456789abcdef0"]
    assert newest(rig)["IamInstanceProfile"] == {"Name": "worker-profile"}


@pytest.mark.parametrize(
    ("instance_type", "arch"), [("t3.medium", "amd64"), ("t4g.medium", "arm64")]
)
def test_the_newest_ubuntu_is_the_default_image(
    rig: aws.AwsRig, monkeypatch: pytest.MonkeyPatch, instance_type: str, arch: str
) -> None:
    """moto has no such image, so the test's account publishes two in the place of Canonical's."""
    driver = rig.driver(image="", instance_type=instance_type)
    assert any("set `image`" in problem for problem in driver.check())
    monkeypatch.setattr(aws_places, "CANONICAL", moto.ACCOUNT)
    name = aws_places.UBUNTU.format(arch=arch).removesuffix("*")
    ids = [
        rig.ec2.register_image(Name=f"{name}{day}")["ImageId"] for day in ("20260401", "20260402")
    ]
    launch(rig, Launch(token=TOKEN), image="", instance_type=instance_type)
    assert newest(rig)["ImageId"] in ids


def test_a_quota_that_is_too_small_is_told(rig: aws.AwsRig) -> None:
    rig.server.order("quotas", {"L-DB2E81BA": 8.0, "L-3819A6DF": 0.0})
    settings: dict[str, Any] = {"instance_type": "g4dn.xlarge", "max_machines": 2}
    assert list(rig.driver(**settings).check()) == []
    (few,) = rig.driver(instance_type="g4dn.xlarge", max_machines=3).check()
    assert few.startswith("quota: ")
    assert "enough for 2 g4dn.xlarge of max_machines = 3" in few
    (none,) = rig.driver(**settings, spot=True, on_demand_fallback=True).check()
    assert "0 vCPUs for G and VT instances, spot" in none


def test_a_missing_region_is_told(rig: aws.AwsRig) -> None:
    (problem,) = rig.driver(region="").check()
    assert "set `region`" in problem


def test_a_profile_that_is_not_there_is_told(rig: aws.AwsRig) -> None:
    (problem,) = rig.driver(profile="nobody").check()
    assert "nobody" in problem
    assert "credentials" in problem


def test_no_answer_is_an_outage(rig: aws.AwsRig) -> None:
    driver = rig.driver(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(CloudError) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.outage


def test_without_credentials_nothing_is_asked(
    rig: aws.AwsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CloudError) as caught:
        rig.driver().list()
    assert caught.value.trouble is Trouble.credentials


def test_the_client_of_the_test_is_that_of_the_driver() -> None:
    """LaunchInstances is in botocore since 1.41; an older one cannot launch."""
    client: Any = boto3.client("autoscaling", region_name=aws.REGION)
    assert "LaunchInstances" in client.meta.service_model.operation_names
    client.close()


def test_credentials_that_are_corrected_are_read_again(
    rig: aws.AwsRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "corrected"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    driver = rig.driver()
    with pytest.raises(CloudError) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.credentials
    file.write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
    assert list(driver.list()) == []
