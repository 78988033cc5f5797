"""One definition, run by Dagster's in-process executor and by the conductor: what each leaves is the same.

What is left out of the comparison stands in `exclusions.py`, with reasons.
"""

from __future__ import annotations

from typing import Any

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, stale, status
from tests.integration.plugin.driver.yamls import CHAIN, DIAMOND, ONE, RETRYING
from tests.support.dagster_side import Ask, Side
from tests.support.sim_worker import Play
from valohai_agent import protocol as p


def ask(*assets: str, **values: Any) -> Any:
    """A scenario of one run."""

    def scenario(side: Side) -> None:
        side.run(Ask(assets=assets, **values))

    return scenario


def test_one_asset(same: Comparison) -> None:
    metadata = [{"accuracy": 0.5, "epoch": 1}, {"accuracy": 0.75, "note": "fine"}]
    outputs = {"part.csv": b"a,b\n", "plots/loss.png": b"\x89PNG", "model.pkl": b"w" * 2000}
    play = Play(outputs=outputs, metadata=metadata)
    seen = same(Case(yaml=ONE, scenario=ask("prep"), plays={"prep": play}))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep")[-3:] == ["STEP_OUTPUT", "ASSET_MATERIALIZATION", "STEP_SUCCESS"]
    assert stale(seen) == {"prep": "FRESH"}


def test_values_of_the_launchpad(same: Comparison) -> None:
    config = {"parameters": {"rows": 7}, "environment_variables": {"A": "1"}, "title": "seven"}
    ops = {"digits__prep": {"config": config}}
    seen = same(Case(yaml=ONE, scenario=ask("prep", ops=ops, tags={"team": "blue"})))
    assert status(seen) == "SUCCESS"


def test_a_chain_hands_its_files_on(same: Comparison) -> None:
    seen = same(Case(yaml=CHAIN, scenario=ask("prep", "train", "report")))
    assert status(seen) == "SUCCESS"
    assert stale(seen) == {"prep": "FRESH", "train": "FRESH", "report": "FRESH"}


def test_a_diamond(same: Comparison) -> None:
    every = ("prep", "left", "right", "join")
    seen = same(Case(yaml=DIAMOND, scenario=ask(*every), at_once="steps"))
    assert status(seen) == "SUCCESS"


def test_a_run_that_asks_for_one_step_at_a_time(same: Comparison) -> None:
    """The config of Dagster's executors counts here too, so even the order of branches is the same."""
    every = ("prep", "left", "right", "join")
    seen = same(Case(yaml=DIAMOND, scenario=ask(*every, execution={"in_process": {}})))
    assert status(seen) == "SUCCESS"


def test_a_failing_step_and_those_after_it(same: Comparison) -> None:
    play = Play.failing(3, stderr="Traceback\nValueError: boom\n")
    every = ("prep", "train", "report")
    seen = same(Case(yaml=CHAIN, scenario=ask(*every), plays={"train": play}))
    assert status(seen) == "FAILURE"
    assert kinds(seen, "train")[-1] == "STEP_FAILURE"
    assert "STEP_START" not in kinds(seen, "report")


def test_a_failing_branch_of_a_diamond(same: Comparison) -> None:
    every = ("prep", "left", "right", "join")
    case = Case(yaml=DIAMOND, scenario=ask(*every), plays={"left": Play.failing()}, at_once="steps")
    seen = same(case)
    assert kinds(seen, "right")[-1] == "STEP_SUCCESS"
    assert "STEP_START" not in kinds(seen, "join")


def test_a_refused_execution(same: Comparison) -> None:
    """Y-34: what was asked wrongly is not tried again."""
    config = {"inputs": {"prep": ["datum://no-such-alias"]}}
    ops = {"digits__train": {"config": config}}
    seen = same(Case(yaml=CHAIN, scenario=ask("train", ops=ops), defs=RETRYING))
    assert status(seen) == "FAILURE"


def test_a_missing_upstream_fails_before_anything_is_submitted(same: Comparison) -> None:
    seen = same(Case(yaml=CHAIN, scenario=ask("train")))
    assert status(seen) == "FAILURE"


def test_a_retry(same: Comparison) -> None:
    plays = [Play.failing(), Play.failing(stderr="again\n"), Play()]
    every = ("prep", "train")
    seen = same(Case(yaml=CHAIN, scenario=ask(*every), plays={"prep": plays}, defs=RETRYING))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep").count("STEP_UP_FOR_RETRY") == 2
    assert kinds(seen, "prep").count("STEP_RESTARTED") == 2
    assert seen.runs[0]["steps"]["digits__prep"]["attempts"] == 3


def test_retries_that_do_not_help(same: Comparison) -> None:
    every = ("prep", "train")
    plays = {"prep": Play.failing()}
    seen = same(Case(yaml=CHAIN, scenario=ask(*every), plays=plays, defs=RETRYING))
    assert status(seen) == "FAILURE"
    assert kinds(seen, "prep")[-1] == "STEP_FAILURE"


def test_a_run_that_switches_retries_off(same: Comparison) -> None:
    off = {"in_process": {"retries": {"disabled": {}}}}
    plays = {"prep": Play.failing()}
    seen = same(Case(yaml=ONE, scenario=ask("prep", execution=off), plays=plays, defs=RETRYING))
    assert status(seen) == "FAILURE"
    assert "STEP_UP_FOR_RETRY" not in kinds(seen, "prep")


def test_a_stop_by_somebody_else_is_not_tried_again(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))

    def plays() -> dict[str, Play]:
        return {"prep": Play(outputs={}, outcome=p.Outcome.stopped, reason="stopped by the CLI")}

    seen = same(Case(yaml=ONE, scenario=scenario, plays=plays, defs=RETRYING))
    assert status(seen) == "FAILURE"
    assert "STEP_UP_FOR_RETRY" not in kinds(seen, "prep")
