"""What the benchmark scripts share: a child process measured from outside, and tables with their circumstances."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One measured process: wall and CPU seconds, peak resident bytes, what it printed."""

    wall: float
    cpu: float
    peak: int
    output: str


def measure(command: list[str], env: dict[str, str] | None = None) -> Run:
    """Run a command to its end; raises CalledProcessError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise subprocess.CalledProcessError(status, command, output)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, usage.ru_maxrss * 1024, output)


def circumstances() -> str:
    """One line: date, processor, cores, versions."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "onnx", "onnxruntime"))
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    python = platform.python_version()
    return f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, Python {python}, {packages}"


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table; columns are the first row's keys."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def publish(name: str, title: str, rows: list[dict[str, object]], notes: str = "") -> None:
    """Print a table; with `--write` on the command line, also put it into results/."""
    text = f"# {title}\n\n{circumstances()}\n\nCommand: `python benchmarks/{name}.py --write`\n\n{table(rows)}\n"
    text += f"\n{notes}\n" if notes else ""
    print(text)
    if "--write" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
