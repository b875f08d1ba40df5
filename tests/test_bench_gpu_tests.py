"""The record of the GPU tests: what is run, what is kept of each test at once, and what is read from that."""

import sys
from pathlib import Path

import pytest

from bench import gpu_tests

TESTS = """
import time
import pytest

def test_one():
    pass

def test_two():
    assert 1 == 2

@pytest.mark.skip
def test_three():
    pass

@pytest.fixture
def broken():
    raise ValueError("broken")

def test_four(broken):
    pass

def test_five():
    time.sleep(60)
"""


def run(folder: Path, *arguments: str, limit: float | None = None) -> tuple[int, Path]:
    (folder / "test_some.py").write_text(TESTS)
    lines = folder / "lines.jsonl"
    line = [sys.executable, "-m", "pytest", "-p", "bench.test_lines", "-q", "--rootdir", str(folder), str(folder)]
    return gpu_tests.run([*line, *arguments], lines, limit), lines


def test_outcomes(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "-k", "not five")
    found = {test.split("::")[-1]: outcome for test, outcome in gpu_tests.outcomes(lines).items()}
    assert status == 1
    assert found == {"test_one": "passed", "test_two": "failed", "test_three": "skipped", "test_four": "error"}
    assert "assert 1 == 2" in lines.read_text() and "broken" in lines.read_text()
    made = gpu_tests.record(found, 1.26, ["-k", "x"], ended_early=False)
    assert made["counts"] == {"error": 1, "failed": 1, "passed": 1, "skipped": 1}
    assert made["seconds"] == 1.3 and made["arguments"] == ["-k", "x"] and made["sources"] and not made["ended_early"]


def test_a_run_that_is_ended_keeps_what_is_known(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "-k", "two or five", limit=15)
    assert status == gpu_tests.ENDED
    assert list(gpu_tests.outcomes(lines).values()) == ["failed"]


def test_an_empty_report_is_no_result(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "-k", "nothing")
    assert status == 5
    with pytest.raises(ValueError, match="holds no test"):
        gpu_tests.outcomes(lines)


def test_command_line() -> None:
    alone = gpu_tests.command(1, ["-k", "x"])
    assert alone[1:5] == ["-m", "pytest", "-m", "gpu"] and "-n" not in alone and alone[-2:] == ["-k", "x"]
    several = gpu_tests.command(8, [])
    assert several[several.index("-n") + 1] == "8"
