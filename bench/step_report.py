"""Files of whole-step figures: JSON beside the operations' records, and a picture of step time against batch and context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.records import FigureFile
from bench.step import Step

# A folder of its own: ``bench.report`` reads every JSON file of a GPU's folder as records of operations.
FOLDER, FILE, _PICTURE = "step", "step.json", "step.png"
_STEPS = FigureFile("steps", Step, "whole-step figures")


def save(folder: Path, figures: Sequence[Step], environment: dict[str, Any]) -> Path:
    """Merges figures into ``folder/step/step.json``: a new one replaces the old one of its case, batch and context."""
    return _STEPS.merge(folder / FOLDER / FILE, figures, environment)


def read(path: Path) -> tuple[dict[str, Any], list[Step]]:
    """(environments by run, figures) of a file; ValueError names one that is not ours."""
    return _STEPS.read(path)


def table(figures: Iterable[Step]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| what | batch | context | ms a step | ms of its graph | p99 | tok/s | bound ms | % of bound | dispatch us |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return lines + [
        f"| {f.case} | {f.rows} | {f.context} | {f.us / 1e3:.2f} | "
        f"{f'{f.graph_us / 1e3:.2f}' if f.graph_us else ''} | {f.p99_us / 1e3:.2f} | {f.tokens_s:.0f} | "
        f"{f.bound_us / 1e3:.2f} | {f.percent_of_bound:.0f} | {f.dispatch_us:.0f} |"
        for f in figures
    ]


def draw(figures: Sequence[Step], path: Path) -> None:
    """Step time against batch, a line for each context, and against context, a line for each batch; bounds are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({figure.case for figure in figures})
    pyplot.close("all")
    picture, grid = pyplot.subplots(len(cases), 2, figsize=(13, 4.5 * len(cases)), layout="constrained", squeeze=False)
    for case, (left, right) in zip(cases, grid, strict=True):
        own = [figure for figure in figures if figure.case == case]
        _lines(left, own, "rows", "context", case)
        _lines(right, own, "context", "rows", case)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(picture)


def _lines(axes: Any, figures: list[Step], along: str, each: str, case: str) -> None:
    names = {"rows": "batch", "context": "context"}
    for number, value in enumerate(sorted({getattr(figure, each) for figure in figures})):
        some = sorted((f for f in figures if getattr(f, each) == value), key=lambda f: getattr(f, along))
        where = [getattr(figure, along) for figure in some]
        color = f"C{number % 10}"
        axes.plot(where, [f.us / 1e3 for f in some], "-o", ms=3, color=color, label=f"{names[each]} {value}")
        axes.plot(where, [f.bound_us / 1e3 for f in some], "--", lw=1, color=color)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=names[along], ylabel="ms a step (dashed: bound)", title=case)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def picture_of(path: Path) -> Path:
    """Where the picture of a file of figures goes."""
    return path.with_name(_PICTURE)
