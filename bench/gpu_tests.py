"""The GPU tests and their result as a record: ``python -m bench.gpu_tests [--jobs N] [PYTEST ARGS]`` on a machine with a GPU.

It runs ``pytest -m gpu`` and writes ``bench/results/<gpu>/checks/tests.json``: GPU, driver, clocks, versions, revision, every
test's outcome. The exit status is pytest's.
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
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from bench import records

# Outcomes by the element that JUnit's format puts into a test case; a case without one passed.
_OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def command(jobs: int, report: Path, arguments: list[str]) -> list[str]:
    """pytest's command line; ``jobs`` processes share the GPU (they need pytest-xdist)."""
    several = ["-n", str(jobs)] if jobs > 1 else []
    # Where pytest-benchmark is installed it warns about xdist, and warnings are errors here.
    without = ["-p", "no:benchmark"] if importlib.util.find_spec("pytest_benchmark") else []
    return [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *several, *without, *arguments]


def outcomes(report: Path) -> dict[str, str]:
    """Test -> passed, failed, error or skipped, from a JUnit file; ValueError where it holds no test."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found[name] = next((_OUTCOMES[child.tag] for child in case if child.tag in _OUTCOMES), "passed")
    if not found:
        raise ValueError(f"{report} holds no test: was anything selected?")
    return found


def record(found: dict[str, str], seconds: float, arguments: list[str]) -> dict[str, Any]:
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
        "counts": dict(sorted(Counter(found.values()).items())),
        "tests": found,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tests", description="pytest -m gpu, with its result kept."
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the GPU (default %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where the record is kept")
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        start = datetime.datetime.now(datetime.UTC)
        status = subprocess.run(
            command(options.jobs, report, rest), cwd=records.ROOT, env=dict(os.environ), check=False
        )
        seconds = (datetime.datetime.now(datetime.UTC) - start).total_seconds()
        found = outcomes(report)
    from pallas_kernels.lowering import default_arch

    path = options.results / records.gpu_folder(default_arch()) / "checks" / "tests.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(found, seconds, rest), indent=1) + "\n")
    print(f"{path}: {dict(Counter(found.values()))}")
    return status.returncode


if __name__ == "__main__":
    raise SystemExit(main())
