"""What a command uses of its machine while it runs: CPU, memory, GPUs (M-08)."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from valohai_agent.checksums import decimal_size
from valohai_agent.protocol import Usage

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 10.0
FIRST_SECONDS = 0.25  # then twice as long each time, so that short commands are measured too
SHORTEST_PEAK_SECONDS = 0.2  # a rate over less than that is noise


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look: CPU seconds since the start, and memory now. None where it cannot be told."""

    cpu_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """Memory used on all GPUs of the job together, and the utilization of the busiest, 0 to 100."""

    memory_bytes: int
    utilization: float


class UsageTrack:
    """Puts samples together; times are seconds that never go back."""

    def __init__(self, started_at: float) -> None:
        self._started_at = self._noted_at = started_at
        self._cpu: float | None = None
        self._cpu_peak: float | None = None
        self._memory: int | None = None
        self._gpu_memory: int | None = None
        self._gpu: float | None = None

    def note(self, now: float, sample: Sample) -> None:
        if sample.memory_bytes is not None:
            self._memory = max(self._memory or 0, sample.memory_bytes)
        if sample.cpu_seconds is None:
            return
        used, elapsed = sample.cpu_seconds - (self._cpu or 0.0), now - self._noted_at
        if elapsed < SHORTEST_PEAK_SECONDS and self._cpu_peak is not None:
            return
        if elapsed >= SHORTEST_PEAK_SECONDS:
            self._cpu_peak = max(self._cpu_peak or 0.0, used / elapsed)
        if used >= 0:  # processes that end without being waited for take their time with them
            self._cpu = sample.cpu_seconds
        self._noted_at = now

    def note_gpu(self, sample: GpuSample) -> None:
        self._gpu_memory = max(self._gpu_memory or 0, sample.memory_bytes)
        self._gpu = max(self._gpu or 0.0, sample.utilization)

    def finish(self, now: float, sample: Sample) -> None:
        """The exact sum at the end, where the runtime has one; such a sum is no new peak."""
        if sample.memory_bytes is not None:
            self._memory = max(self._memory or 0, sample.memory_bytes)
        if sample.cpu_seconds is not None:
            self._cpu, self._noted_at = max(self._cpu or 0.0, sample.cpu_seconds), now

    def result(self) -> Usage:
        elapsed = self._noted_at - self._started_at
        average = self._cpu / elapsed if self._cpu is not None and elapsed > 0 else None
        peak = self._cpu_peak if average is None else max(self._cpu_peak or 0.0, average)
        return Usage(
            max_memory_bytes=self._memory,
            cpu_seconds=self._cpu,
            cpu_cores_average=None if average is None else round(average, 3),
            cpu_cores_peak=None if peak is None else round(peak, 3),
            gpu_memory_bytes_peak=self._gpu_memory,
            gpu_utilization_peak=self._gpu,
        )


class UsageMeter:
    """A thread that looks every SAMPLE_SECONDS; `read` may raise or give None, which is no sample."""

    def __init__(
        self,
        read: Callable[[], Sample | None],
        *,
        gpus: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._gpus, self._clock = read, gpus, clock
        self._track = UsageTrack(clock())
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        self._track = UsageTrack(self._clock())
        threading.Thread(target=self._run, name="usage", daemon=True).start()

    def stop(self, final: Sample | None = None) -> None:
        with self._lock:
            if not self._ended.is_set() and final is not None:
                self._track.finish(self._clock(), final)
        self._ended.set()

    def usage(self) -> Usage:
        with self._lock:
            return self._track.result()

    def _run(self) -> None:
        delay = FIRST_SECONDS
        while not self._ended.is_set():
            self._look()
            self._ended.wait(delay)
            delay = min(SAMPLE_SECONDS, delay * 2)

    def _look(self) -> None:
        try:
            sample, gpu = self._read(), read_gpus(self._gpus)
        except Exception as error:  # noqa: BLE001 - a command that ends while it is looked at
            log.debug("usage: %s", error)
            return
        with self._lock:
            if self._ended.is_set():
                return
            if sample is not None:
                self._track.note(self._clock(), sample)
            if gpu is not None:
                self._track.note_gpu(gpu)


def read_gpus(gpus: str) -> GpuSample | None:
    """What `nvidia-smi` says of the job's GPUs (see RunSpec.gpus); None without the tool or a GPU."""
    tool = None if gpus == "none" else shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = "--query-gpu=index,uuid,memory.used,utilization.gpu"
    done = subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SAMPLE_SECONDS,
        check=True,
    )
    return parse_gpus(done.stdout, gpus)


def parse_gpus(text: str, gpus: str) -> GpuSample | None:
    """Lines of index, uuid, MiB, percent; a GPU that cannot tell (`[N/A]`) counts as idle."""
    wanted = None if gpus in ("", "all") else {part.strip() for part in gpus.split(",")}
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and (wanted is None or wanted & set(parts[:2])):
            found.append((_number(parts[2]), _number(parts[3])))
    if not found:
        return None
    return GpuSample(
        memory_bytes=int(sum(memory for memory, _ in found) * 1024**2),
        utilization=max(utilization for _, utilization in found),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def usage_words(usage: Usage) -> str | None:
    """The status line at the end; None when nothing was measured."""
    parts = []
    if usage.cpu_cores_average is not None:
        peak = usage.cpu_cores_peak or usage.cpu_cores_average
        parts.append(f"cpu {usage.cpu_cores_average:.2f} cores on average, {peak:.2f} at peak")
    if usage.max_memory_bytes is not None:
        parts.append(f"memory {decimal_size(usage.max_memory_bytes)} at peak")
    if usage.gpu_memory_bytes_peak is not None:
        memory = decimal_size(usage.gpu_memory_bytes_peak)
        parts.append(f"gpu {usage.gpu_utilization_peak or 0:.0f} % and {memory} at peak")
    return f"resources: {'; '.join(parts)}" if parts else None
