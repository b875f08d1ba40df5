"""Figures, records, reports and the command line of the benchmarks, with an operation made for it, on the CPU."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from bench import __main__ as command_line
from bench import check, operations, records, report, run, timing
from bench.operations import Operation, select
from bench.session import Session
from pallas_kernels import arch
from tests.toy_operation import FAST, H200, Spec, advance, backend, nan, operation, product


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings by decree (4 TB/s, 800 TFLOP/s) and operations that keep one layer."""
    monkeypatch.setattr(timing, "raise_clocks", lambda: None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "matmul_rate", lambda: 8e14)
    monkeypatch.setattr(
        Operation,
        "sized",
        lambda self, case, rows=None, arch=None: dataclasses.replace(self.cases[case], rows=rows or 1, layers=2),
    )


def session(folder: Path, gpu: arch.Arch = H200) -> tuple[Session, list[str]]:
    """A session and the list of what it says."""
    said: list[str] = []
    return Session(gpu, folder, said.append), said


def kept(folder: Path) -> list[records.Record]:
    return records.read(folder / "h200" / "toy.json")[1]


def toy_selection(made: Operation, text: str = "toy:square") -> operations.Selection:
    return select(text, {"toy": made})


# --- run


def test_targets_only(quick: None, tmp_path: Path) -> None:
    """Only what a figure stands beside is timed, at that figure's rows."""
    made = operation(backend("triton", product), RIVALS={"square": {"other": {2: 1e9}, "target": {8: 1.0}}})
    here, _ = session(tmp_path)
    options = dataclasses.replace(FAST, rows=None, targets=True, reference=False)
    run.run([toy_selection(made, "toy")], options, here)
    assert {(record.case, record.rows) for record in kept(tmp_path)} == {("square", 2), ("square", 8)}
    assert made.compared("large") == ()


def test_run_records(quick: None, tmp_path: Path) -> None:
    made = operation(backend("triton", product), advance=advance, RIVALS={"square": {"other": {2: 1e9}}})
    here, said = session(tmp_path, dataclasses.replace(H200, l2_bytes=1000))
    run.run([toy_selection(made)], FAST, here)
    assert here.status() == 0
    found = {(record.backend, record.rows): record for record in kept(tmp_path)}
    assert set(found) == {(name, rows) for name in ("triton", "reference") for rows in (1, 2)}
    record = found["triton", 2]
    assert record.us > 0 and record.bytes == Spec(rows=2).bytes()
    assert record.bound == "memory"
    assert record.bound_us == pytest.approx(record.bytes / 4e12 * 1e6, abs=1e-3)
    assert record.percent_of_bound == pytest.approx(100 * record.bytes / 4e6 / record.us, abs=0.1)
    assert record.rivals_us == {"other": 1e9}
    assert record.against["other"] == pytest.approx(1e9 / record.us, rel=1e-3)
    # Kept with three digits after the point; both times are rounded too.
    assert record.against["reference"] == pytest.approx(found["reference", 2].us / record.us, rel=2e-3, abs=1e-3)
    assert (record.l2, record.reason) == ("cold", "first choice on H200-141")
    assert said[0] == "copy 4.000 TB/s (known 4.18), bf16 matmul 800 TFLOP/s"
    assert len([text for text in said if text.startswith("toy:square rows=")]) == 4


def test_a_case_without_a_kernel_is_named_and_not_timed(quick: None, tmp_path: Path) -> None:
    made, (here, said) = operation(backend("triton", product, "needs more rows")), session(tmp_path)
    run.run([toy_selection(made)], FAST, here)
    assert here.status() == 0 and not (tmp_path / "h200").exists()
    assert said[1] == "toy:square rows=1: only the reference serves (triton refused: needs more rows)"
    run.run([toy_selection(made, "toy:square@reference")], FAST, here)
    assert {record.backend for record in kept(tmp_path)} == {"reference"}


def test_run_reports_nothing_on_a_red_check(quick: None, tmp_path: Path) -> None:
    made = operation(backend("triton", nan), advance=advance)
    here, said = session(tmp_path)
    run.run([toy_selection(made)], FAST, here)
    assert here.status() == 1
    assert len(here.wrong) == 2 and "toy:square rows=1 WRONG triton" in here.wrong[0]
    assert not (tmp_path / "h200").exists()
    assert not any("us +-" in text for text in said)


def test_what_was_kept_stays_when_a_later_case_fails(quick: None, tmp_path: Path) -> None:
    def fails_at_two(spec: Spec, *args: Any) -> Any:
        if spec.rows == 2:
            raise RuntimeError("out of memory")
        return product(spec, *args)

    here, _ = session(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.run([toy_selection(operation(backend("triton", fails_at_two)))], FAST, here)
    assert [(record.backend, record.rows) for record in kept(tmp_path)] == [("reference", 1), ("triton", 1)]


def test_all_backends_and_a_forced_one(quick: None, tmp_path: Path) -> None:
    made = operation(backend("mosaic", product), backend("triton", product), backend("old", product, "needs SM70"))
    everything = dataclasses.replace(FAST, backends="all", rows=(1,), reference=False)
    here, _ = session(tmp_path)
    run.run([toy_selection(made)], everything, here)
    assert [record.backend for record in kept(tmp_path)] == ["mosaic", "triton"]
    run.run([toy_selection(made, "toy:square@triton")], everything, here)
    assert kept(tmp_path)[1].reason == "forced; the choice is mosaic"
    with pytest.raises(ValueError, match=r"backend 'old' refuses .*needs SM70"):
        run.run([toy_selection(made, "toy:square@old")], everything, here)


def test_sweep(quick: None, tmp_path: Path) -> None:
    made, (here, said) = operation(backend("triton", product)), session(tmp_path)
    run.sweep(toy_selection(made), "offset", [0.0, 1.0], dataclasses.replace(FAST, rows=(1,)), here)
    cases = [record.case for record in kept(tmp_path) if record.backend == "triton"]
    assert here.wrong == [] and cases == ["square[offset=0.0]", "square[offset=1.0]"]
    assert "0.0e+00 from offset=0.0, repeats bitwise equal" in said[1]
    assert not any("0.0e+00 from" in text for text in said[3:])


def test_sweep_refuses_what_changes_from_call_to_call(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "same_bits", lambda *_: False)
    made, (here, _) = operation(backend("triton", product)), session(tmp_path)
    run.sweep(toy_selection(made), "offset", [0.0], dataclasses.replace(FAST, rows=(1,)), here)
    assert here.wrong == ["toy:square[offset=0.0] rows=1: repeats differ in their bits"]
    assert not (tmp_path / "h200").exists()


def test_compare(quick: None) -> None:
    made, said = operation(backend("triton", product)), []
    pair = [toy_selection(made, text) for text in ("toy:square@triton", "toy:large@reference")]
    assert run.compare(*pair, FAST, H200, said.append) == []
    assert len(said) == 2 and "A toy:square@triton" in said[0] and "B toy:large@reference" in said[0]


def test_compare_reports_nothing_on_a_red_check(quick: None) -> None:
    made, said = operation(backend("triton", nan)), []
    pair = [toy_selection(made, text) for text in ("toy:square@triton", "toy:square@reference")]
    (wrong,) = run.compare(*pair, dataclasses.replace(FAST, rows=(1,)), H200, said.append)
    assert "WRONG triton" in wrong and said == []


# --- records and report


def record(**changes: Any) -> records.Record:
    base = records.Record(
        operation="toy", case="square", rows=1, backend="triton", reason="first choice on H200-141", spec={"n": 64},
        us=10.0, spread=0.01, calls=100, l2="cold", bytes=20_000_000, flops=40_000_000, tb_s=2.0, tflop_s=4.0,
        bound="memory", bound_us=5.0, percent_of_bound=50.0, error=1e-3, tolerance=1e-2, rivals_us={"other": 12.0},
        against={"other": 1.2, "reference": 7.0}, run="first",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def environment(**changes: Any) -> dict[str, Any]:
    return {**records.environment(H200, records.Ceilings(4e12, 8e14)), **changes}


def test_check_of_an_operation_in_place_keeps_three_layers() -> None:
    spec = Spec(layers=200)
    assert check.small_enough(operation(advance=advance), spec) is spec
    assert check.small_enough(operation(STATE=(1,)), spec).layers == 3


def test_bound() -> None:
    ceilings = records.Ceilings(copy=4e12, matmul=8e14)
    assert ceilings.bound(4_000_000, 8) == ("memory", pytest.approx(1.0))
    assert ceilings.bound(4, 8_000_000_000) == ("compute", pytest.approx(10.0))
    assert ceilings.bound(4, 8_000_000_000, operand_bits=8) == ("compute", pytest.approx(5.0))


def test_records_round_trip_and_replace(tmp_path: Path) -> None:
    (path,) = records.save(tmp_path, [record(), record(rows=2)], environment())
    records.save(
        tmp_path, [record(us=9.0, run="second"), record(rows=2, backend="reference", run="second")], environment()
    )
    runs, kept = records.read(path)
    assert path.name == "toy.json"
    assert [(r.backend, r.rows, r.us, r.run) for r in kept] == [
        ("reference", 2, 10.0, "second"), ("triton", 1, 9.0, "second"), ("triton", 2, 10.0, "first"),
    ]  # fmt: skip
    assert set(runs) == {"first", "second"}
    records.save(tmp_path, [record(rows=2, run="third")], environment())
    assert set(records.read(path)[0]) == {"second", "third"}  # an environment leaves with its last record


def test_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"runs": {}, "records": [{"us": 1}]}))
    with pytest.raises(ValueError, match=r"toy\.json holds no bench records"):
        records.read(path)


def test_environment_names_what_ran() -> None:
    seen = environment()
    assert seen["gpu"] == "H200-141" and seen["copy_tb_s"] == 4.0
    assert seen["versions"]["jax"] == jax.__version__
    assert len(seen["sources"]) == 16 and seen["revision"]
    json.dumps(seen)


@pytest.mark.parametrize(("name", "folder"), [("H200-141", "h200"), ("A100-80", "a100"), ("RTX 4090", "rtx-4090")])
def test_gpu_folder(name: str, folder: str) -> None:
    assert records.gpu_folder(arch.by_name(name)) == folder


def test_report_says_what_the_records_say(tmp_path: Path) -> None:
    shown = [
        record(),
        record(rows=8, us=20.0, l2="warm"),
        record(backend="reference", us=70.0, against={}, rivals_us={}),
    ]
    records.save(tmp_path, shown, environment())
    table, plot = report.write(tmp_path)
    text = table.read_text()
    assert "| square | 1 | triton | 10.0 | 2.00 | 4.0 | 5.0 memory | 50 | 7.0 | other 12 (1.20) |" in text
    assert "20.0 (L2 warm)" in text and "70.0" not in text
    assert "copy 4.00 TB/s, bf16 matmul 800 TFLOP/s" in text
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_fastest_of_each_row_count() -> None:
    best = report.fastest(
        [record(rows=2, us=3.0), record(us=9.0), record(us=4.0, backend="mosaic"), record(rows=2, us=5.0)]
    )
    assert [(r.rows, r.us) for r in best] == [(1, 4.0), (2, 3.0)]


# --- command line


@pytest.mark.parametrize("arguments", [["run"], ["compare", "toy:a", "toy:b"], ["sweep", "toy:a", "n=1"], ["layer"]])
def test_figures_need_a_gpu(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"bench {arguments[0]} needs an NVIDIA GPU"):
        command_line.main(arguments)


def test_list_and_verify_work_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"toy": operation(backend("triton", product, "needs a GPU"))}
    monkeypatch.setattr(command_line, "discover", lambda: found)
    monkeypatch.setattr(command_line, "packages", lambda: ["router", "toy"])
    assert command_line.main(["list"]) == 0
    assert command_line.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "router: reference only, no cases yet" in printed
    assert "square: 0.02 MB, 0.0 MFLOP -> reference (triton refused: needs a GPU)" in printed
    assert "toy:large: only the reference serves (triton refused: needs a GPU)" in printed
    assert command_line.main(["verify", "toys"]) == 2
    assert "cannot bench 'toys'" in capsys.readouterr().err


@pytest.mark.parametrize(("function", "status"), [(product, 0), (nan, 1)])
def test_verify_fails_on_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, function: Any, status: int) -> None:
    monkeypatch.setattr(
        command_line, "discover", lambda: {"toy": operation(backend("triton", function), advance=advance)}
    )
    assert command_line.main(["verify", "toy:square", "--rows", "1,3"]) == status


def test_run_and_sweep_write_records(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command_line, "discover", lambda: {"toy": operation(backend("triton", product), advance=advance)}
    )
    monkeypatch.setattr(command_line, "default_arch", lambda: H200)
    small = ["--rows", "1", "--chain", "2", "--rounds", "1", "--results", str(tmp_path)]
    assert command_line.main(["run", "toy:square", *small]) == 0
    assert command_line.main(["sweep", "toy:square", "offset=0,2.5", *small]) == 0
    _, kept = records.read(tmp_path / "h200" / "toy.json")
    names = {record.case for record in kept}
    assert names == {"square", "square[offset=0]", "square[offset=2.5]"}
    assert command_line.main(["sweep", "toy:square", "speed=1", *small]) == 2
    assert command_line.main(["sweep", "toy", "offset=1", *small]) == 2
    assert "name one, as toy:square" in capsys.readouterr().err
    assert command_line.main(["report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "h200" / "table.md").exists()


def test_report_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["report", "--results", str(tmp_path)]) == 2
    assert "no records" in capsys.readouterr().err
