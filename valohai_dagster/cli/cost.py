"""`valohai-dagster cost`: what machines have cost, and for what (A-51, L-40, L-41)."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

import typer

from valohai_dagster.capacity.cost import Bill, Life, Window, Work, bills, months
from valohai_dagster.cli.capacity import Deployment, deployment
from valohai_dagster.cli.render import in_columns
from valohai_dagster.executions.pricing import lives, works

NOBODY = "(nobody)"  # executions of runs that do not say whose they are
OVERHEAD = "(no execution)"  # start-up, idleness and lost attempts, where rows are of executions
_AMOUNTS = ("work", "start_up", "idle", "lost", "total")


class By(str, Enum):
    group = "group"
    project = "project"
    user = "user"
    team = "team"
    month = "month"


def cost(
    by: Annotated[By, typer.Option("--by", help="What a row is.")] = By.group,
    month: Annotated[
        str | None,
        typer.Option("--month", metavar="YYYY-MM", help="This one. Default: the present."),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="YYYY-MM-DD", help="From this day on (UTC).")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="YYYY-MM-DD", help="Before this day (UTC).")
    ] = None,
    group: Annotated[str | None, typer.Option("--group", help="Only of this worker group.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Tells what executions and machines have cost, at the prices of their groups (price_per_hour).

    WORK is the time of executions, START-UP that of machines until they check in, IDLE the rest of their time, and LOST
    that of attempts that were given up and repeated. HOURS and amounts are of the time asked for only, also for what
    goes on. With `--by month` the default is the last twelve months.
    """
    now = datetime.now(timezone.utc)
    window = _window(by, month, since, until, now)
    with deployment() as place:
        if group is not None:
            place.group(group)
        found = _bills(place, by, window, now, group)
    rows = [_row(name, bill) for name, bill in sorted(found.items())]
    if as_json:
        whole = {
            "by": by.value,
            "since": window.since.isoformat(),
            "until": window.until.isoformat(),
        }
        typer.echo(json.dumps({**whole, "rows": rows, "total": _sum(rows)}, indent=2))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, list(_row("", Bill())), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print(by, rows)


def _window(
    by: By, month: str | None, since: str | None, until: str | None, now: datetime
) -> Window:
    if month is not None and (since or until):
        raise typer.BadParameter("give either --month or --since and --until")
    if month is not None:
        first = _day("--month", f"{month}-01")
        return Window(since=first, until=(first + timedelta(days=32)).replace(day=1))
    this = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if by is By.month:
        this = this.replace(year=this.year - 1)
    begin = _day("--since", since) if since else this
    end = _day("--until", until) if until else max(now, begin)
    if end < begin:
        raise typer.BadParameter("--until is before --since")
    return Window(since=begin, until=end)


def _day(option: str, text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc)
    except ValueError:
        wanted = "YYYY-MM" if option == "--month" else "YYYY-MM-DD"
        given = text.removesuffix("-01") if option == "--month" else text
        raise typer.BadParameter(f"{option} {given}: a date as {wanted}") from None


def _bills(
    place: Deployment, by: By, window: Window, now: datetime, group: str | None
) -> Mapping[str, Bill]:
    with place.records.read() as conn:
        machines = lives(conn, window, now, group=group)
        done = list(works(conn, window, now, place.settings.groups, group=group))
    if by is not By.month:
        return bills(machines, done, window, key=lambda one: _key(by, one), rest=_rest(by))
    found: dict[str, Bill] = {}
    for name, part in months(window):
        label = {"key": lambda _, name=name: name, "rest": lambda _, name=name: name}
        found.update(bills(machines, done, part, **label))
    return found


def _key(by: By, work: Work) -> str:
    keys = {By.group: work.group, By.project: work.project, By.user: work.user, By.team: work.team}
    return keys[by] or NOBODY


def _rest(by: By) -> Any:
    def name(one: Life | Work) -> str:
        return one.group if by is By.group else OVERHEAD

    return name


def _row(name: str, bill: Bill) -> dict[str, Any]:
    amounts = {key: _plain(getattr(bill, key)) for key in _AMOUNTS}
    hours = {"hours": round(bill.hours, 4), "unpriced_hours": round(bill.unpriced, 4)}
    return {"key": name, "executions": bill.executions, **hours, **amounts}


def _plain(amount: Decimal) -> float:
    return float(round(amount, 6))


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: round(sum(row[key] for row in rows), 6) for key in _row("", Bill()) if key != "key"
    }


def _print(by: By, rows: list[dict[str, Any]]) -> None:
    if not rows:
        typer.echo("no machine ran and no execution was worked at in that time", err=True)
        return
    head = [by.value.upper(), "EXECUTIONS", "HOURS", "WORK", "START-UP", "IDLE", "LOST", "TOTAL"]
    cells = [head]
    for row in [*rows, {"key": "total", **_sum(rows)}]:
        amounts = [f"{row[key]:.2f}" for key in _AMOUNTS]
        cells.append([row["key"], str(row["executions"]), f"{row['hours']:.2f}", *amounts])
    for line in in_columns(cells, right=frozenset(range(1, len(head)))):
        typer.echo(line)
    unpriced = sum(row["unpriced_hours"] for row in rows)
    if unpriced:
        typer.echo(
            f"{unpriced:.2f} hours are left out: their groups have no price_per_hour in valohai.toml",
            err=True,
        )
