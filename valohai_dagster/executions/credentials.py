"""Keeps credentials that users write into input URLs out of queues, records and logs.

A client seals such URLs with the deployment's key before it hands the execution over; only the service opens them,
in memory, to tell the agent that holds the lease.
"""

from __future__ import annotations

import base64
from collections.abc import Callable

from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.placement import public_uri
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.executions.spec_model import ExecutionSpec


def seal_credentials(spec: ExecutionSpec, key: Callable[[], SecretKey]) -> ExecutionSpec:
    """The same spec with URLs that may be shown; `key` is asked for only when there is something to seal."""
    shown = shown_inputs(spec)
    secret = {
        f"{before.name}/{position}": uri
        for before, after in zip(spec.inputs, shown, strict=True)
        for position, uri in enumerate(before.uris)
        if uri != after.uris[position]
    }
    if not secret:
        return spec
    box = key()
    sealed = {k: base64.b64encode(box.encrypt(v.encode())).decode() for k, v in secret.items()}
    return spec.model_copy(update={"inputs": shown, "sealed_uris": sealed})


def shown_inputs(spec: ExecutionSpec) -> list[InputSpec]:
    """The inputs with URLs that may be shown."""
    return [_with_uris(item, [public_uri(uri) for uri in item.uris]) for item in spec.inputs]


def open_credentials(spec: ExecutionSpec, key: SecretKey) -> list[InputSpec]:
    """The inputs with their true URLs. Never store or log what this returns."""
    true = {k: key.decrypt(base64.b64decode(v)).decode() for k, v in spec.sealed_uris.items()}
    return [
        _with_uris(item, [true.get(f"{item.name}/{i}", uri) for i, uri in enumerate(item.uris)])
        for item in spec.inputs
    ]


def _with_uris(item: InputSpec, uris: list[str]) -> InputSpec:
    return item.model_copy(update={"uris": uris})
