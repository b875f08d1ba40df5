"""What the commands share: option types, loading with a progress bar, reading JSON files."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from glm52_jax.cli.several import Several
    from glm52_jax.generate import Model

DType = Literal["bfloat16", "float32"]
Weights = Literal["checkpoint", "bfloat16", "float32"]
Cache = Literal["auto", "float32", "bfloat16", "fp8"]
Linear = Literal["w8a16", "w8a8"]

DTypeOption = Annotated[DType, typer.Option("--dtype", help="Dtype of the activations.")]
WeightsOption = Annotated[Weights, typer.Option("--weights", help="Keep the weights as stored, or convert them.")]
CacheOption = Annotated[
    Cache, typer.Option("--cache", help="Latent cache; auto: float32 for float32, fp8 for FP8 weights, else bfloat16.")
]
LinearOption = Annotated[Linear, typer.Option("--linear", help="Arithmetic of FP8 weights.")]
LatentNormEpsOption = Annotated[
    float | None,
    typer.Option(
        "--latent-norm-eps", help="Epsilon of the two latent norms; default rms_norm_eps (transformers: 1e-6)."
    ),
]


class CliError(Exception):
    """A request that cannot be served as it was given; the message is all the user sees."""


def load_model(directory: Path, several: Several, **options: Any) -> Model:
    """``glm52_jax.load`` with a progress bar on stderr (when that is a terminal). CliError for options it refuses."""
    import jax

    import glm52_jax
    from glm52_jax import compile_cache

    if (
        jax.default_backend() == "gpu"
    ):  # On CPUs compiled code is bound to the machine, and is made faster than it is read.
        compile_cache.enable()
    with _progress() as report, refusals():
        return glm52_jax.load(directory, progress=report, **options, **several.load_options())


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns a plain ValueError, which is how the library refuses arguments, into a CliError; subclasses pass."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise CliError(str(error)) from error


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("load", total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total)

        yield report


def read_json(file: Path, what: str) -> Any:
    """Parses a JSON file; "-" is stdin. CliError names the file and ``what`` it should have held."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CliError(f"{file}: not valid JSON ({error}): give {what}") from error


def read_optional_json(file: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file, {} if the file is absent."""
    if not file.is_file():
        return {}
    value = read_json(file, "a JSON object")
    if not isinstance(value, dict):
        raise CliError(f"{file}: must hold a JSON object, holds {type(value).__name__}")
    return value


def note(text: str) -> None:
    """A line for the person, on stderr: stdout is the result."""
    print(text, file=sys.stderr, flush=True)
