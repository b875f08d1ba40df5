"""The runner of compute-sanitizer: what it would run, and how it reads the tool's answers."""

import dataclasses

import pytest

from bench import sanitize
from bench.operations import discover
from pallas_kernels import arch

H200 = arch.by_name("H200-141")
LATE = """Timeout (0:01:30)!
Thread 0x1 (most recent call first):
  File "/opt/jax/array.py", line 7 in block
========= ERROR SUMMARY: 0 errors
"""
RAN = f"{sanitize._DONE} rows=1\n{sanitize._DONE} rows=5\n"


def test_every_backend_has_a_small_case() -> None:
    operations = discover()
    planned = {(operation.name, backend) for operation, _, backend in sanitize.plan(list(operations.values()), H200)}
    served = {
        (operation.name, backend.name)
        for operation in operations.values()
        for backend in operation.backends
        if backend.name != "reference" and any(backend.supports(s, H200) is None for s in operation.cases.values())
    }
    assert planned >= served  # and those that serve more rows than the cases state


def test_small_cases_are_small() -> None:
    for operation, case, backend in sanitize.plan(list(discover().values()), H200):
        for spec in sanitize.small_specs(operation, case, backend, H200):
            assert operation.size(spec) < 64 << 20, (operation.name, case)


def test_a_backend_without_a_small_case_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sanitize.SMALL, "latent_write", {"fp8": {"rope": 32}})
    with pytest.raises(ValueError, match="latent_write@triton serves no small case"):
        sanitize.plan([discover()["latent_write"]], H200)


@pytest.mark.parametrize(
    ("tool", "text", "ended", "want"),
    [
        ("memcheck", RAN + "========= ERROR SUMMARY: 0 errors\n", True, ("clean", 0, 0)),
        ("memcheck", RAN + "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n", True, ("findings", 3, 0)),
        ("racecheck", RAN + "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", True, ("findings", 0, 2)),
        ("racecheck", RAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True, ("clean", 0, 0)),
        ("memcheck", "Traceback\n========= ERROR SUMMARY: 0 errors\n", True, ("failed", -1, -1)),
        ("memcheck", RAN, True, ("failed", -1, -1)),
        ("memcheck", RAN, False, ("timed out", -1, -1)),
        ("memcheck", LATE, True, ("timed out", -1, -1)),
    ],
)  # fmt: skip
def test_answers_are_read(tool: str, text: str, ended: bool, want: tuple[str, int, int]) -> None:
    *got, messages = sanitize.judge(tool, text, ended, calls=2)
    assert tuple(got) == want
    assert bool(messages) == (want[0] in ("findings", "failed") or text == LATE)
    if text == LATE:
        assert messages == ('File "array.py", line 7 in block',)


def test_findings_replace_older_ones_of_the_same_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "version", lambda _: "Version 1")
    old = sanitize.Finding("memcheck", "top_k", "8k", "gluon", (1, 5), {}, "timed out", -1, -1, 90.0, ())
    other = dataclasses.replace(old, tool="racecheck")
    path = tmp_path / "h200" / "checks" / "sanitizer.json"
    sanitize.save(path, [old, other], "none", H200)
    sanitize.save(path, [dataclasses.replace(old, status="clean", errors=0)], "none", H200)
    kept = sanitize.json.loads(path.read_text())
    assert [(entry["tool"], entry["status"]) for entry in kept["findings"]] == [
        ("memcheck", "clean"),
        ("racecheck", "timed out"),
    ]
    assert kept["findings"][0]["run"]["sanitizer"] == "Version 1" and "racecheck" in kept["remarks"]
