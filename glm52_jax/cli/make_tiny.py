"""``glm52 make-tiny``: a small random checkpoint in the official format; and the cached one of ``generate --tiny``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from glm52_jax.cli.common import CliError, note
from glm52_jax.compile_cache import cache_root

StoredWeights = Literal["bfloat16", "float32", "fp8"]
# What a checkpoint directory of ours may hold; --force removes these and nothing else.
_OUR_FILES = (
    "*.safetensors",
    "*.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def make_tiny(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to write; must be new or empty.")],
    weights: Annotated[
        StoredWeights | None, typer.Option("--weights", help="Storage; default bfloat16, fp8 if kernel-sized.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Number of decoder layers.")] = None,
    kernel_sized: Annotated[
        bool, typer.Option("--kernel-sized", help="The real latent, rope and head sizes, as GPU kernels need.")
    ] = False,
    mtp: Annotated[bool, typer.Option("--mtp", help="With the multi-token-prediction layer.")] = False,
    shards: Annotated[int, typer.Option("--shards", min=1, max=500, help="Number of safetensors files.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint in a non-empty directory.")] = False,
) -> None:
    """Write a tiny random checkpoint (config, safetensors, tokenizer, chat template) in the official format."""
    _prepare(directory, force)
    stored: StoredWeights = weights or ("fp8" if kernel_sized else "bfloat16")
    write_tiny(directory, tiny_config(layers, kernel_sized, mtp), weights=stored, seed=seed, shards=shards, mtp=mtp)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    note(f"wrote {directory}: {stored}, {size:,} bytes of weights (random: it generates noise)")


def tiny_config(layers: int | None = None, kernel_sized: bool = False, mtp: bool = False) -> dict[str, Any]:
    """config.json of a tiny model whose stop ids are those of the tiny tokenizer."""
    from glm52_jax import tiny
    from glm52_jax.tiny_tokenizer import tiny_eos_ids

    overrides: dict[str, Any] = dict(tiny.KERNEL_TINY) if kernel_sized else {}
    if layers is not None:
        overrides["num_hidden_layers"] = layers
    vocab_size = overrides.get("vocab_size") or tiny.tiny_config()["vocab_size"]
    eos = tiny_eos_ids(vocab_size)
    overrides |= {"eos_token_id": eos, "pad_token_id": eos[0] if eos else None, "num_nextn_predict_layers": int(mtp)}
    return tiny.tiny_config(**overrides)


def write_tiny(directory: Path, config: dict[str, Any], **options: Any) -> None:
    """Checkpoint and tokenizer; ``options`` are those of ``tiny.write_checkpoint``."""
    from glm52_jax.tiny import write_checkpoint
    from glm52_jax.tiny_tokenizer import write_tokenizer

    write_checkpoint(directory, config, **options)
    write_tokenizer(directory, config["vocab_size"])


def cached_tiny() -> Path:
    """The tiny checkpoint in the user's cache, made on first use. Its name holds a digest of what it is made from.

    Written beside its place and renamed, so that an interrupted or a concurrent run leaves no half a checkpoint.
    """
    config = tiny_config()
    root = cache_root()
    final = root / f"tiny-{_content_key(config)}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tiny-", dir=root))
    try:
        write_tiny(temporary, config)
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.is_dir():
                raise
            # Another process was first, with the same content.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _content_key(config: dict[str, Any]) -> str:
    """Digest of the config and of the code that turns it into files."""
    from glm52_jax import tiny, tiny_tokenizer

    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for module in (tiny, tiny_tokenizer):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


def _prepare(directory: Path, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise CliError(f"{directory} is a file: give a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not force:
            raise CliError(
                f"{directory} is not empty: give a new directory, or --force to replace the checkpoint in it"
            )
        for pattern in _OUR_FILES:
            for file in directory.glob(pattern):
                file.unlink()
