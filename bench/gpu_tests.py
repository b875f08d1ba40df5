"""The GPU tests and their outcomes as records: ``python -m bench.gpu_tests [--jobs N] [PYTEST ARGS]`` on a machine with a GPU.

It runs ``pytest -m gpu`` and merges every test's outcome into ``bench/results/<gpu>/checks/tests.json``, with the run that it came
from: GPU, driver, clocks, versions, revision. A run of a few tests, or one that was ended early (``--limit``), replaces
only the outcomes that it has; a whole run replaces the file. ``--multigpu`` runs the tests that need several GPUs, and keeps them
in ``tests_multigpu.json``. The exit status is pytest's, or 124 where it was ended.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import records, test_lines

# The exit status of coreutils' timeout.
ENDED = 124
# Options that say how pytest runs and not what.
_HOW = ("-q", "-v", "-x", "--durations", "--timeout", "--tb")


def command(jobs: int, arguments: list[str], multigpu: bool = False) -> list[str]:
    """pytest's command line; ``jobs`` processes share the GPU (they need pytest-xdist). multigpu: the tests that need several."""
    several = ["-n", str(jobs)] if jobs > 1 else []
    # Where pytest-benchmark is installed it warns about xdist, and warnings are errors here.
    without = ["-p", "no:benchmark"] if importlib.util.find_spec("pytest_benchmark") else []
    return [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu and multigpu" if multigpu else "gpu",
        "-p",
        "bench.test_lines",
        "-p",
        "no:cacheprovider",
        *several,
        *without,
        *arguments,
    ]


def run(line: list[str], lines: Path, limit: float | None) -> int:
    """Runs pytest for at most ``limit`` seconds; its exit status, 124 where it was ended.

    pytest's processes are a session of their own, ended together: one that lived on would keep the GPU's memory.
    """
    environment = {**os.environ, test_lines.FILE: str(lines)}
    with subprocess.Popen(line, cwd=records.ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return ENDED
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """outcome: passed, failed, error or skipped. run: the key of its run's environment."""

    test: str
    outcome: str
    run: str

    @property
    def key(self) -> str:
        return self.test


FILE = records.FigureFile("tests", Outcome, "outcomes of GPU tests")


def outcomes(lines: Path, key: str) -> list[Outcome]:
    """What ``test_lines`` wrote, of the run ``key``; ValueError where there is nothing."""
    found: dict[str, Outcome] = {}
    for line in map(json.loads, lines.read_text().splitlines()):
        test = line["test"]
        if test not in found or found[test].outcome not in (
            "failed",
            "error",
        ):  # an error after a failure does not hide it
            found[test] = Outcome(test, line["outcome"], key)
    if not found:
        raise ValueError(f"{lines} holds no test: was anything selected?")
    return list(found.values())


def texts(lines: Path) -> dict[str, str]:
    """pytest's text of each test that failed."""
    return {line["test"]: line["text"] for line in map(json.loads, lines.read_text().splitlines()) if "text" in line}


def keep(path: Path, found: list[Outcome], environment: dict[str, Any]) -> Counter[str]:
    """Merges outcomes into the file, or replaces it after a whole run; returns how many of each the file holds then."""
    if not environment["arguments"] and not environment["ended_early"]:
        path.unlink(missing_ok=True)
    FILE.merge(path, found, environment)
    return Counter(outcome.outcome for outcome in FILE.read(path)[1])


def environment(date: str, seconds: float, arguments: list[str], ended_early: bool) -> dict[str, Any]:
    """The run's; the device is asked for here, after the tests have left it."""
    return {
        **records.provenance(),
        "date": date,
        "arguments": arguments,
        "seconds": round(seconds, 1),
        "ended_early": ended_early,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tests", description="pytest -m gpu, with its result kept."
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the GPU (default %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")
    parser.add_argument("--limit", type=float, help="end pytest after so many seconds and keep what is known")
    parser.add_argument("--multigpu", action="store_true", help="the tests that need several GPUs of this machine")
    options, rest = parser.parse_known_args(arguments)
    selecting = [argument for argument in rest if not argument.startswith(_HOW)]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "tests.jsonl")
        start = time.monotonic()
        status = run(command(options.jobs, rest, options.multigpu), lines, options.limit)
        seconds = time.monotonic() - start
        found, failed = outcomes(lines, f"{date} {records.sources()}"), texts(lines)
    from pallas_kernels.lowering import default_arch

    path = (
        options.results
        / records.gpu_folder(default_arch())
        / "checks"
        / ("tests_multigpu.json" if options.multigpu else "tests.json")
    )
    counts = keep(path, found, environment(date, seconds, selecting, status == ENDED))
    print(f"this run: {dict(Counter(outcome.outcome for outcome in found))}; {path}: {dict(counts)}")
    if failed:
        failures = path.with_name("failures.txt")
        failures.write_text("\n\n".join(f"{test}\n{text}" for test, text in failed.items()) + "\n")
        print(f"{failures}: the {len(failed)} texts of what failed")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
