"""The README's tables of figures, made from the records and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import collectives, moe_layer, report, step_report
from bench.records import ROOT, Record
from bench.report import fastest, kernels

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: begin, written by python -m bench report -->", "<!-- figures: end -->"
_HEADER = ("operation", "case", "rows", "backend", "us", "bound, us", "% of bound", "target or rival, us")


def content(folder: Path) -> str:
    """Everything between the README's marks, of one GPU's folder: operations, whole steps, what several GPUs do (with a target)."""
    parts = [table(report.load(folder))]
    steps = folder / step_report.FOLDER / step_report.FILE
    if steps.exists():
        parts += [
            "Whole decode steps (`python -m bench step`):",
            "\n".join(step_report.table(step_report.read(steps)[1])),
        ]
    for made_by, kind in (("collectives", collectives), ("moe_layer", moe_layer)):
        paths = sorted(folder.glob(f"x*/{made_by}.json"))
        figures = [figure for path in paths for figure in kind.FILE.read(path)[1] if figure.target_us]
        if figures:
            parts += [
                f"On several GPUs (`python -m bench.{made_by}`, all in `x2/` and `x4/`):",
                "\n".join(kind.table(figures)),
            ]
    return "\n\n".join(parts)


def table(results: dict[str, tuple[dict[str, Any], list[Record]]]) -> str:
    """The fastest backend of every case that somebody else's figure or a target stands beside."""
    lines = ["| " + " | ".join(_HEADER) + " |", "| --- | --- | ---: | --- |" + " ---: |" * 3 + " --- |"]
    for operation, (_, records) in results.items():
        named = [record for record in kernels(records) if record.rivals_us and "[" not in record.case]
        for case in dict.fromkeys(record.case for record in named):
            for record in fastest(record for record in named if record.case == case):
                lines.append("| " + " | ".join(_cells(operation, record)) + " |")
    return "\n".join(lines)


def _cells(operation: str, record: Record) -> tuple[str, ...]:
    others = ", ".join(f"{who} {us:g}" for who, us in record.rivals_us.items())
    return (
        f"`{operation}`",
        record.case,
        str(record.rows),
        record.backend,
        f"{record.us:.1f}" + ("" if record.l2 == "cold" else " (L2 warm)"),
        f"{record.bound_us:.1f} ({record.bound})",
        f"{record.percent_of_bound:.0f}",
        others,
    )


def replace(text: str, figures: str) -> str:
    """The README's text with the figures between its two marks; ValueError where the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README needs the two lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


def update(path: Path, folder: Path) -> Path:
    """Writes the figures of one GPU's folder into the README."""
    path.write_text(replace(path.read_text(), content(folder)))
    return path
