"""Many executions at once: what one conductor needs for them, and how many it gets done.

Real Postgres (which waits for its disk), real Redis, real conductor processes; the workers are one process that speaks
the agents' protocol and does no work (`tests/support/fleet`). Runs are created before the clock starts.

    python -m bench.fleet [--in-flight N ...] [--executions N] [--conductors N ...] [--rate R] [--quick]

1. In flight: N executions held running at once; memory and CPU of the conductor for them.
2. Throughput: from the first accepted hand-over to the last RUN_SUCCESS, with one conductor and with two.
3. Lag at a steady rate: from a report to the commit of the event that tells of it.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.load import (
    POSTGRES_OPTIONS,
    VALOHAI_YAML,
    Lags,
    Load,
    open_load,
    report_lags,
    wait_until_ended,
)
from tests.support.fleet.process import FleetProcess
from tests.support.fleet.profile import Profile
from tests.support.installation import Conductor, Installation
from tests.support.launchpad import Launchpad
from tests.support.process_usage import cpu_seconds, machine_cpu_seconds, memory
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

SLOTS = 64  # of the fleet when throughput is measured
PATIENCE_SECONDS = 900.0
QUIET_SHARE = 0.15  # of a core: a conductor that uses less has settled
QUIET_SECONDS = 3.0
SETTLE_SECONDS = 60.0
OTHERS = "others"


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A conductor with that many executions held running."""

    number: int
    rss_mb: float
    pss_mb: float
    kb_per_execution: float | None  # beyond the conductor without any
    cpu_ms_per_start: float | None  # from hand-over to running
    idle_cpu_share: float  # of a core, while all of them just run


@dataclass(frozen=True, kw_only=True)
class Throughput:
    conductors: int
    executions: int
    executions_per_s: float
    handed_over_per_s: float
    starts_per_s: float | None
    events_per_s: float
    events_per_execution: float
    cores: dict[str, float]  # used, by part
    cpu_ms: dict[str, float]  # per execution, by part
    lags: Lags | None


@dataclass(frozen=True, kw_only=True)
class Options:
    kind: str
    durable: bool
    in_flight: Sequence[int]
    executions: int
    conductors: Sequence[int]
    rate: float
    rate_seconds: float


def main() -> None:
    options = parse()
    sizes = [measure_in_flight(options)] if options.in_flight else []
    throughputs = [measure_throughput(options, number) for number in options.conductors]
    steady = measure_throughput(options, 1, rate=options.rate) if options.rate else None
    report(sizes[0] if sizes else [], throughputs, steady)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--in-flight", type=int, nargs="*", default=[100, 1000, 5000])
    parser.add_argument("--executions", type=int, default=600, help="of each throughput")
    parser.add_argument("--conductors", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rate", type=float, default=10.0, help="per second, for the lag; 0: none")
    parser.add_argument("--rate-seconds", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true", help="a few executions, to see it work")
    parser.add_argument("--no-disk-wait", action="store_true", help="Postgres with fsync=off")
    parser.add_argument(
        "--service-only", action="store_true", help="executions without Dagster runs"
    )
    given = parser.parse_args()
    if given.quick:
        given.in_flight, given.executions, given.conductors = [20], 20, [1]
        given.rate, given.rate_seconds = 3.0, 4.0
    return Options(
        kind="service" if given.service_only else "runs",
        durable=not given.no_disk_wait,
        in_flight=sorted(given.in_flight),
        executions=given.executions,
        conductors=given.conductors,
        rate=given.rate,
        rate_seconds=given.rate_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Stand:
    """What one measurement stands on."""

    installation: Installation
    load: Load
    fleet: FleetProcess
    conductors: Sequence[Conductor]

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by part; `others` is what the benchmark shares the machine with."""
        parts = {
            "conductor": sum(cpu_seconds(c.pid) for c in self.conductors),
            "postgres": cpu_seconds(self.installation.postgres.pid),
            "redis": cpu_seconds(self.installation.redis.pid),
            "fleet": cpu_seconds(self.fleet.pid),
            "launching": time.process_time(),
        }
        return {**parts, OTHERS: machine_cpu_seconds() - sum(parts.values())}


@contextlib.contextmanager
def stand(options: Options, profile: Profile, conductors: int) -> Iterator[Stand]:
    """A fresh installation with its conductors serving and its fleet checked in."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp")))
        installation = stack.enter_context(
            Installation(
                root,
                project=VALOHAI_YAML,
                durable=options.durable,
                postgres_options=POSTGRES_OPTIONS,
            )
        )
        stack.enter_context(installation.entered())
        pad = stack.enter_context(Launchpad(root))
        records = open_records(load_settings())
        stack.callback(records.close)
        load = open_load(options.kind, installation, pad)
        started = [installation.add_conductor() for _ in range(conductors)]
        fleet = stack.enter_context(
            FleetProcess(
                installation.redis.unix_url,
                records.deployment_id,
                profile,
                log=root / "fleet.log",
                trace=root / "trace.jsonl",
            )
        )
        yield Stand(installation=installation, load=load, fleet=fleet, conductors=started)


# -- in flight --------------------------------------------------------------------------------------------------------


def measure_in_flight(options: Options) -> list[InFlight]:
    """One conductor, more and more executions; the first entry is without any."""
    most = options.in_flight[-1]
    profile = Profile(slots=most, agents=max(1, most // 100), hold=True)
    with stand(options, profile, conductors=1) as all_of_it:
        items = all_of_it.load.prepare(most)
        base = weigh(all_of_it, 0, None)
        sizes = [base]
        for number in options.in_flight:
            before = sizes[-1].number
            spent = fill(all_of_it, items[before:number], number)
            sizes.append(weigh(all_of_it, number, base, spent / (number - before)))
        all_of_it.fleet.let_end()
        wait_until_ended(all_of_it.load, items, seconds=PATIENCE_SECONDS)
    return sizes


def fill(all_of_it: Stand, items: Sequence[str], number: int) -> float:
    """Hands over until that many run; CPU seconds of the conductor for it."""
    pid = all_of_it.conductors[0].pid
    before = cpu_seconds(pid)
    all_of_it.load.hand_over(items, told=lambda item: None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while all_of_it.fleet.stats()["phases"].get("running", 0) < number:
        assert time.monotonic() < deadline, f"not {number} running: {all_of_it.fleet.stats()}"
        time.sleep(0.5)
    settle(pid)
    return cpu_seconds(pid) - before


def settle(pid: int) -> float:
    """Waits until the process is quiet; the share of a core that it then uses."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        before = cpu_seconds(pid)
        time.sleep(QUIET_SECONDS)
        share = (cpu_seconds(pid) - before) / QUIET_SECONDS
        if share < QUIET_SHARE or time.monotonic() > deadline:
            return share


def weigh(
    all_of_it: Stand, number: int, base: InFlight | None, seconds: float | None = None
) -> InFlight:
    pid = all_of_it.conductors[0].pid
    idle = settle(pid)
    size = memory(pid)
    pss = size.pss_bytes / 1e6
    beyond = (pss - base.pss_mb) * 1e3 / number if base and number else None
    return InFlight(
        number=number,
        rss_mb=size.rss_bytes / 1e6,
        pss_mb=pss,
        kb_per_execution=beyond,
        cpu_ms_per_start=seconds * 1e3 if seconds is not None else None,
        idle_cpu_share=idle,
    )


# -- throughput and lag -----------------------------------------------------------------------------------------------


def measure_throughput(options: Options, conductors: int, rate: float | None = None) -> Throughput:
    """As fast as it goes, or at that many hand-overs a second."""
    number = int(rate * options.rate_seconds) if rate else options.executions
    with stand(options, Profile(slots=SLOTS), conductors) as all_of_it:
        load = all_of_it.load
        items = load.prepare(number)
        told: list[float] = []
        lock = threading.Lock()

        def tell(item: str) -> None:
            with lock:
                told.append(time.time())

        cpu = all_of_it.cpu()
        if rate:
            paced(load, items, rate, tell)
        else:
            load.hand_over(items, told=tell)
        ended = wait_until_ended(load, items, seconds=PATIENCE_SECONDS)
        spent = {part: value - cpu[part] for part, value in all_of_it.cpu().items()}
        events = load.events(items)
        return summary(conductors, sorted(told), ended, events, spent, all_of_it.fleet.reports())


def paced(load: Load, items: Sequence[str], rate: float, tell: Any) -> None:
    started = time.monotonic()
    for position, item in enumerate(items):
        time.sleep(max(0.0, started + position / rate - time.monotonic()))
        load.hand_over([item], told=tell)


def summary(
    conductors: int,
    told: Sequence[float],
    ended: dict[str, float],
    events: Sequence[tuple[str, str, float]],
    spent: dict[str, float],
    reports: Sequence[dict[str, Any]],
) -> Throughput:
    last = max(ended.values())
    seconds = last - told[0]
    written = [event for event in events if event[2] >= told[0]]
    starts = [moment for _, kind, moment in events if kind == "STEP_START"]
    return Throughput(
        conductors=conductors,
        executions=len(ended),
        executions_per_s=len(ended) / seconds,
        handed_over_per_s=len(told) / max(1e-3, told[-1] - told[0]),
        starts_per_s=len(starts) / (max(starts) - told[0]) if starts else None,
        events_per_s=len(written) / seconds,
        events_per_execution=len(written) / len(ended),
        cores={part: value / seconds for part, value in spent.items()},
        cpu_ms={part: value * 1e3 / len(ended) for part, value in spent.items() if part != OTHERS},
        lags=report_lags(reports, events),
    )


# -- telling ----------------------------------------------------------------------------------------------------------


def report(
    sizes: Sequence[InFlight], throughputs: Sequence[Throughput], steady: Throughput | None
) -> None:
    console = Console(width=130)
    if sizes:
        console.print(size_table(sizes))
    everything = [*throughputs, *([steady] if steady else [])]
    if everything:
        console.print(throughput_table(throughputs, steady))
    print(json.dumps(figures(sizes, throughputs, steady)))


def size_table(sizes: Sequence[InFlight]) -> Table:
    table = Table(title="In flight: one conductor with executions held running")
    for heading in ("", "RSS MB", "PSS MB", "KB each", "CPU ms per start", "cores while they run"):
        table.add_column(heading, justify="right")
    for size in sizes:
        table.add_row(
            str(size.number),
            f"{size.rss_mb:.0f}",
            f"{size.pss_mb:.0f}",
            shown(size.kb_per_execution, "{:.1f}"),
            shown(size.cpu_ms_per_start, "{:.1f}"),
            f"{size.idle_cpu_share:.2f}",
        )
    return table


def throughput_table(throughputs: Sequence[Throughput], steady: Throughput | None) -> Table:
    table = Table(title="Throughput, and lag at a steady rate")
    headings = (
        "",
        "done/s",
        "starts/s",
        "events/s",
        "events each",
        "cores used",
        "lag p50 p95 p99 s",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "cores used") else "right")
    rows = [(f"{t.conductors} conductor{'s' * (t.conductors > 1)}", t) for t in throughputs]
    rows += [("steady", steady)] if steady else []
    for label, one in rows:
        parts = [
            f"{part} {share:.2f} ({one.cpu_ms[part]:.0f})"
            for part, share in one.cores.items()
            if part != OTHERS
        ]
        parts.append(f"{OTHERS} {one.cores[OTHERS]:.2f}")
        lags = one.lags
        table.add_row(
            label,
            f"{one.executions_per_s:.1f}",
            shown(one.starts_per_s, "{:.1f}"),
            f"{one.events_per_s:.0f}",
            f"{one.events_per_execution:.1f}",
            ", ".join(parts),
            f"{lags.p50:.2f} {lags.p95:.2f} {lags.p99:.2f}" if lags else "-",
        )
    return table


CPU_HEADING = "cores used (CPU ms each)"
LAG_HEADING = "lag p50 p95 p99 s"


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def figures(
    sizes: Sequence[InFlight], throughputs: Sequence[Throughput], steady: Throughput | None
) -> dict[str, Any]:
    """The named ones are those of the largest number in flight and of the first throughput."""
    largest = sizes[-1] if sizes else None
    first = throughputs[0] if throughputs else None
    lags = steady.lags if steady else first.lags if first else None
    named = {
        "in_flight": largest.number if largest else None,
        "conductor_rss_mb": largest.rss_mb if largest else None,
        "kb_per_execution": largest.kb_per_execution if largest else None,
        "executions_per_s": first.executions_per_s if first else None,
        "report_to_event_p95_s": lags.p95 if lags else None,
    }
    everything = {
        **named,
        "sizes": [asdict(size) for size in sizes],
        "throughputs": [asdict(one) for one in throughputs],
        "steady": asdict(steady) if steady else None,
    }
    return rounded(everything)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
