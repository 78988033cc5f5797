"""The true addresses of inputs that are known by their shown form only.

An edge from an input to another step's input hands on what the records show, and people copy addresses from pages. The
true one, with its query, is sealed in the records of the execution that used it.
"""

from __future__ import annotations

import sqlalchemy as sa

from valohai_dagster.data import outside
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.placement import hides_values
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ResolutionError
from valohai_dagster.executions.credentials import open_credentials
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.records import tables as t


def true_inputs(
    conn: sa.Connection, spec: ExecutionSpec, key: SecretKey, *, project_id: str
) -> list[InputSpec]:
    """The inputs with addresses that a worker can open. Never store or log what this returns.

    Only executions of the same project are asked: those of the run, and the one that last found new content there.
    Raises `ResolutionError` for an address that none of them has used.
    """
    inputs = open_credentials(spec, key)
    hidden = {uri for item in inputs for uri in item.uris if hides_values(uri)}
    if not hidden:
        return inputs
    true = {uri: _recall(conn, uri, key, project_id, spec.run_id) for uri in sorted(hidden)}
    unknown = [
        f"{uri}: the values of its query are hidden and not known any more; give the whole address"
        for uri, found in true.items()
        if found is None
    ]
    if unknown:
        raise ResolutionError("inputs cannot be resolved", unknown)
    return [
        item.model_copy(update={"uris": [true.get(uri) or uri for uri in item.uris]})
        for item in inputs
    ]


def _recall(
    conn: sa.Connection, uri: str, key: SecretKey, project_id: str, run_id: str | None
) -> str | None:
    e, i, o = t.executions.c, t.execution_inputs.c, t.outside_files.c
    finder = sa.select(o.execution_id).where(o.digest == outside.digest(uri)).scalar_subquery()
    query = (
        sa.select(e.sources, i.file_id)
        .join(t.execution_inputs, i.execution_id == e.id)
        .where(
            e.project_id == project_id,
            sa.or_(e.id == finder, e.run_id == run_id) if run_id else e.id == finder,
            e.sources.is_not(None),
            i.uri == uri,
        )
        .order_by(e.ctime.desc())
        .limit(1)
    )
    row = conn.execute(query).one_or_none()
    return key.decrypt_json(row.sources)[row.file_id]["url"] if row is not None else None
