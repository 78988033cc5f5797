"""A Dagster webserver (and daemon) of one test or benchmark, driven through GraphQL as its UI does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.ports import free_port, wait_for

START_SECONDS = 90.0
RUN_SECONDS = 150.0
STOP_SECONDS = 20.0
REPOSITORY = "__repository__"

_LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on InvalidSubsetError { message }
    ... on PipelineNotFoundError { message }
    ... on UnauthorizedError { message }
  }
}
"""
_RUN = """
query Run($id: ID!) {
  runOrError(runId: $id) { __typename ... on Run { status creationTime startTime endTime } }
}
"""
_TERMINATE = """
mutation Terminate($id: String!) {
  terminateRun(runId: $id) { __typename ... on TerminateRunFailure { message } }
}
"""
_EVENTS = """
query Events($id: ID!) {
  logsForRun(runId: $id, limit: 1000) {
    ... on EventConnection {
      events {
        __typename
        ... on MessageEvent { message stepKey timestamp eventType }
        ... on LogsCapturedEvent { fileKey stepKeys }
        ... on ExecutionStepFailureEvent { error { message causes { message } } failureMetadata { description } }
        ... on MaterializationEvent {
          assetKey { path }
          metadataEntries {
            label
            ... on FloatMetadataEntry { floatValue }
            ... on IntMetadataEntry { intRepr }
            ... on TextMetadataEntry { text }
            ... on MarkdownMetadataEntry { mdStr }
            ... on JsonMetadataEntry { jsonString }
            ... on UrlMetadataEntry { url }
          }
        }
      }
    }
  }
}
"""
_LOCATIONS = """
{ workspaceOrError { ... on Workspace { locationEntries {
  name loadStatus locationOrLoadError { __typename ... on PythonError { message } } } } } }
"""
_LOG = """
query Log($key: [String!]!, $cursor: String, $limit: Int) {
  capturedLogs(logKey: $key, cursor: $cursor, limit: $limit) { stdout stderr cursor }
}
"""
FINAL = ("SUCCESS", "FAILURE", "CANCELED")


class GraphQLError(AssertionError):
    """The server answered, and not with what was asked for."""


@dataclass(frozen=True, kw_only=True)
class CapturedLog:
    """What the stdout and stderr tabs of a step show."""

    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class RunState:
    status: str
    created: float | None
    started: float | None
    ended: float | None


class DagsterApp:
    """Processes with one DAGSTER_HOME and one workspace; use as a context manager."""

    def __init__(
        self,
        home: Path,
        workspace: Path,
        *,
        environment: Mapping[str, str],
        daemon: bool = True,
        dev: bool = False,
        cwd: Path | None = None,
    ) -> None:
        """With `dev` both come from `dagster dev`, where they share one code server."""
        self.home = home
        self.url = f"http://127.0.0.1:{free_port()}"
        self._workspace = workspace
        self._daemon, self._dev = daemon, dev
        self._cwd = cwd or workspace.parent
        self._environment = {**os.environ, **environment, "DAGSTER_HOME": str(home)}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> DagsterApp:
        try:
            self._make_storages()
            address = ("-h", "127.0.0.1", "-p", self.url.rsplit(":", 1)[1])
            if self._dev:
                self._start("dagster", "dev", *address)
            else:
                self._start("dagster_webserver", *address)
            if self._daemon and not self._dev:
                self._start("dagster._daemon", "run")
            wait_for(self._loaded, seconds=START_SECONDS, every=0.2, what="the code locations")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _make_storages(self) -> None:
        """Webserver and daemon would both create Dagster's SQLite files, and one of them fail."""
        self.home.mkdir(parents=True, exist_ok=True)
        code = (
            "import dagster; i = dagster.DagsterInstance.get(); "
            "i.run_storage, i.event_log_storage, i.schedule_storage"
        )
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=self._environment, check=True
        )

    def _start(self, module: str, *arguments: str) -> None:
        with (self.home / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "-w", str(self._workspace)],
                cwd=self._cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)

    def _loaded(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                raise AssertionError(f"a Dagster process ended early:\n{self.logs()[-3000:]}")
        try:
            data = self.graphql(_LOCATIONS)
        except httpx.HTTPError:
            return False
        entries = data["workspaceOrError"].get("locationEntries") or []
        for entry in entries:
            error = entry["locationOrLoadError"] or {}
            if error.get("__typename") == "PythonError":
                raise GraphQLError(f"{entry['name']} did not load: {error['message']}")
        return bool(entries) and all(entry["loadStatus"] == "LOADED" for entry in entries)

    def logs(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.home.glob("*.log")))

    # -- GraphQL -----------------------------------------------------------------------------------------------

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        body = {"query": query, "variables": variables}
        reply = httpx.post(f"{self.url}/graphql", json=body, timeout=60)
        reply.raise_for_status()
        answer = reply.json()
        if answer.get("errors"):
            raise GraphQLError(str(answer["errors"]))
        return answer["data"]

    def launch(
        self,
        location: str,
        assets: Sequence[Sequence[str]],
        *,
        config: Mapping[str, Any] | None = None,
        job: str = "__ASSET_JOB",
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Launches what the Materialize button launches; returns the run id."""
        selector = {
            "repositoryLocationName": location,
            "repositoryName": REPOSITORY,
            "pipelineName": job,
            "assetSelection": [{"path": list(key)} for key in assets],
            "assetCheckSelection": [],
        }
        params = {"selector": selector, "runConfigData": config or {}, "mode": "default"}
        if tags:
            listed = [{"key": key, "value": value} for key, value in tags.items()]
            params["executionMetadata"] = {"tags": listed}
        result = self.graphql(_LAUNCH, params=params)["launchRun"]
        if result["__typename"] != "LaunchRunSuccess":
            raise GraphQLError(str(result))
        return str(result["run"]["runId"])

    def run(self, run_id: str) -> RunState:
        found = self.graphql(_RUN, id=run_id)["runOrError"]
        if found["__typename"] != "Run":
            raise GraphQLError(f"run {run_id}: {found}")
        return RunState(
            status=found["status"],
            created=found["creationTime"],
            started=found["startTime"],
            ended=found["endTime"],
        )

    def finished(self, run_id: str, *, seconds: float = RUN_SECONDS) -> RunState:
        """The run's end; AssertionError with the events so far when it does not come."""
        deadline = time.monotonic() + seconds
        while (state := self.run(run_id)).status not in FINAL:
            if time.monotonic() > deadline:
                messages = "\n".join(str(e.get("message")) for e in self.events(run_id)[-15:])
                raise AssertionError(
                    f"run {run_id} is {state.status} after {seconds} s\n{messages}"
                )
            time.sleep(0.1)
        return state

    def terminate(self, run_id: str) -> None:
        result = self.graphql(_TERMINATE, id=run_id)["terminateRun"]
        if result["__typename"] != "TerminateRunSuccess":
            raise GraphQLError(str(result))

    def events(self, run_id: str) -> list[dict[str, Any]]:
        return self.graphql(_EVENTS, id=run_id)["logsForRun"]["events"]

    def metadata(self, run_id: str, asset: str) -> dict[str, Any]:
        """Label -> value of the last materialization of an asset (its last key part) in a run."""
        for event in reversed(self.events(run_id)):
            if (
                event["__typename"] == "MaterializationEvent"
                and event["assetKey"]["path"][-1] == asset
            ):
                return dict(_entries(event["metadataEntries"]))
        raise AssertionError(f"run {run_id} did not materialize {asset}")

    def messages(self, run_id: str) -> list[str]:
        """All messages of the run's event log, in order."""
        return [str(event.get("message") or "") for event in self.events(run_id)]

    def failure(self, run_id: str) -> str:
        """Why the run's step failed, as the UI shows it."""
        for event in self.events(run_id):
            if event["__typename"] == "ExecutionStepFailureEvent":
                return str(event["failureMetadata"]["description"] or event["error"])
        raise AssertionError(f"no step of run {run_id} failed: {self.messages(run_id)[-10:]}")

    def log_key(self, run_id: str) -> list[str] | None:
        """Where the log of the run's step is, None before the step starts."""
        for event in self.events(run_id):
            if event["__typename"] == "LogsCapturedEvent":
                return [run_id, "compute_logs", str(event["fileKey"])]
        return None

    def log(self, run_id: str) -> CapturedLog:
        """The whole log of a run with one step, as far as it is there."""
        key = self.log_key(run_id)
        if key is None:
            return CapturedLog(stdout="", stderr="")
        found = self.graphql(_LOG, key=key)["capturedLogs"]
        return CapturedLog(stdout=found["stdout"] or "", stderr=found["stderr"] or "")


def _entries(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        values = [value for name, value in entry.items() if name != "label"]
        yield str(entry["label"]), values[0] if values else None
