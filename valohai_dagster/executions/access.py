"""Who may use a worker group, and how much of it at once (E-01, L-10, L-11, L-12). Pure.

Who launched a run is what its tags say; this is the only place that knows it, until people log in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from valohai_dagster.errors import RefusedError
from valohai_dagster.settings_groups import AnyGroupSettings

USER_TAG, TEAM_TAG = "valohai/user", "valohai/team"
ORGANIZATION_TAG = "valohai/organization"
_DAGSTER_USER_TAG = "dagster/user"  # as Dagster's own tools name the user
_LONGEST = 255  # characters of a name that are kept


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The one who launched an execution; an empty `user` is everybody who did not say."""

    user: str = ""
    teams: tuple[str, ...] = ()
    organization: str = ""

    def __str__(self) -> str:
        """
        >>> str(Launcher(user="ann", teams=("a", "b"))), str(Launcher())
        ('user ann (team a, b)', 'a run without the tag valohai/user')
        """
        who = f"user {self.user}" if self.user else f"a run without the tag {USER_TAG}"
        belongs = [f"team {', '.join(self.teams)}"] if self.teams else []
        if self.organization:
            belongs.append(f"organization {self.organization}")
        return f"{who} ({', '.join(belongs)})" if belongs else who


NOBODY = Launcher()


def launcher_of(tags: Mapping[str, str]) -> Launcher:
    """From a run's tags. `valohai/team` may name several teams, with commas between them."""
    return Launcher(
        user=(tags.get(USER_TAG) or tags.get(_DAGSTER_USER_TAG, "")).strip()[:_LONGEST],
        teams=teams_of(tags.get(TEAM_TAG, "")[:_LONGEST]),
        organization=tags.get(ORGANIZATION_TAG, "").strip(),
    )


def teams_of(text: str | None) -> tuple[str, ...]:
    """
    >>> teams_of("vision, nlp,"), teams_of(None)
    (('vision', 'nlp'), ())
    """
    names = (name.strip() for name in (text or "").split(","))
    return tuple(dict.fromkeys(name for name in names if name))


# -- may they at all -----------------------------------------------------------------------------------------------


def require_access(name: str, group: AnyGroupSettings, launcher: Launcher) -> None:
    """Raises RefusedError with the reason and a way out."""
    if not group.enabled:
        raise RefusedError(
            f"group {name!r} is disabled: nothing can be launched in it. Choose another environment, or enable it "
            f"again (`enabled` of the group, `valohai-dagster groups enable {name}`)"
        )
    if group.owner is not None and not _owns(group.owner, launcher):
        raise RefusedError(
            f"group {name!r} belongs to {group.owner.replace(':', ' ', 1)}, and this was launched by {launcher}. "
            f"Choose another environment; who launches is said by the run's tags {USER_TAG}, {TEAM_TAG} and "
            f"{ORGANIZATION_TAG}"
        )
    if group.team_quotas and _team_limit(group, launcher) == 0:
        having = ", ".join(sorted(team for team, quota in group.team_quotas.items() if quota))
        raise RefusedError(
            f"group {name!r} is for teams with a quota ({having or 'no team has one'}), and this was launched by "
            f"{launcher}. Choose another environment, set the run's tag {TEAM_TAG}, or add the team to `team_quotas` "
            f"of the group (L-12)"
        )


def _owns(owner: str, launcher: Launcher) -> bool:
    kind, _, name = owner.partition(":")
    names = {
        "user": (launcher.user,),
        "team": launcher.teams,
        "organization": (launcher.organization,),
    }
    return name in names[kind]


def _team_limit(group: AnyGroupSettings, launcher: Launcher) -> int:
    """All teams of the launcher together (L-12)."""
    return sum(group.team_quotas.get(team, 0) for team in launcher.teams)


# -- how much of it ------------------------------------------------------------------------------------------------


def has_quotas(group: AnyGroupSettings) -> bool:
    return bool(group.per_user_quota or group.team_quotas)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One unfinished execution of a group with quotas. `waits`: it is not in the queue yet."""

    id: str
    launcher: Launcher
    waits: bool
    priority: int = 0
    at: datetime
    counter: int = 0  # in its project; of those that came together

    @property
    def rank(self) -> tuple[int, datetime, int, str]:
        """Of two that wait the lower one goes first."""
        return (-self.priority, self.at, self.counter, self.id)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What users and teams have of one group. `take` counts one more."""

    name: str
    group: AnyGroupSettings
    users: Counter[str] = field(default_factory=Counter)
    teams: Counter[frozenset[str]] = field(default_factory=Counter)

    def take(self, launcher: Launcher) -> None:
        self.users[launcher.user] += 1
        self.teams[frozenset(launcher.teams)] += 1

    def obstacle(self, launcher: Launcher) -> str | None:
        """Why one more of theirs has to wait, None when it has not. The group may have changed since it was launched."""
        if not self.group.enabled:
            return f"waits: group {self.name} is disabled; it goes on when that is enabled again"
        used, most = self.users[launcher.user], self.group.per_user_quota
        if most and used >= most:
            who = f"user {launcher.user}" if launcher.user else f"runs without the tag {USER_TAG}"
            return self._full(who, used, most, "per_user_quota")
        if not self.group.team_quotas:
            return None
        counted = {team for team in launcher.teams if self.group.team_quotas.get(team)}
        if not counted:
            return (
                f"waits: {launcher} has no quota in group {self.name} any more (team_quotas); it goes on when one of "
                "its teams has one again"
            )
        used = sum(number for teams, number in self.teams.items() if teams & counted)
        most = _team_limit(self.group, launcher)
        if used < most:
            return None
        return self._full(f"team {', '.join(sorted(counted))}", used, most, "team_quotas")

    def _full(self, who: str, used: int, most: int, setting: str) -> str:
        return (
            f"waits for its turn: of group {self.name}, {who} has {used} of {most} executions at once ({setting}); "
            "it goes on when one of them ends"
        )


class Turns:
    """Whose turn it is in one group. Nobody overtakes somebody with the same user and teams, except by priority.

    `obstacles`: of the claims that wait, those that must go on waiting and why.
    """

    def __init__(self, name: str, group: AnyGroupSettings, claims: Iterable[Claim]) -> None:
        self._name, self._group = name, group
        self._claims = {claim.id: claim for claim in claims}
        self._settle()

    def _settle(self) -> None:
        self.obstacles: dict[str, str] = {}
        self._tally = Tally(name=self._name, group=self._group)
        self._last: Claim | None = None
        for claim in self._claims.values():
            if not claim.waits:
                self._tally.take(claim.launcher)
        waiting = (claim for claim in self._claims.values() if claim.waits)
        for claim in sorted(waiting, key=lambda one: one.rank):
            self._look(claim)

    def _look(self, claim: Claim) -> None:
        self._last = claim
        obstacle = self._tally.obstacle(claim.launcher)
        if obstacle is None:
            self._tally.take(claim.launcher)
        else:
            self.obstacles[claim.id] = obstacle

    def take(self, claim: Claim) -> str | None:
        """Why this one has to wait, a new one or one that waits; None when it has its turn, which is then used."""
        if claim.id not in self._claims:
            self._claims[claim.id] = claim
            if self._last is None or claim.rank > self._last.rank:
                self._look(claim)
            else:
                self._settle()
        obstacle = self.obstacles.get(claim.id)
        if obstacle is None:
            self._claims[claim.id] = replace(self._claims[claim.id], waits=False)
        return obstacle
