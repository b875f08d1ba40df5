"""Tables and plots from the JSON records, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.records import Record, read

_HEADER = (
    "case",
    "rows",
    "backend",
    "us",
    "TB/s",
    "TFLOP/s",
    "bound us",
    "% of bound",
    "x reference",
    "others, us (x)",
)


def load(folder: Path) -> dict[str, tuple[dict[str, Any], list[Record]]]:
    """(environments, records) by operation of one GPU's folder."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def write(folder: Path) -> list[Path]:
    """Writes ``table.md`` and ``roofline.png`` beside the records; ValueError where there are none."""
    results = load(folder)
    if not any(records for _, records in results.values()):
        raise ValueError(f"no records under {folder}: make some with python -m bench run")
    table, plot = folder / "table.md", folder / "roofline.png"
    table.write_text(markdown(results))
    draw(results, plot)
    return [table, plot]


def markdown(results: dict[str, tuple[dict[str, Any], list[Record]]]) -> str:
    """One table an operation, its environment above it. The reference's own rows are left out: they are a ratio in the others."""
    parts = ["<!-- Written by python -m bench report from the JSON files beside it. -->\n"]
    for operation, (runs, records) in results.items():
        shown = kernels(records)
        parts.append(f"## {operation}\n")
        parts += [f"{_environment(runs[run])}\n" for run in sorted({record.run for record in shown})]
        parts.append("\n".join(_table(shown)) + "\n")
    return "\n".join(parts)


def _environment(run: dict[str, Any]) -> str:
    smi, used = run["nvidia_smi"], run["versions"]
    clocks = f", {smi['clocks.sm']} MHz SM, {smi['clocks.mem']} MHz memory" if "clocks.sm" in smi else ""
    driver = f", driver {smi['driver_version']}" if "driver_version" in smi else ""
    packages = ", ".join(f"{name} {version}" for name, version in used.items() if name != "glm52-jax")
    return (
        f"{run['device_kind']}{driver}{clocks}; copy {run['copy_tb_s']:.2f} TB/s, bf16 matmul {run['matmul_tflop_s']:.0f} "
        f"TFLOP/s in the same run; {packages}; revision {run['revision']}, sources {run['sources']}, {run['date']}."
    )


def _table(records: Iterable[Record]) -> Iterable[str]:
    yield "| " + " | ".join(_HEADER) + " |"
    yield "| --- | ---: | --- |" + " ---: |" * 6 + " --- |"
    for record in sorted(records, key=lambda r: (r.case, r.rows, r.us)):
        others = ", ".join(f"{who} {us:g} ({record.against[who]:.2f})" for who, us in record.rivals_us.items())
        reference = f"{record.against['reference']:.1f}" if "reference" in record.against else ""
        cells = (
            record.case,
            str(record.rows),
            record.backend,
            f"{record.us:.1f}" + ("" if record.l2 == "cold" else " (L2 warm)"),
            f"{record.tb_s:.2f}",
            f"{record.tflop_s:.1f}",
            f"{record.bound_us:.1f} {record.bound}",
            f"{record.percent_of_bound:.0f}",
            reference,
            others,
        )
        yield "| " + " | ".join(cells) + " |"


def draw(results: dict[str, tuple[dict[str, Any], list[Record]]], path: Path) -> None:
    """First the roofline, every record a point; then for each operation percent of the bound over rows, a line a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: kernels(records) for name, (_, records) in results.items()}
    columns = min(3, 1 + len(shown))
    lines = -(-(1 + len(shown)) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(6.5 * columns, 5 * lines), layout="constrained", squeeze=False
    )
    roof, *panels = grid.flat
    for name, records in shown.items():
        intensity, rate = [r.flops / r.bytes for r in records], [r.tflop_s for r in records]
        roof.scatter(intensity, rate, s=14, label=name)
    _roofs(roof, results)
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title="Roofline")
    roof.legend(fontsize=8)
    for axes, (name, records) in zip(panels, shown.items(), strict=False):
        _share(axes, name, records)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _share(axes: Any, name: str, records: list[Record]) -> None:
    """Percent of the bound over rows, for each case's fastest backend; sweeps of a field are left to the table."""
    for n, case in enumerate(sorted({record.case for record in records if "[" not in record.case})):
        best = fastest(record for record in records if record.case == case)
        style = ("-", "--", ":")[n // 10 % 3]
        axes.plot([r.rows for r in best], [r.percent_of_bound for r in best], style, marker="o", ms=3, label=case)
    axes.axhline(100, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows", ylabel="% of the bound", title=f"{name}, fastest backend", ylim=(0, 110))
    axes.legend(fontsize=6, ncols=2)


def kernels(records: list[Record]) -> list[Record]:
    """Without the reference's records, unless there are no others."""
    return [record for record in records if record.backend != "reference"] or records


def fastest(records: Iterable[Record]) -> list[Record]:
    """The fastest record of each row count, by rows."""
    best: dict[int, Record] = {}
    for record in records:
        if record.rows not in best or record.us < best[record.rows].us:
            best[record.rows] = record
    return [best[rows] for rows in sorted(best)]


def _roofs(axes: Any, results: dict[str, tuple[dict[str, Any], list[Record]]]) -> None:
    """The measured ceilings of the newest run as lines."""
    runs = [run for environments, _ in results.values() for run in environments.values()]
    newest = max(runs, key=lambda run: run["date"])
    copy, matmul = newest["copy_tb_s"], newest["matmul_tflop_s"]
    records = [record for _, some in results.values() for record in some]
    intensities = [record.flops / record.bytes for record in records if record.flops]
    low, ridge = min([*intensities, matmul / copy]) / 2, matmul / copy
    high = max([*intensities, ridge]) * 2
    axes.plot([low, ridge, high], [low * copy, matmul, matmul], color="black", lw=1)
    axes.annotate(f"copy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s", (ridge, matmul), fontsize=8, ha="right")
