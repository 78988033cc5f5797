"""The agent's loop: wait for the bell, take a job, run it in a thread, until told to drain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import redis

from valohai_agent.commands import CommandReader
from valohai_agent.lease import Lease
from valohai_agent.preemption import Notice
from valohai_agent.protocol import Command
from valohai_agent.redis_link import BLOCK_SECONDS, Backoff
from valohai_agent.session import Session, UnreadableJob
from valohai_agent.stopping import Cause

logger = logging.getLogger(__name__)

REAP_SECONDS = 20.0  # how often leftovers of agents that died on this host are looked for
EARLY_COMMAND_SECONDS = 60.0  # a stop may arrive before this agent knows that it has the lease


class Run(Protocol):
    """One attempt being run; `JobRun` is the real one."""

    lease: Lease

    def run(self) -> None: ...

    def stop(self, *, hard: bool = False, cause: Cause = Cause.user, reason: str = "") -> None: ...

    def preempt(self, notice: Notice | None) -> None: ...

    def fence(self) -> None: ...

    def upload_now(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    slots: int = 1
    once: bool = False  # run one job, then end
    idle_exit_seconds: float | None = None  # end after being idle for so long
    busy_mark: Path | None = None  # a file that is touched while something runs


class WorkerLoop:
    """Runs jobs in up to `slots` threads. `start_run` makes the run of a lease, `reap` cleans up after dead agents.

    `drain` finishes what runs and takes nothing new; `stop_jobs` ends the running commands early. All three may be
    called from signal handlers: they only set events or start threads.
    """

    def __init__(
        self,
        session: Session,
        options: LoopOptions,
        *,
        start_run: Callable[[Lease], Run],
        reap: Callable[[], object] = lambda: None,
    ) -> None:
        self._session, self._options = session, options
        self._start_run, self._reap = start_run, reap
        self._draining = threading.Event()
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._early: dict[str, tuple[float, Command]] = {}
        self._idle_since = time.monotonic()
        self._taken = 0
        self.update_wanted = False  # to be started again, by a newer agent
        self._notice: Notice | None = None
        keys, identity = session.keys, session.identity
        self._commands = CommandReader(
            session.link, keys.command(identity.group, session.name), self.dispatch
        )
        session.on_rename = self._commands.rename

    # -- from outside ---------------------------------------------------------------------------------------------
    def drain(self) -> None:
        self._draining.set()

    def stop_jobs(self, *, hard: bool = False) -> None:
        """The agent has to leave: ends all commands, soft or at once."""
        for run in list(self._runs.values()):
            threading.Thread(
                target=run.stop, kwargs={"hard": hard, "cause": Cause.shutdown}, daemon=True
            ).start()

    def preempt(self, notice: Notice | None) -> None:
        """The machine goes away: nothing new is taken, and what runs has the time that is left (K-53). None: it does not
        after all; what runs goes on, still nothing new is taken."""
        self._notice = notice
        self.drain()
        for run in list(self._runs.values()):
            self._preempt(run, notice)

    def _preempt(self, run: Run, notice: Notice | None) -> None:
        threading.Thread(target=run.preempt, args=(notice,), name="preempt", daemon=True).start()

    def dispatch(self, command: Command, own: bool) -> None:
        """Applies one command; `own` is False when it was addressed to a name that this agent had to give up."""
        extra = {"action": f"command-{command.kind}", "execution": command.execution_id}
        logger.info(
            "command %s: %s", command.kind, command.reason or "no reason given", extra=extra
        )
        if command.execution_id is not None:
            self._dispatch_to_run(command.execution_id, command)
        elif own and command.kind in ("drain", "update"):
            self.update_wanted = command.kind == "update" and (
                self.update_wanted or not self._draining.is_set()
            )
            self.drain()
        elif own and command.kind == "upload-now":
            for run in list(self._runs.values()):
                _apply(command, run)

    # -- the loop -------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Returns when drained. The session must be registered."""
        self._commands.start()
        taker = threading.Thread(target=self._take_jobs, name="taker", daemon=True)
        taker.start()
        reaped_at = time.monotonic()
        while not self._finished():
            self._draining.wait(0.5) if not self._draining.is_set() else self._wait_for_change(0.2)
            self._drain_when_idle()
            self._announce_drain()
            self._mark_busy()
            if time.monotonic() - reaped_at > REAP_SECONDS:
                self._clean_up()
                reaped_at = time.monotonic()
        self._commands.stop()

    def _finished(self) -> bool:
        if not self._draining.is_set():
            return False
        with self._taking:  # a job that is being taken right now is ours to run
            return not self._runs

    def _wait_for_change(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def _mark_busy(self) -> None:
        """Whoever powers abandoned machines off sees that this one is in use."""
        mark = self._options.busy_mark
        if mark is not None and self._runs:
            try:
                mark.touch()
            except OSError as exc:
                extra = {"action": "busy-mark-failed"}
                logger.warning("cannot mark this machine as busy: %s", exc, extra=extra)

    def _announce_drain(self) -> None:
        if self._draining.is_set() and not self._session.draining:
            self._session.draining = True
            self._session.changed()
            extra = {"action": "draining", "running": len(self._runs)}
            logger.info("draining: %d running, nothing new is taken", len(self._runs), extra=extra)

    def _drain_when_idle(self) -> None:
        limit = self._options.idle_exit_seconds
        if limit is not None and not self._runs and time.monotonic() - self._idle_since > limit:
            self.drain()

    def _take_jobs(self) -> None:
        backoff = Backoff()
        while not self._draining.is_set():
            if not self._has_free_slot():
                self._wait_for_change(0.5)
                continue
            try:
                taken = self._take_one()
                backoff.reset()
            except UnreadableJob as exc:
                logger.error("%s", exc, extra={"action": "job-unreadable"})
            except (redis.RedisError, OSError):  # the link has logged it
                self._draining.wait(backoff.seconds())
            except Exception:
                logger.exception("taking a job failed", extra={"action": "take-failed"})
                self._draining.wait(backoff.seconds())
            else:
                if not taken:
                    self._session.wait_for_bell(BLOCK_SECONDS, stop=self._draining)

    def _has_free_slot(self) -> bool:
        return len(self._runs) < self._options.slots

    def _take_one(self) -> bool:
        with self._taking:
            if self._draining.is_set():
                return False
            lease = self._session.take()
            if lease is None:
                return False
            self._begin(lease)
            return True

    def _begin(self, lease: Lease) -> None:
        extra = {"action": "leased", "execution": lease.execution_id, "attempt": lease.attempt}
        logger.info("leased %s, attempt %d", lease.execution_id, lease.attempt, extra=extra)
        run = self._start_run(lease)
        self._runs[lease.token] = run
        self._taken += 1
        self._occupied()
        thread = threading.Thread(
            target=self._run, args=(run,), name=f"job-{lease.execution_id[:8]}", daemon=True
        )
        thread.start()
        self._apply_early_command(run)
        if self._notice is not None:  # it was being taken when the notice came
            self._preempt(run, self._notice)
        if self._options.once:
            self.drain()

    def _run(self, run: Run) -> None:
        lease = run.lease
        try:
            if lease.attempt > 1:
                self._clean_up()  # the attempt before may still compute on this very host
            run.run()
        except Exception:
            logger.exception(
                "job thread failed", extra={"action": "job-failed", "execution": lease.execution_id}
            )
        finally:
            self._runs.pop(lease.token, None)
            self._idle_since = time.monotonic()
            self._occupied()
            extra = {
                "action": "job-over",
                "execution": lease.execution_id,
                "attempt": lease.attempt,
            }
            logger.info("done with %s, attempt %d", lease.execution_id, lease.attempt, extra=extra)
            with self._changed:
                self._changed.notify_all()

    def _clean_up(self) -> None:
        try:
            self._reap()
        except Exception:  # a container engine that is down must not end the agent
            logger.exception(
                "cleaning up after dead agents failed", extra={"action": "reap-failed"}
            )

    def _occupied(self) -> None:
        self._session.busy = len(self._runs)
        self._session.changed()

    # -- commands for runs ------------------------------------------------------------------------------------------
    def _dispatch_to_run(self, execution_id: str, command: Command) -> None:
        for run in list(self._runs.values()):
            if run.lease.execution_id == execution_id and command.token in (None, run.lease.token):
                _apply(command, run)
                return
        self._early[execution_id] = (time.monotonic() + EARLY_COMMAND_SECONDS, command)

    def _apply_early_command(self, run: Run) -> None:
        """A command that overtook the answer to `take`; those of earlier attempts name another token."""
        now = time.monotonic()
        _, command = self._early.pop(run.lease.execution_id, (0.0, None))
        self._early = {key: kept for key, kept in self._early.items() if kept[0] > now}
        if command is not None and command.token in (None, run.lease.token):
            _apply(command, run)


def _apply(command: Command, run: Run) -> None:
    if command.kind == "stop":
        run.stop(reason=command.reason)
    elif command.kind == "stop-hard":
        run.stop(hard=True, reason=command.reason)
    elif command.kind == "fence":
        run.fence()
    elif command.kind == "upload-now":
        threading.Thread(target=run.upload_now, name="upload-now", daemon=True).start()
