"""What happens in one simulated world: its work, its weather, its accidents, all from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from random import Random

from valohai_dagster.capacity.clouds.simulated_cloud import Spell, Weather
from valohai_dagster.capacity.model import Policy, Purchase

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ZONES = ("a", "b", "c")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One job: when it comes and how long it takes, in seconds."""

    arrives: float
    lasts: float
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class Accident:
    """`share` of the machines: taken back (spot), cut off for `seconds`, broken, or left without their agent. In a
    blackout the broker is away: nobody hears anybody."""

    kind: str  # storm, partition, crash, agent-death, blackout
    at: float
    share: float
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`conductor_deaths`: chance of each call between reconciler, book and cloud to be its last. `call_seconds`: that a
    call to the cloud takes at most."""

    seed: int
    policy: Policy
    weather: Weather
    work: tuple[Work, ...]
    accidents: tuple[Accident, ...] = ()
    conductor_deaths: float = 0.0
    call_seconds: float = 0.0
    agents: int = 1  # on each machine
    can_stop: bool = False
    hours: float = 2.0  # of work and accidents; afterwards the sky clears

    @property
    def features(self) -> tuple[str, ...]:
        """What is out of the ordinary in it."""
        weather = self.weather
        found = {
            "droughts": weather.droughts,
            "outages": weather.outages,
            "throttling": weather.throttle_rate,
            "lagging lists": weather.listing_lag,
            "no tokens": not weather.keeps_tokens,
            "never registering": weather.never_registers_rate,
            "lost answers": weather.lost_answer_rate,
            "conductor deaths": self.conductor_deaths,
            **{accident.kind: True for accident in self.accidents},
        }
        return tuple(name for name, there in found.items() if there)


def scenario(seed: int) -> Scenario:
    """A different world for each seed: some are calm, most are not."""
    chance = Random(seed)  # noqa: S311
    hours = chance.choice([1.0, 2.0, 3.0])
    policy = _policy(chance)
    agents = chance.choice([1, 1, 1, 2])
    return Scenario(
        seed=seed,
        policy=replace(policy, slots=policy.slots * agents),
        weather=_weather(chance, seed, hours * 3600, policy),
        work=_work(chance, hours * 3600, policy.max_machines),
        accidents=_accidents(chance, hours * 3600),
        conductor_deaths=chance.choice([0.0, 0.0, 0.002, 0.01, 0.05]),
        call_seconds=chance.choice([0.0, 1.0, 5.0]),
        agents=agents,
        can_stop=chance.random() < 0.5,
        hours=hours,
    )


def _policy(chance: Random) -> Policy:
    most = chance.choice([1, 3, 5, 10, 20])
    spot = chance.random() < 0.5
    return Policy(
        min_machines=chance.choice([0, 0, 0, 1, 2]) if most > 2 else 0,
        max_machines=most,
        slots=chance.choice([1, 1, 1, 2]),
        zones=chance.choice([("",), ZONES[:2], ZONES]),
        spot=spot,
        on_demand_fallback=spot and chance.random() < 0.6,
        grace=timedelta(minutes=chance.choice([1, 5, 15])),
        stop_when_idle=chance.random() < 0.3,
        destroy_after=timedelta(minutes=chance.choice([20, 60])),
        boot=timedelta(minutes=chance.choice([5, 15])),
        bootstrap="1",
    )


def _weather(chance: Random, seed: int, span: float, policy: Policy) -> Weather:
    calm = chance.random() < 0.15
    if calm:
        return Weather(seed=seed, boot=(20, 60))
    some = chance.choice
    return Weather(
        seed=seed,
        boot=some([(10, 30), (30, 120), (60, 400)]),
        delivery=some([(0, 0), (0, 10), (5, 60)]),
        capacity_error_rate=some([0, 0, 0.1, 0.4]),
        throttle_rate=some([0, 0, 0.05, 0.2]),
        lost_answer_rate=some([0, 0, 0.02, 0.1]),
        partial_rate=some([0, 0, 0.3]),
        silent_failure_rate=some([0, 0, 0, 0.1]),
        never_registers_rate=some([0, 0, 0.05, 0.3]),
        preemption_rate_per_hour=some([0, 0.1, 1.0]),
        listing_lag=some([0, 0, 5, 30, 60]),
        keeps_tokens=chance.random() < 0.9,
        droughts=_spells(chance, span, some([0, 0, 1, 3]), policy),
        outages=_spells(chance, span, some([0, 0, 1, 3]), None),
    )


def _spells(chance: Random, span: float, number: int, policy: Policy | None) -> tuple[Spell, ...]:
    found = []
    for _ in range(number):
        start = chance.uniform(0, span)
        spell = Spell(start=at(start), end=at(start + chance.uniform(60, 1800)))
        if policy is not None:
            zone = chance.choice([None, *policy.zones])
            purchase = chance.choice([None, Purchase.spot, Purchase.spot, Purchase.on_demand])
            spell = replace(spell, zone=zone, purchase=purchase)
        found.append(spell)
    return tuple(found)


def _work(chance: Random, span: float, most: int) -> tuple[Work, ...]:
    """Bursts and a trickle, of a size that `most` machines can cope with in the end."""
    typical = chance.choice([30, 120, 600])
    jobs = [
        _job(chance, chance.uniform(0, span), typical)
        for _ in range(chance.choice([0, 5, 30 if most > 1 else 10]))
    ]
    for _ in range(chance.choice([1, 2, 4])):
        when = chance.uniform(0, span * 0.9)
        jobs += [
            _job(chance, when + chance.uniform(0, 20), typical)
            for _ in range(chance.choice([1, most, 3 * most]))
        ]
    return tuple(sorted(jobs, key=lambda job: job.arrives))


def _job(chance: Random, arrives: float, typical: float) -> Work:
    lasts = min(3600.0, max(1.0, chance.expovariate(1 / typical)))
    return Work(arrives=arrives, lasts=lasts, priority=chance.choice([0, 0, 0, 1]))


def _accidents(chance: Random, span: float) -> tuple[Accident, ...]:
    found = []
    for kind in ("storm", "partition", "crash", "agent-death"):
        for _ in range(chance.choice([0, 0, 1, 2])):
            seconds = chance.choice([5, 30, 120, 400, 1500]) if kind == "partition" else 0
            found.append(
                Accident(
                    kind=kind,
                    at=chance.uniform(0, span),
                    share=chance.choice([0.2, 0.5, 1.0]) if kind == "storm" else 0.2,
                    seconds=seconds,
                )
            )
    for _ in range(chance.choice([0, 0, 1])):
        seconds = chance.choice([20, 120, 600, 1500])
        start = chance.uniform(0, span)
        found.append(Accident(kind="blackout", at=start, share=1.0, seconds=seconds))
    return tuple(found)
