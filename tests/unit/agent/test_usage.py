"""What samples say about a command's use of its machine (M-08)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from valohai_agent.protocol import Usage
from valohai_agent.runtimes.docker_running import sample_of
from valohai_agent.usage import (
    GpuSample,
    Sample,
    UsageMeter,
    UsageTrack,
    parse_gpus,
    read_gpus,
    usage_words,
)


def test_average_and_peak_come_from_the_samples() -> None:
    track = UsageTrack(100.0)
    track.note(110.0, Sample(cpu_seconds=5.0, memory_bytes=300))
    track.note(120.0, Sample(cpu_seconds=25.0, memory_bytes=900))
    track.note(130.0, Sample(cpu_seconds=26.0, memory_bytes=100))
    track.finish(140.0, Sample(cpu_seconds=28.0, memory_bytes=200))
    usage = track.result()
    assert (usage.cpu_seconds, usage.max_memory_bytes) == (28.0, 900)
    assert (usage.cpu_cores_average, usage.cpu_cores_peak) == (0.7, 2.0)


def test_a_command_shorter_than_any_sample_has_its_average_as_peak() -> None:
    track = UsageTrack(0.0)
    track.note(0.01, Sample(cpu_seconds=0.01))
    track.finish(0.5, Sample(cpu_seconds=0.4))
    usage = track.result()
    assert usage.cpu_cores_average == usage.cpu_cores_peak == 0.8


def test_cpu_time_that_vanishes_with_its_process_makes_no_negative_rate() -> None:
    track = UsageTrack(0.0)
    track.note(10.0, Sample(cpu_seconds=10.0))
    track.note(20.0, Sample(cpu_seconds=3.0))
    assert track.result().cpu_seconds == 10.0
    assert track.result().cpu_cores_peak == 1.0


def test_nothing_measured_is_nothing_said() -> None:
    assert UsageTrack(0.0).result() == Usage()
    assert usage_words(Usage()) is None


def test_gpus_of_the_job_are_summed_and_the_busiest_counts() -> None:
    text = "0, GPU-a, 1024, 10\n1, GPU-b, 2048, 95\n2, GPU-c, [N/A], [N/A]\n"
    assert parse_gpus(text, "all") == GpuSample(memory_bytes=3 * 1024**3, utilization=95)
    assert parse_gpus(text, "0") == GpuSample(memory_bytes=1024**3, utilization=10)
    assert parse_gpus(text, "GPU-b,2") == GpuSample(memory_bytes=2 * 1024**3, utilization=95)
    assert parse_gpus("", "all") is None
    assert read_gpus("none") is None


def test_the_status_line_names_cpu_memory_and_gpu() -> None:
    track = UsageTrack(0.0)
    track.note(10.0, Sample(cpu_seconds=15.0, memory_bytes=2_000_000_000))
    track.note_gpu(GpuSample(memory_bytes=4_000_000_000, utilization=97.0))
    words = usage_words(track.result()) or ""
    assert words.startswith("resources: cpu 1.50 cores on average, 1.50 at peak; memory 2")
    assert "gpu 97 % and 4" in words


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_a_containers_memory_leaves_out_the_cache_that_can_be_dropped(name: str) -> None:
    stats = {
        "memory_stats": {"usage": 1000, "stats": {name: 400}},
        "cpu_stats": {"cpu_usage": {"total_usage": 2_500_000_000}},
    }
    assert sample_of(stats) == Sample(cpu_seconds=2.5, memory_bytes=600)
    assert sample_of({"memory_stats": {}, "cpu_stats": {}}) == Sample()


def test_a_reader_that_fails_is_asked_again_and_what_comes_after_the_end_does_not_count() -> None:
    asked = threading.Event()
    answers = iter([OSError("gone"), Sample(memory_bytes=5)])

    def read() -> Sample | None:
        answer = next(answers, None)
        if answer is None:
            asked.set()
        if isinstance(answer, OSError):
            raise answer
        return answer

    meter = UsageMeter(read, gpus="none")
    meter.start()
    assert asked.wait(10)
    meter.stop()
    meter.stop(Sample(memory_bytes=10**9))
    assert meter.usage().max_memory_bytes == 5


def test_the_drivers_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-a, 512, 42'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert read_gpus("") == GpuSample(memory_bytes=512 * 1024**2, utilization=42)
