"""Outputs that ask for versions of datasets and models: what is made, and what is only warned about."""

from __future__ import annotations

from tests.integration.plugin.driver.conftest import Case, Comparison, Play
from tests.integration.plugin.driver.seen import status
from tests.support.dagster_side import Ask, Side

YAML = """
- step:
    name: prep
    image: python:3.11
    command: python prep.py
- step:
    name: train
    image: python:3.11
    command: python train.py
    inputs:
      - name: data
"""
SIDECAR: dict[str, object] = {
    "valohai.dataset-versions": ["dataset://faces/v1"],
    "valohai.model-versions": ["model://net/"],
}


def test_a_version_is_made_once_and_read_by_the_next_step(same: Comparison) -> None:
    """The second run of `prep` names a closed version: a warning, and the run succeeds."""

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))
        side.run(Ask(assets=["prep"]))
        inputs = {"data": ["dataset://faces/latest", "model://net/1"]}
        side.run(Ask(assets=["train"], ops={"digits__train": {"config": {"inputs": inputs}}}))

    plays = {"prep": Play(sidecars={"part.csv": SIDECAR})}
    seen = same(Case(yaml=YAML, scenario=scenario, plays=plays))
    assert [status(seen, run) for run in range(3)] == ["SUCCESS"] * 3
