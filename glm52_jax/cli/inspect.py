"""``glm52 inspect``: what a checkpoint holds and which GPUs it fits on, from the headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from glm52_jax.inspect_checkpoint import Fit, Group, Summary


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
) -> None:
    """Print what a checkpoint holds, by kind and dtype, and which GPUs it fits on. Reads headers only."""
    from glm52_jax import inspect_checkpoint

    config, checkpoint, summary = inspect_checkpoint.inspect_directory(directory)
    rows = inspect_checkpoint.fits(config, summary)
    if as_json:
        typer.echo(json.dumps(inspect_checkpoint.report(config, checkpoint, summary, rows), indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{checkpoint.path}: {len(checkpoint.files)} file(s), {config.num_hidden_layers} layers "
        f"({len(config.full_layers)} with an indexer), context up to {config.max_position_embeddings:,}",
        markup=False,
    )
    console.print(_groups("kind", summary.by_kind, summary.total))
    console.print(_groups("dtype", summary.by_dtype, None))
    for line in summary.notes:
        console.print(f"note: {line}", markup=False)
    console.print(_fits(rows, summary))
    per_token = f"{summary.cache_bytes_per_token:,} bytes a token on every GPU"
    console.print(f"Tokens of context that fit in the FP8 caches ({per_token}), all requests together;", markup=False)
    console.print("negative: bytes a GPU short. 95 % of the datasheet memory counts as usable.", markup=False)
    for reason in dict.fromkeys(row.refusal for row in rows if row.refusal):
        console.print(f"does not split: {reason}", markup=False)


def human_bytes(count: int) -> str:
    """Decimal units, as datasheets count."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _groups(title: str, groups: dict[str, Group], total: Group | None) -> Table:
    from rich.table import Table

    table = Table(title)
    for column in ("tensors", "parameters", "bytes"):
        table.add_column(column, justify="right")
    for name, group in [*groups.items(), *([("total", total)] if total else [])]:
        table.add_row(name, f"{group.tensors:,}", f"{group.parameters:,}", human_bytes(group.nbytes))
    return table


def _fits(rows: list[Fit], summary: Summary) -> Table:
    from rich.table import Table

    counts = sorted({row.gpus for row in rows})
    table = Table("GPU")
    for count in counts:
        table.add_column(f"x{count}", justify="right")
    table.add_row("weights a GPU", *(human_bytes(summary.weights_per_gpu(count)) for count in counts), end_section=True)
    for gpu in dict.fromkeys(row.gpu for row in rows):
        table.add_row(gpu, *(_cell(row) for row in rows if row.gpu == gpu))
    return table


def _cell(row: Fit) -> str:
    if row.refusal:
        return "no split"
    return human_bytes(row.free) if row.free < 0 else f"{row.tokens:,}"
