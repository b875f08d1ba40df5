"""A pytest plugin that keeps every test's outcome as a line of JSON the moment it is known: ``-p bench.test_lines``.

A run that is ended early (a machine lent for minutes) has lost nothing: each line has the test, its outcome, its seconds and, where
it failed, pytest's text. The file is named by ``GLM52_TEST_LINES``; under pytest-xdist only the controller writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILE = "GLM52_TEST_LINES"


class Lines:
    """Writes a line for each finished test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            line["text"] = report.longreprtext
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(os.environ[FILE])), "test_lines")
