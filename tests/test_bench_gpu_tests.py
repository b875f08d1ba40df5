"""The record of the GPU tests: what is run, what is kept of each test at once, and what is read from that."""

import sys
import time
from pathlib import Path

import pytest

from bench import gpu_tests

TESTS = """
import pathlib
import subprocess
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
    left = subprocess.Popen(["sleep", "60"])
    pathlib.Path(__file__).with_name("left").write_text(str(left.pid))
    time.sleep(60)
"""


def run(folder: Path, *arguments: str, limit: float | None = None) -> tuple[int, Path]:
    (folder / "test_some.py").write_text(TESTS)
    lines = folder / "lines.jsonl"
    line = [sys.executable, "-m", "pytest", "-p", "bench.test_lines", "-q", "--rootdir", str(folder), str(folder)]
    return gpu_tests.run([*line, *arguments], lines, limit), lines


def alive(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_outcomes(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "-k", "not five")
    found = {outcome.test.split("::")[-1]: outcome.outcome for outcome in gpu_tests.outcomes(lines, "run")}
    assert status == 1
    assert found == {"test_one": "passed", "test_two": "failed", "test_three": "skipped", "test_four": "error"}
    said = {test.split("::")[-1]: text for test, text in gpu_tests.texts(lines).items()}
    assert "assert 1 == 2" in said["test_two"] and "broken" in said["test_four"] and len(said) == 2


def test_a_run_that_is_ended_keeps_what_is_known(tmp_path: Path) -> None:
    # As much time as the start takes on a busy machine, and no more: the rest is waited for in vain.
    left = tmp_path / "left"
    for limit in (3, 6, 12, 24):
        status, lines = run(tmp_path, "-k", "two or five", limit=limit)
        if left.exists() and left.read_text():  # An empty one: ended while it was being written.
            break
        lines.unlink(missing_ok=True)
    assert status == gpu_tests.ENDED
    assert [outcome.outcome for outcome in gpu_tests.outcomes(lines, "run")] == ["failed"]
    # Neither pytest's processes nor theirs live on: they would keep the GPU's memory.
    # On a busy machine a process that was killed takes a moment to die; it would sleep for a minute.
    until = time.monotonic() + 10
    while alive(int(left.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(left.read_text()))


def test_an_empty_report_is_no_result(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "-k", "nothing")
    assert status == 5
    with pytest.raises(ValueError, match="holds no test"):
        gpu_tests.outcomes(lines, "run")


def test_a_part_replaces_its_outcomes_and_a_whole_run_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checks" / "tests.json"

    def keep(run: str, arguments: list[str], ended_early: bool = False, **tests: str) -> dict[str, int]:
        found = [gpu_tests.Outcome(test, outcome, run) for test, outcome in tests.items()]
        return gpu_tests.keep(path, found, gpu_tests.environment(run, 1.26, arguments, ended_early))

    assert keep("first", [], a="passed", b="failed", gone="passed") == {"passed": 2, "failed": 1}
    assert keep("second", ["-k", "b"], b="passed") == {"passed": 3}
    assert keep("third", [], ended_early=True, a="failed") == {"failed": 1, "passed": 2}
    runs, _ = gpu_tests.FILE.read(path)
    assert runs.keys() == {"first", "second", "third"}
    assert runs["second"]["arguments"] == ["-k", "b"] and runs["second"]["seconds"] == 1.3 and runs["second"]["sources"]
    assert keep("fourth", [], a="passed", b="passed") == {"passed": 2}
    assert gpu_tests.FILE.read(path)[0].keys() == {"fourth"}


def test_command_line() -> None:
    alone = gpu_tests.command(1, ["-k", "x"])
    assert alone[1:5] == ["-m", "pytest", "-m", "gpu"] and "-n" not in alone and alone[-2:] == ["-k", "x"]
    several = gpu_tests.command(8, [])
    assert several[several.index("-n") + 1] == "8"
    assert gpu_tests.command(1, [], multigpu=True)[3:5] == ["-m", "gpu and multigpu"]
