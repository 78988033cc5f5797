"""Whole agents running real commands as processes, and what becomes of the work when things break."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.agent_conductor import GROUP, Conductor
from tests.support.agent_process import AgentProcess
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import (
    Finished,
    InputReady,
    JobFile,
    JobInput,
    Keys,
    MetadataEvents,
    Outcome,
    OutputStored,
    PhaseChanged,
    Preempted,
    StopAcknowledged,
    Warned,
    content_mark,
)
from valohai_dagster.broker.access import set_agent_user

StartAgent = Callable[..., AgentProcess]

INTERRUPTIBLE = (
    "python3 -u -c 'import time\n"
    'print("ready")\n'
    "try:\n"
    "    time.sleep(60)\n"
    "except KeyboardInterrupt:\n"
    '    open("/valohai/outputs/saved.txt", "w").write("saved")\n'
    "'"
)
DEAF = "trap '' INT TERM; echo ready; while true; do sleep 0.1; done"


@pytest.fixture
def start_agent(short_tmp: Path, namespaces: None) -> Iterator[StartAgent]:
    started: list[AgentProcess] = []

    def start(url: str, *options: str, **more: str | dict[str, str]) -> AgentProcess:
        agent = AgentProcess(url, short_tmp / "work", *options, **more)  # type: ignore[arg-type]
        started.append(agent)
        return agent

    yield start
    for agent in started:
        agent.stop()


@pytest.fixture
def agent(start_agent: StartAgent, conductor: Conductor, redis_server: RedisServer) -> AgentProcess:
    return start_agent(redis_server.unix_url)


def ready(conductor: Conductor, execution_id: str, attempt: int = 1) -> None:
    wait_for(
        lambda: ("stdout", "ready") in conductor.live_lines(execution_id, attempt),
        seconds=20,
        what=f"`ready` from {execution_id} attempt {attempt}",
    )


def outputs(conductor: Conductor, execution_id: str) -> dict[str, bytes]:
    stored = conductor.applied(execution_id).bodies(OutputStored)
    return {body.name: (conductor.store / body.upload_id).read_bytes() for body in stored}


def children_of_commands() -> list[int]:
    """Processes of the commands in these tests that are still alive."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "h1-marker" in words and "pytest" not in words:
            found.append(process.pid)
    return found


# -- the plain course of things ---------------------------------------------------------------------------------------


def test_o16_links_lead_to_the_jobs_own_files_or_are_named_whole(
    conductor: Conductor, agent: AgentProcess
) -> None:
    """Of a worker without containers only the job's directories and its private environment are uploaded."""
    (agent.work_dir / "of-the-worker").write_text("private")
    execution_id = conductor.submit(
        'echo lib > "$VIRTUAL_ENV/lib.txt"; cd /valohai/outputs; ln -s "$VIRTUAL_ENV/lib.txt" lib',
        "ln -s /valohai/repository/hello.txt own; ln -s /etc/hostname host",
        f'ln -s {agent.work_dir}/of-the-worker w; ln -s {agent.work_dir}/of-the-worker "$VIRTUAL_ENV/x"',
        'ln -s "$VIRTUAL_ENV/x" through',
    )
    assert conductor.finished(execution_id).outcome is Outcome.complete
    assert outputs(conductor, execution_id) == {"lib": b"lib\n", "own": b"hello\n"}
    warnings = {body.message for body in conductor.applied(execution_id).bodies(Warned)}
    assert len(warnings) == 3
    assert any("'host' is a link to '/etc/hostname', outside the job's" in w for w in warnings)
    assert any(f"'w' is a link to '{agent.work_dir}/of-the-worker', outside" in w for w in warnings)


def test_a_job_from_lease_to_finished(conductor: Conductor, agent: AgentProcess) -> None:
    conductor.secrets = {"TOKEN": "hunter2-secret"}
    execution_id = conductor.submit(
        "cat hello.txt",
        'echo "token is $TOKEN"; echo oops >&2',
        "echo '{\"loss\": 0.5}'",
        "mkdir -p /valohai/outputs/sub; echo out > /valohai/outputs/sub/o.txt; printf 'no newline'",
        "sleep 1",  # long enough for its memory to be looked at
        secret_names=["TOKEN"],
        notices=["unsupported key: resources"],
    )
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.exit_code, finished.reason) == (Outcome.complete, 0, None)
    assert outputs(conductor, execution_id) == {"sub/o.txt": b"out\n"}
    assert conductor.stored_log(execution_id, "stdout") == (
        b'hello\ntoken is ***\n{"loss": 0.5}\nno newline'
    )
    stderr = conductor.stored_log(execution_id, "stderr").decode()
    assert "oops\n" in stderr
    assert "[valohai] resources: cpu " in stderr
    assert "memory" in stderr.partition("resources: ")[2].splitlines()[0]
    status = [line for line in stderr.splitlines() if line.startswith("[valohai] ")]
    order = [
        "Starting job on",
        "unsupported key",
        "downloading repository",
        "starting process",
        "started process",
    ]
    positions = [next(i for i, line in enumerate(status) if words in line) for words in order]
    assert positions == sorted(positions)
    events = conductor.applied(execution_id).bodies(MetadataEvents)
    assert [event["loss"] for body in events for event in body.events] == [0.5]
    assert conductor.live_lines(execution_id)[-1] == ("status", "Execution complete")
    assert not list(agent.work_dir.glob(f"{execution_id}/*/repository")), "nothing is left behind"
    assert "hunter2" not in agent.log


def test_phases_come_in_order_and_only_running_holds_the_command(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit("sleep 0.5")
    finished = conductor.finished(execution_id)
    names = [span.phase for span in finished.phases]
    assert names == ["preparing", "downloading", "running", "uploading"]  # no image, no pulling
    spans = {
        span.phase: (span.ended_at - span.started_at).total_seconds() for span in finished.phases
    }
    assert 0.4 < spans["running"] < 2
    reported = [
        body.phase.value
        for body in conductor.applied(execution_id).bodies(PhaseChanged)
        if body.done is None
    ]
    assert reported == names


def test_c20_a_failing_command_is_an_error_and_its_outputs_are_kept(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit("echo partial > /valohai/outputs/p.txt", "exit 3")
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.exit_code) == (Outcome.error, 3)
    assert "exit code 3" in (finished.reason or "")
    assert outputs(conductor, execution_id) == {"p.txt": b"partial\n"}


def test_a_damaged_code_archive_ends_before_the_command(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit("touch /valohai/outputs/ran", archive_sha256="0" * 64)
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.exit_code) == (Outcome.error, None)
    assert "sha256" in (finished.reason or "")
    assert outputs(conductor, execution_id) == {}
    assert {log.stream for log in finished.logs} == {"stdout", "stderr", "events"}


def test_o18_a_refused_output_turns_success_into_an_error(
    conductor: Conductor, agent: AgentProcess
) -> None:
    conductor.refuse = lambda request: "the store is full" if request.kind == "output" else None
    execution_id = conductor.submit("echo x > /valohai/outputs/x.txt")
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.exit_code) == (Outcome.error, 0)
    assert "the store is full" in (finished.reason or "")


def test_a_log_that_cannot_be_stored_is_a_warning_and_stays_on_the_worker(
    conductor: Conductor, agent: AgentProcess
) -> None:
    conductor.refuse = lambda request: "no log store" if request.name == "stdout" else None
    execution_id = conductor.submit("echo precious")

    def warned(words: str) -> bool:
        bodies = conductor.applied(execution_id).bodies(Warned)
        return any(words in body.message for body in bodies)

    wait_for(lambda: warned("s more: stdout: no log store"), what="the first try")
    conductor.command("w1", kind="stop-hard", execution_id=execution_id)
    finished = conductor.finished(execution_id)
    assert finished.outcome is Outcome.complete
    assert {log.stream for log in finished.logs} == {"stderr", "events"}
    assert warned("The stdout log could not be stored: no log store.")
    log = agent.work_dir / execution_id / "1" / "logs" / "stdout"
    wait_for(log.exists, what="the kept log")
    assert log.read_text() == "precious\n"


def test_inputs_are_in_place_before_the_command(conductor: Conductor, agent: AgentProcess) -> None:
    data = conductor.put("data.csv", b"a,b\n")
    file = JobFile(id="f1", name="data.csv", uri="datum://1", size=4)
    conductor.input_urls = {"f1": data.as_uri()}
    execution_id = conductor.submit(
        "cat /valohai/inputs/train/data.csv; cat /valohai/config/inputs.json",
        inputs=[JobInput(name="train", input_id="i1", files=[file])],
    )
    assert conductor.finished(execution_id).outcome is Outcome.complete
    text = conductor.stored_log(execution_id, "stdout").decode()
    assert text.startswith("a,b\n")
    assert json.loads(text.partition("\n")[2])["train"]["files"][0]["name"] == "data.csv"
    assert conductor.applied(execution_id).bodies(InputReady)[0].size == 4


def test_the_agent_tells_the_queue_what_its_cache_holds(
    conductor: Conductor, agent: AgentProcess
) -> None:
    data = conductor.put("data.csv", b"a,b\n")
    file = JobFile(id="f1", name="data.csv", uri="datum://k", datum_id="k", size=4)
    conductor.input_urls = {"f1": data.as_uri()}
    execution_id = conductor.submit(
        "true", inputs=[JobInput(name="train", input_id="i1", files=[file])]
    )
    assert conductor.finished(execution_id).outcome is Outcome.complete
    assert file.content_name is not None
    mark = content_mark(file.content_name)
    wait_for(lambda: mark in conductor.worker(agent.name)["cached"].split(","), what="the mark")


def test_several_slots_run_several_jobs_at_once(
    conductor: Conductor, start_agent: StartAgent, redis_server: RedisServer
) -> None:
    start_agent(redis_server.unix_url, "--slots", "2")
    both = [conductor.submit("echo ready; sleep 2") for _ in range(2)]
    spans = []
    for execution_id in both:
        running = next(s for s in conductor.finished(execution_id).phases if s.phase == "running")
        spans.append((running.started_at, running.ended_at))
    assert max(start for start, _ in spans) < min(end for _, end in spans)


# -- limits and stops -------------------------------------------------------------------------------------------------


def test_m30_the_time_limit_counts_the_command_and_keeps_its_outputs(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit(INTERRUPTIBLE, time_limit_seconds=1.5)
    finished = conductor.finished(execution_id)
    assert finished.outcome is Outcome.error
    assert finished.reason == "Time limit of 1.5 s exceeded"
    assert "Time limit of 1.5 s exceeded" in conductor.stored_log(execution_id, "stderr").decode()
    assert outputs(conductor, execution_id) == {"saved.txt": b"saved"}


def test_m31_silence_ends_the_command(conductor: Conductor, agent: AgentProcess) -> None:
    execution_id = conductor.submit(
        "for i in 1 2 3 4; do echo $i; sleep 0.5; done; sleep 60", no_output_timeout_seconds=1.2
    )
    finished = conductor.finished(execution_id)
    assert finished.reason == "No output for 1.2 s"
    assert conductor.stored_log(execution_id, "stdout") == b"1\n2\n3\n4\n"


def test_k54_a_soft_stop_is_an_interrupt_and_is_acknowledged(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit(INTERRUPTIBLE)
    ready(conductor, execution_id)
    command = {"kind": "stop", "execution_id": execution_id, "reason": "stopped by ada"}
    conductor.command("w1", **command)
    conductor.command("w1", **command)
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.reason) == (Outcome.stopped, "stopped by ada")
    assert outputs(conductor, execution_id) == {"saved.txt": b"saved"}
    acknowledged = conductor.applied(execution_id).bodies(StopAcknowledged)
    assert [body.signal for body in acknowledged] == ["SIGINT"]


def test_k54_a_hard_stop_kills_a_deaf_command_at_once(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit(DEAF)
    ready(conductor, execution_id)
    conductor.command("w1", kind="stop", execution_id=execution_id)
    wait_for(
        lambda: conductor.applied(execution_id).bodies(StopAcknowledged), what="the acknowledgement"
    )
    time.sleep(0.5)
    assert conductor.applied(execution_id).finished is None
    started = time.monotonic()
    conductor.command("w1", kind="stop-hard", execution_id=execution_id)
    finished = conductor.finished(execution_id)
    assert time.monotonic() - started < 5
    assert (finished.outcome, finished.exit_code) == (Outcome.stopped, 137)
    signals = [body.signal for body in conductor.applied(execution_id).bodies(StopAcknowledged)]
    assert signals == ["SIGINT", "SIGKILL"]


def test_a_stop_while_waiting_for_grants_ends_without_running(
    conductor: Conductor, agent: AgentProcess
) -> None:
    conductor.mute = True
    execution_id = conductor.submit("touch /valohai/outputs/ran")
    conductor.applied(execution_id)
    conductor.command("w1", kind="stop", execution_id=execution_id)
    wait_for(
        lambda: conductor.applied(execution_id).bodies(StopAcknowledged), what="the acknowledgement"
    )
    conductor.mute = False
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.exit_code) == (Outcome.stopped, None)


def test_a_fenced_attempt_is_killed_and_says_nothing_more(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit(f"{DEAF} # h1-marker")
    ready(conductor, execution_id)
    token = conductor.lease(execution_id)["token"]
    conductor.command("w1", kind="fence", execution_id=execution_id, token=token)
    wait_for(lambda: conductor.worker("w1").get("busy") == "0", what="the freed slot")
    assert conductor.applied(execution_id).finished is None
    assert children_of_commands() == []


# -- the agent ends ---------------------------------------------------------------------------------------------------


def test_sigterm_drains(conductor: Conductor, agent: AgentProcess) -> None:
    first = conductor.submit("echo ready; sleep 2; echo done > /valohai/outputs/d.txt")
    ready(conductor, first)
    agent.send(signal.SIGTERM)
    wait_for(lambda: conductor.worker("w1").get("state") == "draining", what="draining")
    second = conductor.submit("true")
    assert conductor.finished(first).outcome is Outcome.complete
    assert agent.wait() == 0
    assert outputs(conductor, first) == {"d.txt": b"done\n"}
    assert conductor.redis.zscore(conductor.keys.ready(GROUP), second) is not None
    assert not conductor.worker("w1"), "it signed off"


def test_a_second_sigterm_stops_the_command_softly(
    conductor: Conductor, agent: AgentProcess
) -> None:
    execution_id = conductor.submit(INTERRUPTIBLE)
    ready(conductor, execution_id)
    agent.send(signal.SIGTERM)
    time.sleep(0.5)
    assert agent.process.poll() is None
    agent.send(signal.SIGTERM)
    finished = conductor.finished(execution_id)
    assert finished.outcome is Outcome.error
    assert "shut down" in (finished.reason or "")
    assert outputs(conductor, execution_id) == {"saved.txt": b"saved"}
    assert conductor.applied(execution_id).bodies(Preempted)
    assert agent.wait() == 0


def test_kill_9_leaves_work_that_another_agent_finishes(
    conductor: Conductor, agent: AgentProcess, start_agent: StartAgent, redis_server: RedisServer
) -> None:
    job = conductor.job('[ "$GO" = yes ] && exit 0; echo first-log; echo ready; exec sleep 600')
    conductor.enqueue(job)
    ready(conductor, job.execution_id)
    commands = {child.pid for child in psutil.Process(agent.process.pid).children(recursive=True)}
    agent.send(signal.SIGKILL)
    agent.wait()
    log = agent.work_dir / job.execution_id / "1" / "logs" / "stdout"
    assert log.read_text() == "first-log\nready\n"
    second = job.model_copy(update={"environment_variables": {"GO": "yes"}})
    conductor.requeue(second, 2)
    start_agent(redis_server.unix_url, name="w2")
    assert conductor.finished(job.execution_id, 2).outcome is Outcome.complete
    assert conductor.applied(job.execution_id, 1).finished is None
    wait_for(
        lambda: not any(psutil.pid_exists(pid) for pid in commands),
        what="the first attempt's processes to go",
    )
    assert log.read_text() == "first-log\nready\n", "the first attempt's log is still there"


# -- Redis goes away --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
def test_a_running_command_survives_the_loss_of_redis(
    own_conductor: Conductor, own_redis: RedisServer, start_agent: StartAgent, empty: bool
) -> None:
    start_agent(own_redis.unix_url)
    command = 'echo ready; for i in $(seq 30); do echo line $i; echo "{\\"i\\": $i}"; sleep 0.1; done; echo x > /valohai/outputs/x'
    execution_id = own_conductor.submit(command)
    ready(own_conductor, execution_id)
    own_redis.restart(empty=empty, pause_seconds=1.0)
    if empty:
        own_conductor.load_functions()
    finished = own_conductor.finished(execution_id)
    assert finished.outcome is Outcome.complete
    applied = own_conductor.applied(execution_id)
    assert [event["i"] for body in applied.bodies(MetadataEvents) for event in body.events] == list(
        range(1, 31)
    )
    assert len(applied.bodies(Finished)) == 1
    assert own_conductor.stored_log(execution_id, "stdout").count(b"line ") == 30


def test_a_job_that_ends_while_redis_is_away_is_reported_when_it_is_back(
    own_conductor: Conductor, own_redis: RedisServer, start_agent: StartAgent
) -> None:
    agent = start_agent(own_redis.unix_url)
    execution_id = own_conductor.submit(
        "echo ready; sleep 1; echo late > /valohai/outputs/late.txt"
    )
    ready(own_conductor, execution_id)
    own_redis.kill()
    time.sleep(2.5)
    agent.send(signal.SIGTERM)
    own_redis.start()
    assert own_conductor.finished(execution_id).outcome is Outcome.complete
    assert outputs(own_conductor, execution_id) == {"late.txt": b"late\n"}
    assert agent.wait() == 0


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_second_agent_of_the_same_name_ends_with_the_reason(
    conductor: Conductor,
    agent: AgentProcess,
    start_agent: StartAgent,
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    wait_for(lambda: conductor.worker("w1"), what="the first agent")
    second = AgentProcess(redis_server.unix_url, tmp_path / "other", name="w1")
    assert second.wait(30) == 3
    assert "is in use" in second.log
    assert agent.process.poll() is None


def test_a_wrong_password_ends_with_the_reason(
    start_agent: StartAgent, redis_server: RedisServer, conductor: Conductor
) -> None:
    agent = start_agent(redis_server.url.replace("redis://", "redis://agent:sesame-open@"))
    assert agent.wait() == 2
    assert "refuses this agent" in agent.log
    assert "sesame" not in agent.log


def test_an_agent_with_the_rights_of_its_group_alone_runs_a_job(
    conductor: Conductor, start_agent: StartAgent, redis_server: RedisServer
) -> None:
    set_agent_user(conductor.redis, Keys("d1"), GROUP, username="g1-agents", password="pw-of-g1")
    url = redis_server.url.replace("redis://", "redis://g1-agents:pw-of-g1@")
    agent = start_agent("redis://ignored", "--redis", url, "--once")
    execution_id = conductor.submit("echo fine > /valohai/outputs/f.txt")
    assert conductor.finished(execution_id).outcome is Outcome.complete
    assert outputs(conductor, execution_id) == {"f.txt": b"fine\n"}
    assert agent.wait() == 0
    assert "password is on the command line" in agent.log
    assert "pw-of-g1" not in agent.log


def test_the_log_can_be_json(
    conductor: Conductor, start_agent: StartAgent, redis_server: RedisServer
) -> None:
    agent = start_agent(redis_server.unix_url, "--log-format", "json", "--idle-exit", "0.5")
    assert agent.wait() == 0
    actions = [json.loads(line)["action"] for line in agent.log.splitlines()]
    assert actions == ["start", "draining", "exit"]
