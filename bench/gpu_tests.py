"""The GPU tests and their result as a record: ``python -m bench.gpu_tests [--jobs N] [PYTEST ARGS]`` on a machine with a GPU.

It runs ``pytest -m gpu`` and writes ``bench/results/<gpu>/checks/tests.json``: GPU, driver, clocks, versions, revision, every
test's outcome, and whether the run was ended early (``--limit``). The exit status is pytest's, or 124 where it was ended.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
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


def command(jobs: int, arguments: list[str]) -> list[str]:
    """pytest's command line; ``jobs`` processes share the GPU (they need pytest-xdist)."""
    several = ["-n", str(jobs)] if jobs > 1 else []
    # Where pytest-benchmark is installed it warns about xdist, and warnings are errors here.
    without = ["-p", "no:benchmark"] if importlib.util.find_spec("pytest_benchmark") else []
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "bench.test_lines", *several, *without, *arguments]


def run(line: list[str], lines: Path, limit: float | None) -> int:
    """Runs pytest for at most ``limit`` seconds; its exit status, 124 where it was ended."""
    try:
        environment = {**os.environ, test_lines.FILE: str(lines)}
        return subprocess.run(line, cwd=records.ROOT, env=environment, check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return ENDED


def outcomes(lines: Path) -> dict[str, str]:
    """Test -> passed, failed, error or skipped, from what ``test_lines`` wrote; ValueError where there is none."""
    found: dict[str, str] = {}
    for line in map(json.loads, lines.read_text().splitlines()):
        if found.get(line["test"]) not in ("failed", "error"):  # an error after a failure does not hide it
            found[line["test"]] = line["outcome"]
    if not found:
        raise ValueError(f"{lines} holds no test: was anything selected?")
    return found


def record(found: dict[str, str], seconds: float, arguments: list[str], ended_early: bool) -> dict[str, Any]:
    """What is written; the device is asked for here, after the tests have left it."""
    import jax

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device_kind": jax.devices()[0].device_kind,
        "nvidia_smi": records.nvidia_smi(),
        "versions": records.versions(),
        "revision": records.revision(),
        "sources": records.sources(),
        "arguments": arguments,
        "seconds": round(seconds, 1),
        "ended_early": ended_early,
        "counts": dict(sorted(Counter(found.values()).items())),
        "tests": found,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tests", description="pytest -m gpu, with its result kept."
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the GPU (default %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")
    parser.add_argument("--limit", type=float, help="end pytest after so many seconds and keep what is known")
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "tests.jsonl")
        start = time.monotonic()
        status = run(command(options.jobs, rest), lines, options.limit)
        seconds = time.monotonic() - start
        found = outcomes(lines)
        texts = {
            line["test"]: line["text"] for line in map(json.loads, lines.read_text().splitlines()) if "text" in line
        }
    from pallas_kernels.lowering import default_arch

    path = options.results / records.gpu_folder(default_arch()) / "checks" / "tests.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(found, seconds, rest, status == ENDED), indent=1) + "\n")
    print(f"{path}: {dict(Counter(found.values()))}")
    if texts:
        failures = path.with_name("failures.txt")
        failures.write_text("\n\n".join(f"{test}\n{text}" for test, text in texts.items()) + "\n")
        print(f"{failures}: the {len(texts)} texts of what failed")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
