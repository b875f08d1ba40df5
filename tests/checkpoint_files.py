"""Builds safetensors files and checkpoint directories, right and wrong, for the tests of the reader."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from glm52_jax.checkpoint import Checkpoint, CheckpointError
from glm52_jax.safetensors_file import DTYPES

FUZZ = settings(max_examples=80)  # the rest, the fixed seed among it, comes from the profile that conftest.py loads

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file's bytes; header is JSON text as bytes, or an object; length overrides the length field."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write(directory: Path, **files: bytes) -> Path:
    """config.json and files named by keyword: `model` -> model.safetensors, `a` -> a.safetensors."""
    (directory / "config.json").write_text("{}")
    for stem, content in files.items():
        (directory / f"{stem}.safetensors").write_bytes(content)
    return directory


def one(directory: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    return write(directory, model=pack(header, data, length))


def sharded(directory: Path, weight_map: Any) -> Path:
    """Shards a (tensor A) and b (tensor B) with an index."""
    tail = {**B, "data_offsets": [0, 8]}
    write(directory, a=pack({"A": A}, bytes(24)), b=pack({"B": tail}, bytes(8)))
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return directory


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


# For hypothesis


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    raw: bytes


Tensors = dict[str, Stored]


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES), min_size: int = 1, bytes_min: int = 0) -> Tensors:
    """Named tensors in the order in which they are stored; bytes_min is the least size of each in bytes."""
    names = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")
    result = {}
    for name in draw(st.lists(names, min_size=min_size, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(dtypes))
        shape = tuple(draw(st.lists(st.integers(1 if bytes_min else 0, 4), max_size=3)))
        size = math.prod(shape) * DTYPES[dtype].itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        result[name] = Stored(dtype, shape, bytes(b & 1 for b in raw) if dtype == "BOOL" else raw)
    return result


def header_of(content: Tensors) -> dict[str, dict[str, Any]]:
    header, offset = {}, 0
    for name, (dtype, shape, raw) in content.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    return header


def pack_tensors(header: Any, content: Tensors, pad: int = 0) -> bytes:
    """A file with the tensors' data under any header, padded with spaces."""
    raw = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return pack(raw + b" " * pad, b"".join(tensor.raw for tensor in content.values()))


@contextmanager
def directory(**files: bytes) -> Iterator[Path]:
    """A checkpoint directory with `<keyword>.safetensors` files."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "config.json").write_text("{}")
        for stem, content in files.items():
            (path / f"{stem}.safetensors").write_bytes(content)
        yield path
