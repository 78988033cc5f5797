"""The example's three executions in containers, and what the browser shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.conftest import LOCATION
from tests.e2e.test_ui import LOAD_MS, width_of
from tests.support.dagster_app import DagsterApp

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

STEPS = ("preprocess", "train", "evaluate")


@pytest.fixture(scope="module")
def digits_run(app: DagsterApp, docker_image: str) -> str:
    """All three in one run, with the image that has the packages already."""
    common: dict[str, Any] = {"image": docker_image, "environment": "docker"}
    configs = {f"digits__{step}": {"config": dict(common)} for step in STEPS}
    configs["digits__train"]["config"]["parameters"] = {"epochs": 5}
    assets = [["digits", step] for step in STEPS]
    run_id = app.launch(LOCATION, assets, config={"ops": configs})
    assert app.finished(run_id).status == "SUCCESS", app.messages(run_id)[-15:]
    return run_id


def test_the_three_steps_ran_in_containers_and_handed_their_files_on(
    app: DagsterApp, digits_run: str, docker_image: str
) -> None:
    for step in STEPS:
        metadata = app.metadata(digits_run, step)
        assert (metadata["runtime"], metadata["image"]) == ("docker", docker_image)
    assert app.metadata(digits_run, "train")["metrics/epoch"] == 5
    assert app.metadata(digits_run, "evaluate")["metrics/accuracy"] > 0.8


def test_the_confusion_matrix_is_drawn_in_the_asset_and_its_file_opens(
    page: Page, app: DagsterApp, digits_run: str, artifacts: Path
) -> None:
    page.goto(f"{app.url}/assets/digits/evaluate", timeout=LOAD_MS)
    assert width_of(page.locator("img[alt='confusion-matrix.png']").first) > 100
    page.screenshot(path=artifacts / "confusion-matrix.png")
    url = app.metadata(digits_run, "evaluate")["file/confusion-matrix.png"]
    reply = httpx.get(url)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    page.goto(url, timeout=LOAD_MS)
    assert width_of(page.locator("img").first) > 100
