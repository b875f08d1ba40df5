"""The README's table of figures, made from the records and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.records import ROOT, Record
from bench.report import fastest, kernels

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: begin, written by python -m bench report -->", "<!-- figures: end -->"
_HEADER = ("operation", "case", "rows", "backend", "us", "bound, us", "% of bound", "target or rival, us")


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


def update(path: Path, results: dict[str, tuple[dict[str, Any], list[Record]]]) -> Path:
    """Writes the table into the README."""
    path.write_text(replace(path.read_text(), table(results)))
    return path
