"""One safetensors file: its header, parsed and checked against the file's size. Needs numpy and ml_dtypes, not JAX.

The header is parsed here because the safetensors package has no numpy reader for F8_E4M3. A file is: 8 bytes, the
header's length as a little-endian u64; the header, one JSON object `name -> {dtype, shape, data_offsets}` with offsets
relative to the header's end; then the tensors' bytes, row-major, little-endian, without holes.
Source: the format section of the README of huggingface/safetensors.
"""

import json
import math
import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit on headers; used for the other JSON files too
MAX_RANK = 64  # numpy's
INT64_MAX = 2**63 - 1

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,  # the variant without infinities: bias 7, largest value 448
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}

_repr = reprlib.Repr(maxstring=200, maxother=80, maxlist=16, maxlong=60, maxlevel=4)


def show(value: object) -> str:
    """repr of a value that came from a file: bounded in length and depth, so that any input can be printed."""
    return _repr.repr(value)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the tensor where there is one, and the value."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    dtype is the safetensors name (a key of `DTYPES`); begin and end are byte offsets from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def regular_size(file: Path) -> int:
    """The length of a file in bytes. Links are followed: Hugging Face's cache is made of links to blobs."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is a link to a file that does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file} is not a regular file")
    return status.st_size


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} occurs twice in one object")
    return result


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object in UTF-8; CheckpointError, beginning with `what`, if it is none or repeats a key."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a key twice, integers of thousands of digits
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, not {show(value)}")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Parses a file of at most 100 MB that holds a JSON object; CheckpointError as in `parse_object`."""
    size = regular_size(file)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} has {size} bytes; at most {MAX_JSON_BYTES} are read")
    return parse_object(file.read_bytes(), str(file))


def read_file(file: Path) -> tuple[list[TensorInfo], int]:
    """All tensors of one safetensors file, in the header's order, and the file's size in bytes.

    Raises:
        CheckpointError: the header is malformed, or the tensors do not tile the file's data exactly.
    """
    size = regular_size(file)
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the data: run `git lfs pull`")
        if len(prefix) < 8:
            raise CheckpointError(f"{file} is no safetensors file: it has only {len(prefix)} bytes")
        length = int.from_bytes(prefix, "little")
        if length == 0 or length > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: header length {length} is not between 1 and {MAX_JSON_BYTES}")
        if length > size - 8:
            raise CheckpointError(
                f"{file} is truncated: its header should have {length} bytes, but only {size - 8} follow"
            )
        if (first := stream.read(1)) != b"{":  # before reading the rest: cheap refusal of any other kind of file
            raise CheckpointError(f"{file}: the header must begin with '{{', not {first!r}")
        raw = first + stream.read(length - 1)
    header = parse_object(raw, f"{file}: the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings, not {show(metadata)}")
    infos = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    _check_coverage(file, infos, 8 + length, size)
    return infos, size


def _tensor_info(file: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    where = f"{file}: tensor {show(name)}"
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        raise CheckpointError(f"{where}: the name holds a lone surrogate")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets, not {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {show(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape must be at most {MAX_RANK} integers in [0, 2^63), not {show(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be two integers 0 <= begin <= end, not {show(offsets)}")
    itemsize = DTYPES[dtype].itemsize
    if math.prod(n for n in shape if n) * itemsize > INT64_MAX:  # numpy refuses this of an empty array too
        raise CheckpointError(f"{where}: shape {show(shape)} overflows 64-bit sizes")
    nbytes, span = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    if nbytes != span:
        sizes = f"{dtype} {show(shape)} takes {nbytes} bytes, data_offsets {offsets} span {span}"
        raise CheckpointError(f"{where}: {sizes}")
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + offsets[0], data_begin + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= INT64_MAX for n in value)  # bool is not a size


def _check_coverage(file: Path, infos: list[TensorInfo], data_begin: int, size: int) -> None:
    """The tensors must tile the data from the header's end to the end of the file."""
    position, before = data_begin, None
    ordered = sorted(infos, key=lambda info: (info.begin, info.end))
    for info in ordered:
        if before is not None and info.begin < position:
            overlap = f"overlaps tensor {show(before.name)} at bytes [{before.begin}, {before.end})"
            raise CheckpointError(f"{file}: tensor {show(info.name)} at bytes [{info.begin}, {info.end}) {overlap}")
        if info.begin > position:
            hole = f"{info.begin - position} bytes before it, from byte {position}, belong to no tensor"
            raise CheckpointError(f"{file}: tensor {show(info.name)}: {hole}")
        position, before = info.end, info
    if position > size:
        cut = next(info for info in ordered if info.end > size)
        missing = f"ends at byte {cut.end}, the file at {size}: {position - size} bytes are missing"
        raise CheckpointError(f"{file} is truncated: tensor {show(cut.name)} {missing}; download it again")
    if position < size:
        raise CheckpointError(f"{file}: {size - position} bytes at the end, from byte {position}, belong to no tensor")
