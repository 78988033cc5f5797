"""How fast files come and go: our transfer engine beside aws s3 cp, obstore, s5cmd and rclone.

One nginx answers like S3 from a directory in memory (bench/transfers/server.py), so that neither a disk nor the server
is what is measured; sources and targets lie in memory too. Shapes: one large file, some of middle size, many small ones;
each way. The tools take turns in every round, in an order that changes. Ours is measured with sha256 only (which is
compared), with all three checksums, and with none. No tool signs, and none of the others computes a checksum.

Seconds of the command lines include their start, those of the libraries (ours, obstore) do not: an agent runs already
when a job comes. CPU seconds are the tool's own. Memory is the largest sum of resident memory of the tool's process tree.
At the end the large file is fetched into the input cache and asked for again.

    python -m bench.transfer [--quick] [--rounds N] [--dir /dev/shm] [--peers .venv-bench/bin]

`--quick` moves a few megabytes. Needs nginx (apt install nginx-light); peers that are missing are told as such.
The last line is JSON: ratio_vs_best_peer per shape and direction (median throughput of ours with sha256 by that of the best
peer), ratio_without_checksum (the same of ours with none, as the peers), peak_memory_mb (of ours), cached_4g_ready_s, and the medians behind them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.transfers.server import BUCKET, NoServer, Server, serve

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.02
TOOL_SECONDS = 300.0  # a tool that takes longer has failed
OURS, OURS_ALL, OURS_NONE = "ours, sha256", "ours, three checksums", "ours, no checksum"
ALGORITHMS = {OURS: ["sha256"], OURS_ALL: ["sha256", "sha1", "md5"], OURS_NONE: []}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """So many files of one size. `name` is the prefix of their keys."""

    label: str
    name: str
    files: int
    size: int

    @property
    def bytes(self) -> int:
        return self.files * self.size


SHAPES = [
    Shape(label="1 x 4 GB", name="large", files=1, size=4_000_000_000),
    Shape(label="64 x 64 MB", name="middle", files=64, size=64_000_000),
    Shape(label="5,000 x 64 KB", name="small", files=5000, size=64_000),
]
QUICK_SHAPES = [
    Shape(label="1 x 48 MB", name="large", files=1, size=48_000_000),
    Shape(label="4 x 2 MB", name="middle", files=4, size=2_000_000),
    Shape(label="50 x 64 KB", name="small", files=50, size=64_000),
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a tool is to move, and between which places."""

    server: Server
    shape: Shape
    down: bool
    directory: Path  # target of a download, source of an upload
    names: list[str] = field(default_factory=list)

    def task(self, **more: Any) -> str:
        """Writes it down for a worker; gives the path."""
        path = self.server.root / "task.json"
        text = json.dumps(
            {
                "way": "down" if self.down else "up",
                "endpoint": self.server.endpoint,
                "bucket": BUCKET,
                "names": self.names,
                "sizes": [self.shape.size] * self.shape.files,
                "directory": str(self.directory),
                **more,
            }
        )
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one transfer."""

    seconds: float
    cpu: float
    memory: int


class Failed(Exception):
    """A tool ended badly or moved something else than it should."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """`command` for a job; `library` tells its own seconds on its last line. `settings` for the table."""

    name: str
    settings: str
    command: Callable[[Job], list[str]]
    library: bool = False


# -- the tools ---------------------------------------------------------------------------------------------------


def our_tools() -> list[Tool]:
    def tool(name: str) -> Tool:
        def command(job: Job) -> list[str]:
            task = job.task(algorithms=ALGORITHMS[name])
            return [sys.executable, "-m", "bench.transfers.ours", task]

        return Tool(name=name, settings="as in an execution", command=command, library=True)

    return [tool(name) for name in ALGORITHMS]


def peer_tools(binaries: Path) -> tuple[list[Tool], list[str]]:
    """The tools that are there, and the names of those that are not."""
    candidates = [
        ("aws", _aws(binaries)),
        ("obstore", _obstore(binaries)),
        ("s5cmd", _s5cmd(binaries)),
        ("rclone", _rclone(binaries)),
    ]
    there = [tool for name, tool in candidates if _has(binaries, name)]
    return there, [tool.name for name, tool in candidates if not _has(binaries, name)]


def _has(binaries: Path, name: str) -> bool:
    if name != "obstore":
        return (binaries / name).exists()
    python = binaries / "python"
    return (
        python.exists()
        and not subprocess.run(
            [python, "-c", "import obstore"], capture_output=True, check=False
        ).returncode
    )


def _aws(binaries: Path) -> Tool:
    def command(job: Job) -> list[str]:
        remote = f"s3://{BUCKET}/{job.shape.name}/" if job.down else f"s3://{BUCKET}/up/"
        here = f"{job.directory}/"
        return [
            *(str(binaries / "aws"), "s3", "cp", "--recursive", "--quiet", "--no-sign-request"),
            *(("--no-progress", remote, here) if job.down else ("--no-progress", here, remote)),
        ]

    settings = "16 concurrent requests, parts of 16 MB"
    return Tool(name="aws s3 cp", settings=settings, command=command)


def _obstore(binaries: Path) -> Tool:
    script = str(ROOT / "bench" / "transfers" / "with_obstore.py")

    def command(job: Job) -> list[str]:
        return [str(binaries / "python"), script, job.task()]

    settings = "8 threads; ranges of 4 MB, parts of 16 MB for large files"
    return Tool(name="obstore", settings=settings, command=command, library=True)


def _s5cmd(binaries: Path) -> Tool:
    def command(job: Job) -> list[str]:
        remote = f"s3://{BUCKET}/{job.shape.name}/*" if job.down else f"s3://{BUCKET}/up/"
        here = f"{job.directory}/"
        workers = "8" if job.shape.files > 1 else "1"
        return [
            *(str(binaries / "s5cmd"), "--endpoint-url", job.server.endpoint, "--no-sign-request"),
            *("--log", "error", "--numworkers", workers, "cp", "-c", "8", "-p", "16"),
            *((remote, here) if job.down else (here, remote)),
        ]

    return Tool(name="s5cmd", settings="8 workers, 8 parts of 16 MB each", command=command)


def _rclone(binaries: Path) -> Tool:
    def command(job: Job) -> list[str]:
        remote = f":s3:{BUCKET}/{job.shape.name if job.down else 'up'}"
        here = str(job.directory)
        return [
            *(str(binaries / "rclone"), "copy", "--config", "/dev/null", "--s3-provider", "Other"),
            *("--s3-endpoint", job.server.endpoint, "--s3-env-auth=false", "--s3-no-check-bucket"),
            *("--s3-disable-checksum", "--s3-no-head", "--ignore-checksum", "--no-check-dest"),
            *("--s3-use-unsigned-payload=true", "--s3-list-version", "2", "--no-update-modtime"),
            *("--transfers", "8", "--s3-upload-concurrency", "8"),
            # Several streams of one upload end with a look at the joined object, which this server does not make.
            *("--multi-thread-streams", "8" if job.down else "0"),
            *("--s3-chunk-size", "16M", "--multi-thread-chunk-size", "16M", "--buffer-size", "0"),
            *((remote, here) if job.down else (here, remote)),
        ]

    return Tool(
        name="rclone", settings="8 transfers, 8 streams of 16 MB, no checks", command=command
    )


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(tool: Tool, job: Job, environment: dict[str, str]) -> Figures:
    """Runs it once. Raises Failed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            tool.command(job), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        memory = _Memory(process.pid)
        killer = threading.Timer(TOOL_SECONDS, process.kill)
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            killer.cancel()
            process.returncode = 0
        seconds = time.perf_counter() - started
        peak = memory.stop()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if status:
        raise Failed(f"{tool.name} ended with {os.waitstatus_to_exitcode(status)}: {text[-600:]}")
    moved = _tree_bytes(job.directory) if job.down else job.server.uploaded_bytes()
    if moved != job.shape.bytes:
        raise Failed(f"{tool.name} moved {moved} bytes instead of {job.shape.bytes}: {text[-300:]}")
    cpu = usage.ru_utime + usage.ru_stime
    if tool.library:
        told = json.loads(text.splitlines()[-1])
        seconds, cpu = told["seconds"], told["cpu"]
    return Figures(seconds=seconds, cpu=cpu, memory=max(peak, usage.ru_maxrss * 1024))


class _Memory:
    """Samples the resident memory of a process and its descendants together."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak = pid, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, sum(_resident(pid) for pid in _tree(self._pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _tree_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def peer_environment(server: Server, root: Path) -> dict[str, str]:
    """Where the tools find the server; settings that make them fast."""
    config = root / "aws.config"
    config.write_text(
        "[default]\ns3 =\n  addressing_style = path\n  max_concurrent_requests = 16\n"
        "  multipart_threshold = 32MB\n  multipart_chunksize = 16MB\n  max_queue_size = 10000\n"
    )
    return {
        **os.environ,
        "AWS_CONFIG_FILE": str(config),
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def fill(server: Server, shape: Shape) -> list[str]:
    """Makes the objects of a shape; gives their names below the endpoint."""
    folder = server.objects / shape.name
    folder.mkdir(parents=True)
    block = random.Random(shape.name).randbytes(1_000_000)
    names = []
    for number in range(shape.files):
        path = folder / f"file{number:05d}"
        with path.open("wb") as file:
            for start in range(0, shape.size, len(block)):
                file.write(memoryview(block)[: min(len(block), shape.size - start)])
        names.append(f"{BUCKET}/{shape.name}/{path.name}")
    server.write_list(shape.name)
    return names


def compare(
    server: Server, shape: Shape, tools: Sequence[Tool], rounds: int, root: Path, console: Console
) -> dict[tuple[bool, str], list[Figures]]:
    """All tools, both ways, in turns."""
    names = fill(server, shape)
    environment = peer_environment(server, root)
    found: dict[tuple[bool, str], list[Figures]] = defaultdict(list)
    for number in range(rounds):
        order = list(tools)
        random.Random(number).shuffle(order)
        for down in (True, False):
            for tool in order:
                target = root / "target"
                target.mkdir()
                directory = target if down else server.objects / shape.name
                job = Job(server=server, shape=shape, down=down, directory=directory, names=names)
                try:
                    figures = measure(tool, job, environment)
                    found[down, tool.name].append(figures)
                    console.print(
                        f"{shape.label} {'down' if down else 'up':4} {tool.name:22} "
                        f"{shape.bytes / figures.seconds / 1e6:7.0f} MB/s",
                        style="dim",
                    )
                except Failed as error:
                    console.print(f"[red]{shape.label}: {error}[/]")
                finally:
                    shutil.rmtree(target)
                    server.forget_uploads()
    return found


def cached_start(server: Server, shape: Shape, root: Path) -> float:
    """Seconds until the cached large file is in place for a job."""
    directory = root / "cached"
    names = [f"{BUCKET}/{shape.name}/file00000"]
    job = Job(server=server, shape=shape, down=True, directory=directory, names=names)
    done = subprocess.run(
        [sys.executable, "-m", "bench.transfers.cached", job.task()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(directory, ignore_errors=True)
    if done.returncode:
        raise Failed(f"start from the cache: {done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])["cached"]


# -- telling -----------------------------------------------------------------------------------------------------

Results = dict[tuple[Shape, bool, str], list[Figures]]


def rate(shape: Shape, figures: Sequence[Figures]) -> float:
    """Median bytes per second."""
    return shape.bytes / statistics.median(one.seconds for one in figures)


def ratios(results: Results, ours: str) -> dict[str, float]:
    """Ours, as one of ALGORITHMS, by the best peer, per shape and direction."""
    found = {}
    for shape in {key[0]: None for key in results}:
        for down in (True, False):
            rates = {
                name: rate(shape, figures)
                for (other, way, name), figures in results.items()
                if other == shape and way == down
            }
            best = max(
                (value for name, value in rates.items() if name not in ALGORITHMS), default=0.0
            )
            if best and ours in rates:
                key = f"{shape.name}_{'down' if down else 'up'}"
                found[key] = round(rates[ours] / best, 2)
    return found


def show(results: Results, tools: Sequence[Tool], missing: Sequence[str], console: Console) -> None:
    for shape in {key[0]: None for key in results}:
        table = Table(title=f"{shape.label} (source and target in memory)", title_justify="left")
        for column in ("tool", "down MB/s", "CPU s/GB", "up MB/s", "CPU s/GB", "memory MB"):
            table.add_column(column, justify="left" if column == "tool" else "right")
        for tool in tools:
            cells, memory = [], 0
            for down in (True, False):
                figures = results.get((shape, down, tool.name), [])
                if not figures:
                    cells += ["failed", ""]
                    continue
                cpu = statistics.median(one.cpu for one in figures) / shape.bytes * 1e9
                cells += [f"{rate(shape, figures) / 1e6:,.0f}", f"{cpu:.2f}"]
                memory = max(memory, *(one.memory for one in figures))
            table.add_row(tool.name, *cells, f"{memory / 1e6:,.0f}")
        for name in missing:
            table.add_row(name, *["not installed"], *[""] * 4)
        console.print(table)
    for tool in tools:
        if tool.name not in ALGORITHMS:
            console.print(f"{tool.name}: {tool.settings}")


def summary(results: Results, cached: float) -> dict[str, Any]:
    ours = [one for (_, _, name), found in results.items() if name in ALGORITHMS for one in found]
    return {
        "ratio_vs_best_peer": ratios(results, OURS),
        "ratio_without_checksum": ratios(results, OURS_NONE),
        "peak_memory_mb": round(max((one.memory for one in ours), default=0) / 1e6, 1),
        "cached_4g_ready_s": round(cached, 4),
        "mb_per_s": {
            f"{shape.name}_{'down' if down else 'up'}: {name}": round(rate(shape, found) / 1e6)
            for (shape, down, name), found in results.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few megabytes, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="a place in memory")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-bench" / "bin")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server and the files go with us
    console = Console(stderr=False, width=110)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    shapes = [shape for shape in shapes if not options.shape or shape.name in options.shape]
    peers, missing = peer_tools(options.peers)
    tools = [*our_tools(), *peers]
    results: Results = {}
    cached = 0.0
    root = Path(tempfile.mkdtemp(prefix="bench-transfer-", dir=options.dir))
    try:
        with serve(root / "server") as server:
            for shape in shapes:
                rounds = 1 if options.quick else options.rounds
                found = compare(server, shape, tools, rounds, root, console)
                results |= {(shape, down, name): one for (down, name), one in found.items()}
                if shape.files == 1:
                    cached = cached_start(server, shape, root)
                shutil.rmtree(server.objects / shape.name)
    except NoServer as error:
        console.print(f"[red]{error}[/]")
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)
    show(results, tools, missing, console)
    console.print(f"start from the cache, {shapes[0].label}: {cached * 1000:.0f} ms until ready")
    print(json.dumps(summary(results, cached)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
