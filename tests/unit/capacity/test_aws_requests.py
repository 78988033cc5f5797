"""Names and requests for AWS, and the settings that go with them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from valohai_dagster.capacity.clouds.aws_quotas import quota_of
from valohai_dagster.capacity.clouds.aws_requests import client_token, resource_name, resource_tags
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AwsGroupSettings

LAUNCH_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9().\-/_]{3,128}")


def settings(**more: Any) -> AwsGroupSettings:
    return AwsGroupSettings(kind="aws", instance_type="t3.medium", **more)


def test_e46_names_are_those_of_deployment_and_group() -> None:
    assert resource_name("d1", "gpu") == "valohai-d1-gpu"
    assert resource_name("d1", "gpu", Purchase.spot) == "valohai-d1-gpu-spot"


@pytest.mark.parametrize("group", ["g" * 200, "ä ö", "a b", "a_b"])
def test_names_are_valid_and_apart_whatever_the_group_is_called(group: str) -> None:
    names = {resource_name("d1", group, one) for one in Purchase}
    names |= {resource_name("d1", group + "x"), resource_name("d1", "a-b")}
    assert len(names) == 4
    assert all(LAUNCH_TEMPLATE_NAME.fullmatch(one) for one in names)


def test_tokens_of_calls_fit_aws_and_are_apart() -> None:
    assert client_token("a1b2", "eu-west-1a", 0) == "a1b2-eu-west-1a-0"
    tokens = {client_token(one, 0) for one in ("x" * 70, "ä", "x y", "x:y")}
    assert len(tokens) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9\-_/]{1,64}", one) for one in tokens)


def test_tags_of_the_settings_do_not_replace_ours() -> None:
    tags = resource_tags("d1", "gpu", settings(tags={"valohai-group": "x", "team": "t"}))
    assert (tags["valohai-group"], tags["team"]) == ("gpu", "t")
    assert "valohai-launch" not in tags


@pytest.mark.parametrize(
    ("instance_type", "purchase", "code"),
    [
        ("t3.medium", Purchase.on_demand, "L-1216C47A"),
        ("m7i-flex.large", Purchase.spot, "L-34B43A08"),
        ("g4dn.xlarge", Purchase.on_demand, "L-DB2E81BA"),
        ("g6e.xlarge", Purchase.spot, "L-3819A6DF"),
        ("p5.48xlarge", Purchase.on_demand, "L-417A185B"),
        ("inf2.xlarge", Purchase.spot, "L-B5D1601B"),
        ("trn1.2xlarge", Purchase.on_demand, "L-2C3B7624"),
    ],
)
def test_each_family_has_its_quota(instance_type: str, purchase: Purchase, code: str) -> None:
    quota = quota_of(instance_type)
    assert quota is not None
    assert quota.code(purchase) == code


def test_families_without_a_known_quota_are_left_alone() -> None:
    assert quota_of("u-6tb1.56xlarge") is None
    assert quota_of("") is None


def test_spot_machines_cannot_be_stopped() -> None:
    assert settings(stop_when_idle=True).stop_when_idle
    with pytest.raises(ValidationError, match="spot"):
        settings(stop_when_idle=True, spot=True)


def test_the_words_of_a_launch_do_not_show_its_user_data() -> None:
    assert "secret" not in repr(Launch(token="t", user_data="secret"))
