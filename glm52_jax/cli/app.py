"""The command group, its global options, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from glm52_jax import __version__
from glm52_jax.cli.common import CliError
from glm52_jax.cli.generate import generate
from glm52_jax.cli.inspect import inspect
from glm52_jax.cli.make_tiny import make_tiny
from glm52_jax.cli.plan import plan
from glm52_jax.cli.score import score

USAGE_ERROR, INTERRUPTED = 2, 130
# The base of typer's usage errors; typer does not export it under a name that all its versions share.
_ClickError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


@dataclass
class _Globals:
    debug: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glm52 {__version__}")
        raise typer.Exit


app = typer.Typer(name="glm52", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(generate)
app.command()(score)
app.command()(inspect)
app.command()(plan)
app.command()(make_tiny)


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """GLM-5.2 decoding in JAX: load a Hugging Face checkpoint directory and generate text."""
    if isinstance(context.obj, _Globals):
        context.obj.debug = debug


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for errors of input or usage, 130 after Ctrl-C."""
    state = _Globals()
    command = typer.main.get_command(app)
    try:
        code = command.main(list(sys.argv[1:] if argv is None else argv), "glm52", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        message = _message(error)
        if message is None or state.debug:
            raise
        print(f"glm52: error: {message}", file=sys.stderr)
        return USAGE_ERROR


def _message(error: Exception) -> str | None:
    """One line for an error that the user can do something about; None for a fault of this program."""
    # Imported here: reading the two modules is not worth it before something failed.
    from glm52_jax.checkpoint import CheckpointError
    from glm52_jax.config import ConfigError
    from glm52_jax.tokenizer import TokenizerError

    if isinstance(error, _ClickError):
        text = error.format_message() or "no command given"  # type: ignore[attr-defined]
        return f"{' '.join(text.split())} (glm52 --help explains)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, CliError | CheckpointError | ConfigError | TokenizerError | OSError):
        return " ".join(str(error).split())
    return None
