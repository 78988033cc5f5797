"""The permissions that docs/clouds.md asks for are enough, and none is asked for that nothing needs (E-40).

By moto's own checks of signatures and policies. They look at actions alone, so resources and conditions of the policy are
not checked here; and what AWS does on our behalf when a group launches (IMPLIED) is not asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from tests.support.clouds.rigs import aws
from valohai_dagster.capacity.clouds.aws_groups import KEPT_VERSIONS
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import Purchase

PAGE = Path(__file__).parents[3] / "docs" / "clouds.md"
IMPLIED = {
    "ec2:CreateFleet",
    "ec2:CreateTags",
    "ec2:DescribeLaunchTemplateVersions",
    "ec2:RunInstances",
    "iam:CreateServiceLinkedRole",
    "iam:PassRole",
}


def documented() -> list[str]:
    """The actions of the policy of the page."""
    section = PAGE.read_text().partition("\n## AWS\n")[2].partition("\n## ")[0]
    policy = json.loads(section.partition("```json\n")[2].partition("```")[0])
    found: list[str] = []
    for statement in policy["Statement"]:
        actions = statement["Action"]
        found += [actions] if isinstance(actions, str) else actions
    return found


@pytest.fixture(scope="module")
def account() -> Iterator[aws.Account]:
    with aws.serving() as account:
        yield account


@pytest.fixture
def rig(
    account: aws.Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[aws.AwsRig]:
    """A user of an account in which signatures and policies are checked; `allow` gives it permissions."""
    with aws.opened(account, tmp_path) as rig:
        _switch_checks(rig, on=False)
        iam: Any = boto3.client(
            "iam",
            region_name=aws.REGION,
            endpoint_url=rig.server.url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        iam.create_user(UserName="control")
        key = iam.create_access_key(UserName="control")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        _allow(iam, documented())
        _switch_checks(rig, on=True)
        yield rig
        _switch_checks(rig, on=False)
        iam.delete_user_policy(UserName="control", PolicyName="groups")
        iam.delete_access_key(UserName="control", AccessKeyId=key["AccessKeyId"])
        iam.delete_user(UserName="control")
        iam.close()


def _switch_checks(rig: aws.AwsRig, *, on: bool) -> None:
    content = b"0" if on else b"inf"
    answer = httpx.post(f"{rig.server.url}/moto-api/reset-auth", content=content, trust_env=False)
    assert answer.status_code == 200


def _allow(iam: Any, actions: list[str]) -> None:
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    iam.put_user_policy(UserName="control", PolicyName="groups", PolicyDocument=json.dumps(policy))


def _use_everything(rig: aws.AwsRig) -> None:
    driver = rig.driver(security_groups=["sg-0123456789abcdef0"])
    assert all("sg-" in problem for problem in driver.check())
    driver.launch(Launch(token="t-0"))
    (machine_id,) = (one.id for one in driver.list())
    rig.settle()
    driver.protect(machine_id, on=True)
    driver.stop(machine_id)
    driver.start(machine_id)
    driver.list()  # back into service
    changed = rig.driver(tags={"team": "vision"}, image="", spot=True)
    with pytest.raises(CloudError) as caught:  # moto has no image of Ubuntu; it was asked for
        changed.launch(Launch(token="t-1", purchase=Purchase.spot))
    assert caught.value.trouble is Trouble.invalid
    changed = rig.driver(tags={"team": "vision"}, spot=True)
    for number in range(KEPT_VERSIONS + 2):
        changed.launch(Launch(token=f"t-2-{number}"))
    driver.terminate(machine_id)


def test_e40_the_documented_permissions_are_enough_and_all_needed(rig: aws.AwsRig) -> None:
    before = len(rig.server.order("actions"))
    _use_everything(rig)
    names = set(rig.server.order("actions")[before:])
    asked = {one for one in documented() if one.partition(":")[2] in names}
    # Only for a machine that somebody has detached from its group.
    rare = {"ec2:TerminateInstances"}
    assert set(documented()) == asked | IMPLIED | rare
    assert names <= {one.partition(":")[2] for one in asked} | {""}


def test_a_wrong_secret_is_told_in_words(rig: aws.AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (problem,) = rig.driver().check()
    assert "credentials" in problem
    with pytest.raises(CloudError) as caught:
        rig.driver().launch(Launch(token="t-1"))
    assert caught.value.trouble is Trouble.credentials


@pytest.mark.parametrize(
    "action", ["ec2:DescribeImages", "autoscaling:LaunchInstances", "ec2:CreateLaunchTemplate"]
)
def test_a_missing_permission_is_named_as_trouble_with_credentials(
    rig: aws.AwsRig, action: str
) -> None:
    _switch_checks(rig, on=False)
    iam: Any = boto3.client(
        "iam",
        region_name=aws.REGION,
        endpoint_url=rig.server.url,
    )
    _allow(iam, [one for one in documented() if one != action])
    iam.close()
    _switch_checks(rig, on=True)
    with pytest.raises(CloudError) as caught:
        rig.driver().launch(Launch(token="t-1"))
    assert caught.value.trouble is Trouble.credentials
    assert action in str(caught.value) or "UnauthorizedOperation" in str(caught.value)
