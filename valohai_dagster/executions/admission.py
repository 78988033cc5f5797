"""From submitted specs to queued executions, in one transaction for as many as there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from valohai_dagster.data import datums
from valohai_dagster.data.secrets import SecretKey, Variable, variables_of_groups
from valohai_dagster.data.survey import Answer, Pattern, Survey, remote_patterns
from valohai_dagster.errors import RefusedError, ValohaiError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.credentials import open_credentials
from valohai_dagster.executions.dispatch import QueueEntry
from valohai_dagster.executions.grants import GrantPlanner, job_of
from valohai_dagster.executions.memory import Active, Details, Metrics
from valohai_dagster.executions.preparation import Prepared, VariablesOf, choose_group, prepare
from valohai_dagster.executions.quotas import Gate
from valohai_dagster.executions.remarks import settle_versions_of
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.executions.views import execution_view, input_view, views_of
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What became of one submission."""

    spec: ExecutionSpec
    shard: int
    view: ExecutionView | None = None  # None only when another conductor has to make it
    queue: QueueEntry | None = None  # for the queue, which knows whether it has it already
    ahead: int | None = None  # how many are before it, if it was queued now
    new: bool = False
    elsewhere: bool = False  # the shard is another conductor's
    changed: Sequence[str] = ()  # warnings of inputs that have changed since their last use
    waits: str | None = None  # why it is not queued yet although nothing is missing (L-10)


class Admission:
    """Part of the service, on the records' thread.

    An execution whose inputs lie in stores behind a network stays `created` until those have answered: `patterns_of`
    tells what to ask, `settle` goes on with the answers.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        stores: Stores,
        planner: GrantPlanner,
        secret_key: SecretKey,
    ) -> None:
        self._settings = settings
        self._records = records
        self._stores = stores
        self._planner = planner
        self._secret_key = secret_key

    def admit(self, writing: Writing, specs: Sequence[ExecutionSpec]) -> list[Admitted]:
        """Creates what is new, refuses what cannot run, and joins what is there; in the order of `specs`."""
        unique = {spec.execution_id: spec for spec in specs}
        places = ledger.places_of(writing.conn, list(unique))
        made = [
            self._join(writing, spec, places[execution_id])
            for execution_id, spec in unique.items()
            if execution_id in places
        ]
        made += self._create_all(writing, [s for i, s in unique.items() if i not in places])
        answers = {admitted.spec.execution_id: admitted for admitted in made}
        self._add_views(writing, answers)
        return [answers[spec.execution_id] for spec in specs]

    def crash(self, writing: Writing, spec: ExecutionSpec, reason: str) -> None:
        """Ends an execution that cannot be handled, so that nobody waits for it for ever."""
        active = writing.find(spec.execution_id)
        if active is not None:
            ended = {"status": Status.crashed.value, "reason": reason, "ended_at": writing.now}
            writing.update(active, **ended)
            writing.change(active, status=Status.crashed)
            settle_versions_of(writing, [active.id])
            return
        for created in self._identities(writing, [spec]):
            self._refuse(writing, created, spec, Status.crashed, reason)

    # -- new ones ----------------------------------------------------------------------------------------------
    def _create_all(self, writing: Writing, specs: Sequence[ExecutionSpec]) -> list[Admitted]:
        shards = {spec.execution_id: self._shard(spec) for spec in specs}
        mine = [spec for spec in specs if writing.is_mine(shards[spec.execution_id])]
        others = [
            Admitted(spec=spec, shard=shards[spec.execution_id], elsewhere=True)
            for spec in specs
            if not writing.is_mine(shards[spec.execution_id])
        ]
        created = self._identities(writing, mine)
        known: dict[tuple[str, ...], Sequence[Variable]] = {}

        def variables_of(groups: Sequence[str]) -> Sequence[Variable]:
            """The same few groups for many executions."""
            key = tuple(groups)
            if key not in known:
                known[key] = variables_of_groups(writing.conn, groups, self._secret_key)
            return known[key]

        gate = Gate(writing, self._settings)
        if mine:
            gate.enter(self._groups_of(mine))
        pairs = zip(created, mine, strict=True)
        return others + [self._create(writing, c, spec, variables_of, gate) for c, spec in pairs]

    def _groups_of(self, specs: Sequence[ExecutionSpec]) -> set[str]:
        """Of those that have one: whoever asks for an unknown one is refused later."""
        found = set[str]()
        for spec in specs:
            with suppress(RefusedError):
                found.add(choose_group(spec, self._settings)[0])
        return found

    def _shard(self, spec: ExecutionSpec) -> int:
        return self._records.shard_of(spec.run_id or spec.execution_id)

    def _identities(self, writing: Writing, specs: Sequence[ExecutionSpec]) -> list[ledger.Created]:
        """Counters of all projects in one order, so that no two conductors wait for each other."""
        projects = {name: writing.project(name) for name in {s.project.name for s in specs}}
        for spec in specs:
            writing.ensure_commit(projects[spec.project.name], spec.commit)
        numbers = Counter(projects[spec.project.name] for spec in specs)
        following = {
            project: ledger.take_counters(writing.conn, project, numbers[project])
            for project in sorted(numbers)
        }
        created = []
        for spec in specs:
            project = projects[spec.project.name]
            identity = {"id": spec.execution_id, "shard": self._shard(spec), "ctime": writing.now}
            created.append(
                ledger.Created(**identity, project_id=project, counter=following[project])
            )
            following[project] += 1
        return created

    def _create(
        self,
        writing: Writing,
        created: ledger.Created,
        spec: ExecutionSpec,
        variables_of: VariablesOf,
        gate: Gate,
    ) -> Admitted:
        try:
            group, _ = choose_group(spec, self._settings)
            gate.require(spec, group)
            if obstacle := gate.obstacle(spec, group, created.counter):
                return self._wait(writing, created, spec, group, obstacle)
            if self.patterns_of(spec):
                return self._wait(writing, created, spec, group)
            survey = Survey(self._stores)
            prepared = self._prepare(writing, created, spec, variables_of, survey)
        except ValohaiError as error:
            view = self._refuse(writing, created, spec, Status.error, str(error))
            return Admitted(spec=spec, shard=created.shard, view=view, new=True)
        return self._queue(writing, created, spec, prepared)

    def _prepare(
        self,
        writing: Writing,
        created: ledger.Created,
        spec: ExecutionSpec,
        variables_of: VariablesOf,
        survey: Survey,
    ) -> Prepared:
        group, notices = choose_group(spec, self._settings)
        prepared = prepare(
            writing.conn,
            spec,
            created,
            group=group,
            notices=notices,
            settings=self._settings,
            stores=self._stores,
            secret_key=self._secret_key,
            variables_of=variables_of,
            survey=survey,
        )
        files = (file for item in prepared.job.inputs for file in item.files)
        datums.hold(writing.conn, {file.datum_id for file in files if file.datum_id})
        return prepared

    # -- those that wait for stores or their turn --------------------------------------------------------------
    def patterns_of(self, spec: ExecutionSpec) -> list[Pattern]:
        """What stores behind a network have to be asked before the execution can be queued."""
        return remote_patterns(open_credentials(spec, self._secret_key), self._stores)

    def _wait(
        self,
        writing: Writing,
        created: ledger.Created,
        spec: ExecutionSpec,
        group: str,
        obstacle: str | None = None,
    ) -> Admitted:
        """It stays `created`: for its stores, or with an `obstacle` for its turn (L-10)."""
        row = {**ledger.execution_row(created, spec, group), "reason": obstacle}
        active = _active(created, group, Status.created, spec)
        writing.change(active)
        writing.keep_metrics(created.id, Metrics())
        view = self._insert(writing, active, row, spec.project.name)
        return Admitted(spec=spec, shard=created.shard, view=view, new=True, waits=obstacle)

    def settle(
        self, writing: Writing, execution_id: str, answers: Mapping[Pattern, Answer]
    ) -> Admitted | None:
        """Queues or refuses an execution that waited for stores, for its turn, or for both in this order.

        None when it does not wait any more, or has to go on waiting for its turn.
        """
        active = writing.find(execution_id)
        if active is None or active.status is not Status.created:
            return None
        if not writing.is_mine(active.shard):
            return None
        writing.flush()
        row = ledger.row_of(writing.conn, execution_id)
        spec = ledger.spec_of(row)
        if self._is_held(writing, active, spec, row.counter):
            return None
        identity = {"id": row.id, "shard": active.shard, "ctime": row.ctime}
        created = ledger.Created(**identity, project_id=row.project_id, counter=row.counter)
        survey = Survey(self._stores, answers)
        try:
            prepared = self._prepare(writing, created, spec, self._variables_now(writing), survey)
        except ValohaiError as error:
            ended = {"status": Status.error.value, "reason": str(error), "ended_at": writing.now}
            writing.update(active, **ended)
            writing.change(active, status=Status.error)
            return Admitted(spec=spec, shard=active.shard, new=True)
        job, sources = prepared.job, self._planner.seal_sources(prepared.sources)
        changed = _active(created, job.group, Status.queued, spec)
        queued = {"status": Status.queued.value, "qtime": writing.now, "group_name": job.group}
        queued["reason"] = None  # why it has waited
        writing.update(active, job=job.model_dump(mode="json"), sources=sources, **queued)
        writing.change(changed)
        if inputs := ledger.input_rows(job, prepared.asked):
            writing.insert(changed, t.execution_inputs, *inputs)
        entry = QueueEntry(job=job, priority=spec.priority)
        known = {"spec": spec, "shard": active.shard, "queue": entry}
        return Admitted(**known, new=True, changed=prepared.changed)

    def _is_held(self, writing: Writing, active: Active, spec: ExecutionSpec, counter: int) -> bool:
        """A group that is gone from the settings has no quotas; whatever is wrong with it is said by `_prepare`."""
        gate = Gate(writing, self._settings)
        known = active.group in self._settings.groups
        return known and gate.obstacle(spec, active.group, counter) is not None

    def _variables_now(self, writing: Writing) -> VariablesOf:
        return lambda groups: variables_of_groups(writing.conn, groups, self._secret_key)

    def _refuse(
        self,
        writing: Writing,
        created: ledger.Created,
        spec: ExecutionSpec,
        status: Status,
        reason: str,
    ) -> ExecutionView:
        row = ledger.execution_row(created, spec, self._settings.default_group)
        row.update(status=status.value, reason=reason, ended_at=writing.now)
        active = Active(id=created.id, shard=created.shard, group=row["group_name"], status=status)
        return self._insert(writing, active, row, spec.project.name)

    def _queue(
        self, writing: Writing, created: ledger.Created, spec: ExecutionSpec, prepared: Prepared
    ) -> Admitted:
        job = prepared.job
        sources = self._planner.seal_sources(prepared.sources)
        row = ledger.execution_row(created, spec, job.group)
        row.update(
            job=job.model_dump(mode="json"),
            sources=sources,
            status=Status.queued.value,
            qtime=writing.now,
        )
        active = _active(created, job.group, Status.queued, spec)
        writing.change(active)
        known = {name: row[name] for name in ("id", "project_id", "image", "spec", "job")}
        writing.keep_details(Details(**known, sources=sources))
        writing.keep_metrics(created.id, Metrics())
        inputs = ledger.input_rows(job, prepared.asked)
        view = self._insert(writing, active, row, spec.project.name, inputs=inputs)
        entry = QueueEntry(job=job, priority=spec.priority)
        known = {"spec": spec, "shard": created.shard, "view": view, "queue": entry}
        return Admitted(**known, new=True, changed=prepared.changed)

    def _insert(
        self,
        writing: Writing,
        active: Active,
        row: dict[str, Any],
        project_name: str,
        inputs: Sequence[dict[str, Any]] = (),
    ) -> ExecutionView:
        attempt = {"execution_id": active.id, "number": 1, **_NOBODY}
        writing.insert(active, t.executions, row)
        writing.insert(active, t.attempts, attempt)
        if inputs:
            writing.insert(active, t.execution_inputs, *inputs)
        return execution_view(
            SimpleNamespace(**row),
            project_name,
            attempts=[SimpleNamespace(**attempt)],
            inputs=[input_view(SimpleNamespace(**item)) for item in inputs],
            outputs=[],
        )

    # -- known ones --------------------------------------------------------------------------------------------
    def _join(self, writing: Writing, spec: ExecutionSpec, place: ledger.Place) -> Admitted:
        """Another client, or the same one again, or another try of the step that goes on with the execution.

        An execution belongs to the shard of its run, so that one conductor has all of a run in hand.
        """
        shard = place.shard
        active = writing.find(spec.execution_id)
        if active is None or not writing.is_mine(shard):
            return Admitted(spec=spec, shard=shard, elsewhere=True)
        if spec.run_id != place.run_id or spec.retry_number != place.retry_number:
            shard = self._shard(spec)
            writing.update(active, **ledger.rejoined(spec, shard))
            active = writing.change(active, shard=shard)
        queue = None
        if active.status is Status.queued and active.token is None:
            # It may have been written without having been queued, just before a conductor died.
            job = job_of(writing.details(active.id), active)
            queue = QueueEntry(job=job, priority=active.priority, front=active.front)
        elsewhere = not writing.is_mine(shard)
        return Admitted(spec=spec, shard=shard, queue=queue, elsewhere=elsewhere)

    def _add_views(self, writing: Writing, answers: dict[str, Admitted]) -> None:
        wanted = [key for key, admitted in answers.items() if admitted.view is None]
        if not wanted:
            return
        writing.flush()
        views = views_of(writing.conn, wanted, datum_url=self._settings.datum_url)
        for key in wanted:
            answers[key] = replace(answers[key], view=views.get(key))


def _active(created: ledger.Created, group: str, status: Status, spec: ExecutionSpec) -> Active:
    return Active(
        id=created.id,
        shard=created.shard,
        group=group,
        status=status,
        priority=spec.priority,
        condition=spec.stop_condition,
    )


_NOBODY = dict.fromkeys(("worker", "host", "runtime", "end", "reason"))
