"""``glm52 score``: logits of given ids into an npz file, the contract that outside tools compare against."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm52_jax.cli import common, several

if TYPE_CHECKING:
    import numpy as np


def score(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory.")],
    ids: Annotated[Path, typer.Option("--ids", metavar="FILE", help="JSON list of token ids; - is stdin.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="npz file to write.")],
    taps: Annotated[bool, typer.Option("--taps", help="Also hidden.<layer>, topk.<layer>, experts.<layer>.")] = False,
    dtype: common.DTypeOption = "float32",
    weights: common.WeightsOption = "checkpoint",
    cache: common.CacheOption = "auto",
    linear: common.LinearOption = "w8a16",
    latent_norm_eps: common.LatentNormEpsOption = None,
    parallel: several.ParallelOption = None,
    devices: several.DevicesOption = None,
    coordinator: several.CoordinatorOption = None,
    process_id: several.ProcessIdOption = None,
    num_processes: several.NumProcessesOption = None,
) -> None:
    """Write the logits of every position of a list of token ids, float32 [T, vocab], to an npz file."""
    token_ids = read_ids(ids, common.read_optional_json(directory / "config.json").get("vocab_size"))
    if not out.resolve().parent.is_dir():
        raise common.CliError(f"--out {out}: the directory {out.resolve().parent} does not exist")
    if out.is_dir():
        raise common.CliError(f"--out {out} is a directory: give the file to write")
    options = {"dtype": dtype, "weights": weights, "cache": cache, "linear": linear, "latent_norm_eps": latent_norm_eps}
    group = several.Several(parallel, devices, coordinator, process_id, num_processes)
    with group.running():
        group.agree(token_ids, taps, options)
        model = common.load_model(directory, **options, several=group)
        logits, arrays = model.score(token_ids, taps=True) if taps else (model.score(token_ids), {})
        if not process_id:
            write_npz(out, {"logits": logits, **arrays})


def read_ids(file: Path, vocab_size: Any = None) -> list[int]:
    """A non-empty JSON list of ids in [0, vocab_size); CliError names the first entry that is not."""
    value = common.read_json(file, "a list of token ids such as [1, 2, 3]")
    if not isinstance(value, list) or not value:
        raise common.CliError(f"{file}: must hold a non-empty JSON list of token ids")
    for position, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool):
            raise common.CliError(f"{file}: entry {position} is {token!r}, not an integer")
        if token < 0 or (isinstance(vocab_size, int) and token >= vocab_size):
            raise common.CliError(f"{file}: entry {position} is {token}, outside the vocabulary [0, {vocab_size})")
    return value


def write_npz(file: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays under exactly this file name, all or nothing; floating ones as float32, integer ones as int32."""
    import numpy as np

    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.resolve().parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, allow_pickle=False, **{name: _plain(np.asarray(value)) for name, value in arrays.items()})
        # mkstemp makes private files; a result file gets the usual mode.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _plain(array: np.ndarray) -> np.ndarray:
    """npz keeps no bfloat16: kind "V" or "f" of any width becomes float32."""
    return array.astype("int32" if array.dtype.kind in "iub" else "float32", copy=False)
