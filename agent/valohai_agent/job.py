"""One attempt of one execution, from the lease to the last report.

Phases: preparing (directories, code) -> pulling (image) -> downloading (inputs) -> running (the user's command, the
only one that limits count) -> uploading (outputs, logs). Whatever happens, the attempt ends in one `finished` report,
unless its lease was lost: then it ends in silence, since nothing of it counts.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from valohai_agent.archive import unpack_archive
from valohai_agent.config_files import (
    build_environment,
    switch,
    write_config_files,
    write_preemption,
)
from valohai_agent.console import Console
from valohai_agent.errors import AgentError
from valohai_agent.host import host_facts, leased_report
from valohai_agent.job_inputs import JobInputs
from valohai_agent.job_logs import store_logs
from valohai_agent.lease import Lease
from valohai_agent.local_api import LocalApi
from valohai_agent.outputs import OutputCollector, OutputSummary
from valohai_agent.phases import PhaseClock, source_words
from valohai_agent.preemption import Notice, report_of
from valohai_agent.protocol import (
    PROTOCOL_VERSION,
    Finished,
    Grants,
    Phase,
    PhaseChanged,
    Preempted,
    StatusDetail,
    StopAcknowledged,
    Usage,
    Warned,
)
from valohai_agent.remote_debug import remote_debug
from valohai_agent.runtimes.base import ExitStatus, Running, RunSpec
from valohai_agent.runtimes.pulling import without_login
from valohai_agent.stopping import Cause, Limits, SignalName, patience_within
from valohai_agent.supervise import Supervisor
from valohai_agent.surroundings import Surroundings
from valohai_agent.transfer import Transferer
from valohai_agent.usage import usage_words
from valohai_agent.verdict import Observed, judge, limit_words
from valohai_agent.version import __version__
from valohai_agent.workspace import Workspace

logger = logging.getLogger(__name__)


class Ended(Exception):
    """The attempt was told to end before its command began."""


class JobRun:
    """Runs one lease to its end; `stop`, `fence` and `upload_now` come from the command thread."""

    def __init__(self, lease: Lease, around: Surroundings) -> None:
        self.lease, self.job, self._around = lease, lease.job, around
        self._clock = around.clock
        self._phases = PhaseClock(
            around.clock,
            changed=self._phase_changed,
            progress=lease.reporter.progress,
            log=lambda text: self._console.status(text),
        )
        self._limits = Limits(
            time_limit_seconds=self.job.time_limit_seconds,
            no_output_timeout_seconds=self.job.no_output_timeout_seconds,
        )
        self._supervisor = Supervisor(
            around.clock,
            limits=self._limits,
            patience=around.patience,
            last_output_at=lambda: self._console.last_output_at,
            on_limit=self._limit_reached,
            on_signal=self._signal_sent,
            tick=lambda: self._console.tick(),
        )
        self._lock = threading.Lock()
        self._stop_requested = self._starting = False
        self._stop_reason = ""
        self._notice: Notice | None = None
        self._over = threading.Event()
        self._collecting = threading.Event()
        self._cancel_preparing = threading.Event()
        self._cancel_uploading = threading.Event()
        self._storing_logs = False
        self._collector: OutputCollector | None = None
        self._exit: ExitStatus | None = None
        self._usage = Usage()
        self._console: Console
        self._workspace: Workspace
        self._grants = Grants()
        self._inputs = JobInputs(lease, around.cache, around.share)
        lease.on_lost = self._lease_lost

    # -- from outside ---------------------------------------------------------------------------------------------
    def stop(self, *, hard: bool = False, cause: Cause = Cause.user, reason: str = "") -> None:
        """A stop request (K-54). Repeating a soft one changes nothing: commands are delivered at least once, so it is the
        control plane that counts requests and sends a hard one."""
        with self._lock:
            self._stop_requested = self._stop_requested or cause is Cause.user
            self._stop_reason = self._stop_reason or reason
            self._cancel_preparing.set()
            starting = self._starting
        if cause is Cause.shutdown:
            self.lease.report(Preempted())
        if self._collecting.is_set():
            self._stop_while_uploading(hard)
            return
        if not starting:
            self._acknowledge("none", "the command has not begun and will not")
        if hard:
            self._supervisor.kill(cause)
        else:
            self._supervisor.stop(cause)

    def preempt(self, notice: Notice | None) -> None:
        """The machine goes away (K-53, L-30), or does not after all (None); what was said last counts. Blocks until it is
        time to interrupt the command. One that has not begun does not begin, one that has ended has its outputs stored."""
        with self._lock:
            self._notice = notice
            starting = self._starting
            if notice is not None and not starting:
                self._supervisor.stop(Cause.preempted)
                self._cancel_preparing.set()
        self.lease.report(report_of(notice, self._clock.now()))
        if notice is not None and starting:
            threading.Thread(target=self.upload_now, name="upload-now", daemon=True).start()
            self._over.wait(notice.seconds_to_interrupt(self._clock.now()))
            self._interrupt(notice)

    def _interrupt(self, notice: Notice) -> None:
        if self._notice is not notice or self._collecting.is_set() or self.lease.lost.is_set():
            return
        left = notice.seconds_left(self._clock.now())
        write_preemption(self._workspace, notice.what, notice.gone_at, left)
        words = "no time is promised" if left is None else f"{left:.0f} s are left"
        self._console.status(f"{notice.what}: {words}; the last quarter is for the outputs")
        self._supervisor.stop(Cause.preempted, patience_within(left, self._around.patience))

    def fence(self) -> None:
        """The control plane says that another attempt holds the lease."""
        self.lease.fence()

    def upload_now(self) -> None:
        """Picks up live outputs without waiting for the next scan."""
        if self._collector is not None and not self._collecting.is_set():
            self._collector.scan_now()

    # -- the attempt ----------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Blocks until the attempt is over and its last report delivered (or its lease lost)."""
        self.lease.start(
            leased_report(self._around.host, self._around.runtime.name),
            aborted=self._waiting_is_pointless,
        )
        try:
            self._run_in_workspace()
        except Exception as exc:
            logger.exception("attempt failed", extra={"action": "attempt-failed", **self._ids()})
            reason = str(exc) if isinstance(exc, AgentError) else f"defect in the agent: {exc!r}"
            self.lease.report(
                Finished(outcome=judge(Observed(failure=reason)).outcome, reason=reason)
            )
        finally:
            self._over.set()
            self.lease.reporter.flush()
            self.lease.close()

    def _run_in_workspace(self) -> None:
        around = self._around
        self._phases.enter(Phase.preparing)
        self._workspace = Workspace.create(
            around.work_dir, self.job.execution_id, self.lease.attempt, around.worker
        )
        logs_stored = False
        try:
            self._console = Console(
                self._workspace.logs,
                self.lease.live_log.put,
                self.lease.reporter.metadata,
                self._clock,
            )
            logs_stored = self._run_with_console()
        finally:
            self.lease.reporter.flush()
            self._inputs.close()
            self._workspace.remove(
                remove_tree=around.runtime.remove_tree, keep_logs=not logs_stored
            )

    def _run_with_console(self) -> bool:
        failure: str | None = None
        try:
            with contextlib.ExitStack() as stack:
                running = self._prepare(stack)
                self._exit = self._watch(running)
                self._keep_linked(running)
        except Ended:
            pass
        except AgentError as exc:
            failure = str(exc)
        except Exception as exc:  # the log and the outputs are worth saving even from a defect
            logger.exception(
                "defect in an attempt", extra={"action": "attempt-failed", **self._ids()}
            )
            failure = f"defect in the agent: {exc!r}"
        summary = self._collect_outputs()
        if self.lease.lost.is_set():
            self._console.close()
            self.lease.live_log.close(0)
            return False
        return self._finish(failure, summary)

    # -- before the command -----------------------------------------------------------------------------------------
    def _prepare(self, stack: contextlib.ExitStack) -> Running:
        self._say_hello()
        refusal = self._around.runtime.refuse(self.job)
        if refusal:
            raise AgentError(refusal)
        self._grants = self.lease.grants()
        self._console.add_secrets(self._secret_values())
        self._go_on()
        around = self._around
        facts = host_facts(around.host, worker=around.worker, runtime=around.runtime.name)
        valohai_dir = self._around.runtime.valohai_dir(self._workspace)
        environment = build_environment(
            self.job, secrets=self._grants.secrets, valohai_dir=valohai_dir, facts=facts
        )
        transferer = Transferer(cancelled=self._cancel_preparing, waiting=self._phases.waits)
        self._clean(environment)
        stack.callback(self._clean, environment)
        self._unpack_code(transferer)
        self._pull(environment)
        inputs = self._download_inputs(transferer, environment, valohai_dir)
        bind_host, public_host = self._around.runtime.api_hosts(environment)
        api = stack.enter_context(
            LocalApi(
                bind_host=bind_host,
                public_host=public_host,
                inputs=self.job.inputs,
                on_status_detail=lambda text: self.lease.report(StatusDetail(text=text)),
                input_grants=self.lease.input_grants,
            )
        )
        write_config_files(
            self._workspace, self.job, inputs=inputs, api=api.endpoints(), facts=facts
        )
        return self._start(stack, environment, valohai_dir)

    def _say_hello(self) -> None:
        status, host = self._console.status, self._around.host.hostname
        status(f"Starting job on {host}, valohai-agent {__version__} (protocol {PROTOCOL_VERSION})")
        for notice in [*self.job.notices, *self._around.runtime.notices(self.job)]:
            status(notice)

    def _secret_values(self) -> list[str]:
        values = list(self._grants.secrets.values())
        return [*values, self._grants.registry.password] if self._grants.registry else values

    def _unpack_code(self, transferer: Transferer) -> None:
        archive = self._grants.archive
        if archive is None:
            reason = self._grants.refused.get("archive", "the control plane gave no reason")
            raise AgentError(f"no permission to download the code archive: {reason}")
        self._console.status("downloading repository (code)")
        target = self._workspace.run / "code.tar.gz"
        transferer.download(archive, target, name="code archive")
        unpack_archive(target, self._workspace.repository, sha256=self.job.archive_sha256)
        target.unlink(missing_ok=True)
        self._go_on()

    def _pull(self, environment: dict[str, str]) -> None:
        if not self._around.runtime.uses_images:
            return
        self._phases.enter(Phase.pulling, f"pulling {self.job.image}")
        with without_login(self._grants.refused.get("registry"), self._warn):
            self._around.runtime.pull(
                self.job.image,
                login=self._grants.registry,
                progress=lambda words, done, total: self._phases.move(done, total, words),
                force=switch(environment, "VH_NO_IMAGE_CACHE") or switch(environment, "VH_CLEAN"),
                cancelled=self._cancel_preparing,
            )
        self._go_on()

    def _download_inputs(
        self, transferer: Transferer, environment: dict[str, str], valohai_dir: str
    ) -> dict[str, object]:
        self._phases.enter(Phase.downloading, source_words(self._grants.inputs.values()))
        inputs = self._inputs.fetch(
            self._workspace,
            self._grants,
            transferer=transferer,
            environment=environment,
            valohai_dir=valohai_dir,
            status=self._console.status,
            warn=self._warn,
            progress=self._phases.move,
            cancelled=self._cancel_preparing,
        )
        self._go_on()
        return inputs

    def _start(
        self, stack: contextlib.ExitStack, environment: dict[str, str], valohai_dir: str
    ) -> Running:
        runtime, console = self._around.runtime, self._console
        runtime.remove_leftovers(self.job.execution_id)
        noun = "container" if runtime.name == "docker" else "process"
        console.status(f"starting {noun}...")
        self._collector = self._new_collector(valohai_dir)
        with self._lock:  # from here on a stop finds a command to signal; before, it prevents one
            self._go_on()
            self._starting = True
        self._phases.pause()
        running = runtime.start(self._run_spec(environment), console.feed)
        stack.callback(running.remove)
        self._phases.enter(Phase.running)
        console.touch()
        console.status(f"started {noun} {running.id} on {self._around.host.hostname}")
        self._collector.start_live()
        stack.enter_context(self._remote_debug(running))
        return running

    def _remote_debug(self, running: Running) -> contextlib.AbstractContextManager[None]:
        wanted, host = self.job.remote_debug, self._around.host
        return remote_debug(
            wanted, running, host=host, status=self._console.status, warn=self._warn
        )

    def _run_spec(self, environment: dict[str, str]) -> RunSpec:
        job = self.job
        return RunSpec(
            workspace=self._workspace,
            image=job.image,
            commands=job.commands,
            environment=environment,
            mounts=job.mounts if job.mounts_allowed else (),
            fail_fast=job.fail_fast,
            respect_image_user=job.respect_image_user,
            writable_inputs=[item.name for item in job.inputs if item.download == "on-demand"],
            gpus=self._around.gpus,
            project_name=job.project_name,
            step=job.step,
        )

    def _clean(self, environment: dict[str, str]) -> None:
        """VH_CLEAN: images and cached data go before and after (K-22)."""
        if not switch(environment, "VH_CLEAN"):
            return
        freed = self._inputs.clear()
        self._console.status(
            f"VH_CLEAN: removed {freed:,} bytes of cached inputs; {self._around.runtime.clean()}"
        )

    # -- the command and after ------------------------------------------------------------------------------------
    def _watch(self, running: Running) -> ExitStatus:
        status = self._supervisor.watch(running)
        self._console.end_output()
        self._usage = running.usage()
        if status.oom_killed:
            self._usage = self._usage.model_copy(update={"oom_killed": True})
        self._console.status(f"command ended with exit code {status.code}")
        for words in filter(None, (status.message, usage_words(self._usage))):
            self._console.status(words)
        return status

    def _new_collector(self, valohai_dir: str) -> OutputCollector:
        return OutputCollector(
            self._workspace,
            transferer=Transferer(cancelled=self._cancel_uploading, waiting=self._phases.waits),
            request_grants=self.lease.request_grants,
            report=self.lease.report,
            status=self._console.status,
            warn=self._warn,
            progress=self._phases.move,
            valohai_dir=valohai_dir,
        )

    def _keep_linked(self, running: Running) -> None:
        """O-16: what links in the outputs lead to goes with the container, so it is copied before."""
        self._collecting.set()
        if self._collector is None or self.lease.lost.is_set():
            return
        self._phases.enter(Phase.uploading)
        self._around.runtime.make_readable(self._workspace.outputs)
        self._collector.keep_linked(running.copy_out)

    def _collect_outputs(self) -> OutputSummary:
        """Also after a crash or a stop (O-01); a failure is a problem, never an exception."""
        self._collecting.set()
        if self._collector is None or self.lease.lost.is_set():
            return OutputSummary()
        if self._phases.current is not Phase.uploading:
            self._phases.enter(Phase.uploading)
        try:
            self._around.runtime.make_readable(self._workspace.outputs)
            return self._collector.finish()
        except AgentError as exc:
            self._console.status(f"uploading outputs failed: {exc}")
            return OutputSummary(problems=[f"uploading outputs failed: {exc}"])

    def _finish(self, failure: str | None, summary: OutputSummary) -> bool:
        verdict = judge(
            Observed(
                exit=self._exit,
                cause=self._supervisor.cause,
                stop_requested=self._stop_requested,
                stop_reason=self._stop_reason,
                reclaimed=self._notice.what if self._notice else "",
                failure=failure,
                output_problems=summary.problems,
                limits=self._limits,
            )
        )
        self._console.status(
            f"Execution {verdict.outcome.value}" + (f": {verdict.reason}" if verdict.reason else "")
        )
        self._storing_logs = True
        logs = store_logs(self._console, self.lease, wait=self._cancel_uploading.wait)
        self.lease.report(
            Finished(
                outcome=verdict.outcome,
                exit_code=verdict.exit_code,
                reason=verdict.reason,
                phases=self._phases.finish(),
                usage=self._usage,
                logs=logs,
                interpolated_command="\n".join(self.job.commands),
                preempted=verdict.preempted,
            )
        )
        return len(logs) == len(self._console.close())

    # -- small ones ---------------------------------------------------------------------------------------------------
    def _go_on(self) -> None:
        if self._cancel_preparing.is_set() or self.lease.lost.is_set():
            raise Ended

    def _waiting_is_pointless(self) -> bool:
        """Whether a wait for grants should end: before the command by any stop, later only by a hard one."""
        if self._storing_logs:
            return False
        if self._collector is None:
            return self._cancel_preparing.is_set()
        return self._cancel_uploading.is_set()

    def _lease_lost(self) -> None:
        self._cancel_preparing.set()
        self._cancel_uploading.set()
        self._supervisor.kill(Cause.fenced)

    def _stop_while_uploading(self, hard: bool) -> None:
        if hard:
            self._cancel_uploading.set()
        text = (
            "upload of the outputs is cut short"
            if hard
            else "the command has ended; its outputs are being uploaded"
        )
        self._acknowledge("none", text)

    def _phase_changed(self, body: PhaseChanged) -> None:
        self.lease.phase = body.phase.value
        self.lease.report(body)

    def _limit_reached(self, cause: Cause) -> None:
        self._console.status(limit_words(cause, self._limits))

    def _signal_sent(self, name: SignalName, cause: Cause) -> None:
        if cause is Cause.fenced:
            return
        self._console.status(f"sent {name} to the command ({cause.value})")
        self._acknowledge(
            name, f"worker {self._around.worker} sent {name} to the command ({cause.value})"
        )

    def _acknowledge(self, signal_name: str, message: str) -> None:
        self.lease.report(StopAcknowledged(signal=signal_name, message=message))

    def _warn(self, message: str) -> None:
        self._console.status(f"Warning: {message}")
        self.lease.report(Warned(message=message))

    def _ids(self) -> dict[str, object]:
        return {"execution": self.job.execution_id, "attempt": self.lease.attempt}
