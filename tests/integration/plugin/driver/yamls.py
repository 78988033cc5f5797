"""Projects of the comparison, as valohai.yaml texts, and the files that load them."""

from __future__ import annotations


def project(*steps: str, edges: tuple[tuple[str, str], ...] = ()) -> str:
    """Steps that each take the CSV files of those before them along the edges."""
    inputs = {step: [a for a, b in edges if b == step] for step in steps}
    parts = [_step(step, inputs[step]) for step in steps]
    if edges:
        nodes = "".join(f"    - {{name: {s}, type: execution, step: {s}}}\n" for s in steps)
        lines = "".join(f"    - [{a}.output.*.csv, {b}.input.{a}]\n" for a, b in edges)
        parts.append(f"- pipeline:\n    name: all\n    nodes:\n{nodes}    edges:\n{lines}")
    return "".join(parts)


def _step(name: str, inputs: list[str]) -> str:
    text = f"- step:\n    name: {name}\n    image: python:3.11\n"
    text += f"    command: python {name}.py {{parameters}}\n"
    text += "    parameters:\n      - {name: rows, type: integer, default: 100}\n"
    if inputs:
        text += "    inputs:\n" + "".join(f"      - name: {i}\n" for i in inputs)
    return text


ONE = project("prep")
CHAIN = project("prep", "train", "report", edges=(("prep", "train"), ("train", "report")))
DIAMOND = project(
    "prep",
    "left",
    "right",
    "join",
    edges=(("prep", "left"), ("prep", "right"), ("left", "join"), ("right", "join")),
)

_LOADING = """
from pathlib import Path

import dagster as dg

from valohai_dagster import MetricCheck, load_valohai_project

here = Path(__file__).parent / "digits"
"""


def loaded_with(options: str) -> str:
    """A `defs.py` that loads the project with these options."""
    return f"{_LOADING}defs = load_valohai_project(here, {options})\n"


RETRYING = loaded_with(
    "retry_policy=dg.RetryPolicy(max_retries=2, delay=0.05, backoff=dg.Backoff.EXPONENTIAL)"
)
