"""Skipped steps. Steps of valohai.yaml never skip: an execution ends well, then all its outputs are there, or it does not.

What can skip is an op with our tag and an optional output that nothing fills, as somebody may build it by hand; the
steps after that output are then skipped, and those after them.
"""

from __future__ import annotations

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, stale, status
from tests.integration.plugin.driver.yamls import CHAIN
from tests.support.dagster_side import Ask, Side

BY_HAND = """
from dataclasses import replace
from pathlib import Path

import dagster as dg

from valohai_dagster.plugin.backend import open_backend
from valohai_dagster.plugin.compute import DeployedStep, run_step
from valohai_dagster.plugin.step_tag import STEP_TAG, step_tag
from valohai_dagster.plugin.versions import code_version_of
from valohai_dagster.projects.project import load_project

project = load_project(Path(__file__).parent / "digits")


def deployed(name, **changes):
    step = project.step(name)
    version = code_version_of(step, project.commit.identifier)
    tag = replace(step_tag(project, step, code_version=version), **changes)
    return DeployedStep(project=project, tag=tag, open_backend=open_backend), version


def asset(name, *deps):
    step, version = deployed(name)

    @dg.asset(
        key=["digits", name],
        deps=[["digits", dep] for dep in deps],
        code_version=version,
        op_tags={STEP_TAG: step.tag.to_text()},
    )
    def made(context: dg.AssetExecutionContext):
        yield from run_step(context, step)

    return made


first, first_version = deployed("prep", output="digits__prep")


@dg.multi_asset(
    name="digits__prep",
    specs=[
        dg.AssetSpec(["digits", "prep"], skippable=True, code_version=first_version),
        dg.AssetSpec(["digits", "extra"], skippable=True),
    ],
    op_tags={STEP_TAG: first.tag.to_text()},
)
def prep(context: dg.AssetExecutionContext):
    for result in run_step(context, first):
        yield result._replace(asset_key=dg.AssetKey(["digits", "prep"]))


defs = dg.Definitions([prep, asset("train", "extra"), asset("report", "train")])
"""


def test_steps_after_an_output_that_was_not_made_are_skipped(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "extra", "train", "report"]))

    seen = same(Case(yaml=CHAIN, defs=BY_HAND, scenario=scenario))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep")[-1] == "STEP_SUCCESS"
    assert kinds(seen, "train")[-1] == kinds(seen, "report")[-1] == "STEP_SKIPPED"
    assert stale(seen) == {
        "prep": "FRESH",
        "extra": "MISSING",
        "train": "MISSING",
        "report": "MISSING",
    }
