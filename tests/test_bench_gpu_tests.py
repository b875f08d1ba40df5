"""The record of the GPU tests: what is run, and what is read from pytest's report."""

from pathlib import Path

import pytest

from bench import gpu_tests

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="no"/></testcase>
<testcase classname="tests.b" name="three"><skipped/></testcase>
<testcase classname="tests.b" name="four"><system-out/><error/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = gpu_tests.outcomes(report)
    assert found == {
        "tests.a::one": "passed",
        "tests.a::two": "failed",
        "tests.b::three": "skipped",
        "tests.b::four": "error",
    }
    made = gpu_tests.record(found, 1.26, ["-k", "x"])
    assert made["counts"] == {"error": 1, "failed": 1, "passed": 1, "skipped": 1}
    assert made["seconds"] == 1.3 and made["arguments"] == ["-k", "x"] and made["sources"]


def test_an_empty_report_is_no_result(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text("<testsuites/>")
    with pytest.raises(ValueError, match="holds no test"):
        gpu_tests.outcomes(report)


def test_command_line() -> None:
    alone = gpu_tests.command(1, Path("r.xml"), ["-k", "x"])
    assert alone[1:5] == ["-m", "pytest", "-m", "gpu"] and "-n" not in alone and alone[-2:] == ["-k", "x"]
    assert gpu_tests.command(8, Path("r.xml"), [])[6:8] == ["-n", "8"]
