"""What a person does in the browser: launch with another parameter, look at the result, stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import Probe
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.slow

LOAD_MS = 30_000
_RENDERED = "image => image.complete ? image.naturalWidth : 0"


def open_launchpad(page: Page, app: DagsterApp, asset: str) -> Locator:
    """Materialize with the shift key held down, as its tooltip tells; returns the dialog."""
    page.goto(f"{app.url}/assets/{asset}", timeout=LOAD_MS)
    button = page.get_by_role("button", name="Materialize").first
    button.click(modifiers=["Shift"], timeout=LOAD_MS)
    dialog = page.get_by_role("dialog")
    dialog.locator(".CodeMirror").wait_for(timeout=LOAD_MS)
    return dialog


def launch(page: Page, dialog: Locator) -> str:
    """The dialog's Materialize button; returns the run id."""
    with page.expect_response("**/graphql?op=LaunchPipelineExecution", timeout=LOAD_MS) as reply:
        dialog.get_by_role("button", name="Materialize").click(timeout=LOAD_MS)
    result = reply.value.json()["data"]
    return str(next(iter(result.values()))["run"]["id"])


def open_stdout(page: Page, app: DagsterApp, run_id: str, step: str) -> None:
    page.goto(f"{app.url}/runs/{run_id}", timeout=LOAD_MS)
    page.get_by_text(step, exact=True).first.click(timeout=LOAD_MS)
    page.get_by_role("button", name="stdout").click(timeout=LOAD_MS)


def width_of(image: Locator) -> int:
    """The picture's own width, once the browser has really decoded it."""
    image.scroll_into_view_if_needed(timeout=LOAD_MS)
    return wait_for(lambda: image.evaluate(_RENDERED), seconds=10, what="the picture")


def test_a_launch_with_a_changed_parameter_shows_its_lines_and_its_picture(
    page: Page, app: DagsterApp, artifacts: Path
) -> None:
    dialog = open_launchpad(page, app, "probe/draw")
    editor = dialog.locator(".CodeMirror")
    text = wait_for(
        lambda: (
            (written := editor.evaluate("e => e.CodeMirror.getValue()")).count("size: 8")
            and written
        ),
        seconds=10,
        what="the default in the form",
    )
    editor.click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text.replace("size: 8", "size: 30"))
    dialog.get_by_text("No errors").wait_for(timeout=LOAD_MS)
    page.screenshot(path=artifacts / "launchpad.png")
    run_id = launch(page, dialog)
    assert app.finished(run_id).status == "SUCCESS"
    open_stdout(page, app, run_id, "probe__draw")
    page.get_by_text("drew a green square of size 30").wait_for(timeout=LOAD_MS)
    page.screenshot(path=artifacts / "stdout.png")
    page.goto(f"{app.url}/assets/probe/draw", timeout=LOAD_MS)
    assert width_of(page.locator("img[alt='square.png']").first) == 30
    page.screenshot(path=artifacts / "asset.png")


def test_terminate_stops_the_container_and_every_hop_is_in_the_event_log(
    page: Page, app: DagsterApp, probe: Probe, docker_image: str, artifacts: Path
) -> None:
    run_id = probe.launch("wait", image=docker_image, environment="docker")
    wait_for(lambda: "ready" in app.log(run_id).stdout, seconds=60, every=0.3, what="the command")
    page.goto(f"{app.url}/runs/{run_id}", timeout=LOAD_MS)
    page.get_by_role("button", name="Terminate").click(timeout=LOAD_MS)
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Terminate").click(timeout=LOAD_MS)
    assert app.finished(run_id).status == "CANCELED"
    page.screenshot(path=artifacts / "terminated.png")
    assert_hops(app.messages(run_id))
    assert "saved what there was" in app.log(run_id).stdout


def test_a_termination_through_graphql_reaches_a_process_and_keeps_its_outputs(
    app: DagsterApp, probe: Probe
) -> None:
    run_id = probe.launch("wait")
    wait_for(lambda: "ready" in app.log(run_id).stdout, seconds=60, every=0.3, what="the command")
    app.terminate(run_id)
    assert app.finished(run_id).status == "CANCELED"
    assert_hops(app.messages(run_id))


def assert_hops(messages: list[str]) -> None:
    """From Dagster to the command's signal and back, in this order."""
    hops = (
        "Sending run termination request",
        "stop requested",
        "stop sent to worker",
        "SIGINT",
        "ended with status stopped",
        "saved.txt",
    )
    at = 0
    for hop in hops:
        found = [i for i, message in enumerate(messages) if hop in message and i >= at]
        assert found, f"{hop!r} is not after number {at} of:\n" + "\n".join(messages)
        at = found[0]
