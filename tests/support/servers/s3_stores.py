"""Fresh buckets on servers that speak S3, and drivers that are open on them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import boto3
from botocore.config import Config

from tests.support.servers.kinds import SwiftServer
from tests.support.servers.stores import fresh_name
from valohai_dagster.settings_stores import S3StoreSettings
from valohai_dagster.stores.registry import make_store
from valohai_dagster.stores.s3 import S3Store

PART_BYTES = 5 * 1024 * 1024  # what S3 asks for at least
REGION = "us-east-1"


def s3_client(endpoint: str, access_key: str = "testing", secret_key: str = "testing") -> Any:
    """boto3's own, for what a store does not do; to be closed."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=Config(s3={"addressing_style": "path"}, signature_version="s3v4"),
    )


def s3_store(
    endpoint: str, *, access_key: str = "testing", secret_key: str = "testing", **options: Any
) -> S3Store:
    bucket = options.pop("bucket", None)
    if bucket is None:
        bucket = fresh_name()
        with closing(s3_client(endpoint, access_key, secret_key)) as client:
            client.create_bucket(Bucket=bucket)
    values = {
        "bucket": bucket,
        "endpoint_url": endpoint,
        "region": REGION,
        "access_key_id": access_key,
        "secret_access_key": secret_key,
        "part_bytes": PART_BYTES,
        **options,
    }
    store = make_store("main", S3StoreSettings(kind="s3", **values))
    assert isinstance(store, S3Store)
    return store


def swift_s3_store(server: SwiftServer, **options: Any) -> S3Store:
    """S3 as Swift speaks it: unlike moto it checks signatures and their end."""
    keys = {"access_key": server.access_key, "secret_key": server.secret_key}
    return s3_store(server.s3_endpoint, **{**keys, **options})
