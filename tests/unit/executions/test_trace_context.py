"""Trace ids need no memory: everybody works out the same ones."""

from __future__ import annotations

import re

from valohai_dagster.executions.trace_context import span_id_of, trace_id_of, traceparent_of


def test_executions_of_a_run_share_a_trace_and_have_spans_of_their_own():
    assert trace_id_of("r1", "e1") == trace_id_of("r1", "e2")
    assert trace_id_of("r1", "e1") != trace_id_of("r2", "e1")
    assert span_id_of("e1") != span_id_of("e2")
    assert span_id_of("e1") != span_id_of("e1", "running")


def test_without_a_run_the_execution_is_the_trace():
    assert trace_id_of(None, "e1") != trace_id_of(None, "e2")


def test_the_variable_has_the_form_of_the_standard():
    text = traceparent_of("r1", "e1")
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", text)
    assert text.split("-")[1] == f"{trace_id_of('r1', 'e1'):032x}"
    assert text.split("-")[2] == f"{span_id_of('e1'):016x}"
