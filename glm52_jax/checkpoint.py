"""A safetensors checkpoint directory, read as memory-mapped arrays. Needs numpy and ml_dtypes, not JAX.

Every check runs in `Checkpoint.open`, on headers and file sizes only: no tensor byte is touched before `read`.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from glm52_jax.safetensors_file import DTYPES, CheckpointError, TensorInfo, read_file, read_json, show

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo"]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory that holds config.json and safetensors files, with or without an index.

    Attributes:
        path: the directory.
        config: config.json, parsed.
        tensors: every tensor of every file, by name.
        files: the safetensors files in use, sorted.
        ignored_files: safetensors files of the directory that are not in use: hidden, or not named by the index.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        sizes: dict[Path, int],
        ignored: list[Path],
    ) -> None:
        """Takes what `open` has checked; sizes is the length in bytes of each file in use."""
        self.path, self.config, self.tensors = path, config, tensors
        self.files, self.ignored_files = list(sizes), ignored
        self._sizes = sizes
        self._mappings: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Checkpoint":
        """Reads config.json, the index and all headers, and checks them against each other and the files' sizes.

        Raises:
            CheckpointError: anything missing, malformed, truncated, overlapping, duplicate or outside the directory.
        """
        try:
            return cls._open(Path(path))
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error

    @classmethod
    def _open(cls, path: Path) -> "Checkpoint":
        if not os.path.isdir(path):
            if os.path.exists(path):
                raise CheckpointError(f"{path} is a file: give the directory that holds {CONFIG_NAME}")
            raise CheckpointError(f"{path} does not exist")
        listing = sorted(os.listdir(path))
        if CONFIG_NAME not in listing:
            raise CheckpointError(f"{path} has no {CONFIG_NAME}: it is not a Hugging Face checkpoint directory")
        config = read_json(path / CONFIG_NAME)
        weight_map = _read_weight_map(path / INDEX_NAME, listing) if INDEX_NAME in listing else None
        present = [name for name in listing if name.endswith(".safetensors")]
        visible = [name for name in present if not name.startswith(".")]
        used = visible if weight_map is None else sorted(set(weight_map.values()))
        if not used:
            raise CheckpointError(f"{path} has no *.safetensors file")
        tensors: dict[str, TensorInfo] = {}
        sizes: dict[Path, int] = {}
        for file in (path / name for name in used):
            infos, sizes[file] = read_file(file)
            for info in infos:
                if (other := tensors.setdefault(info.name, info)) is not info:
                    raise CheckpointError(f"tensor {show(info.name)} is in two files: {other.file} and {file}")
        if weight_map is not None:
            _check_index(path / INDEX_NAME, weight_map, tensors)
        return cls(path, config, tensors, sizes, [path / name for name in present if name not in used])

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file, in its stored dtype and shape; nothing is copied.

        The view keeps the mapping alive after `release` and `close`. It is unaligned (`flags.aligned` False) if the
        file places the tensor so.

        Raises:
            CheckpointError: no such tensor, the file changed or vanished since `open`, or the checkpoint is closed.
        """
        if self._closed:
            raise CheckpointError(f"{self.path} is closed: tensor {show(name)} cannot be read")
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {show(name)}")
        dtype = DTYPES[info.dtype]
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._mapping(info.file), dtype, count, info.begin).reshape(info.shape)

    def release(self, file: Path) -> None:
        """Lets go of a file's mapping and of its resident pages; the next `read` maps it again.

        Views that are still held stay valid: their pages come back from the file when touched, and the address range
        goes with the last view.
        """
        if file not in self._sizes:
            raise CheckpointError(f"{file} is not a file of {self.path}")
        with self._lock:
            mapping = self._mappings.pop(file, None)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)  # shared and read-only: drops pages, never data

    def close(self) -> None:
        """Releases every file; `read` is refused from here on. Views that are still held stay valid."""
        self._closed = True
        for file in self.files:
            self.release(file)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of tensor data for each dtype name, sorted by name."""
        totals: dict[str, int] = {}
        for info in self.tensors.values():
            totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
        return dict(sorted(totals.items()))

    def _mapping(self, file: Path) -> mmap.mmap:
        with self._lock:
            mapping = self._mappings.get(file)
            if mapping is None:
                mapping = self._mappings[file] = _map(file, self._sizes[file])
            return mapping


def _map(file: Path, expected_size: int) -> mmap.mmap:
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected_size:  # reading past the end of a mapped file would kill the process
                raise CheckpointError(f"{file} changed since it was opened: {expected_size} bytes then, {size} now")
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot map {file}: {error.strerror or error}") from error
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        mapping.madvise(mmap.MADV_SEQUENTIAL)  # tensors are read whole: read far ahead
    return mapping


def _read_weight_map(file: Path, listing: Iterable[str]) -> dict[str, str]:
    """The index's tensor -> file name map. Only names in the directory's listing pass, so none can lead out of it."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{file}: weight_map must be an object {{tensor: file name}}, not {show(weight_map)}")
    if not weight_map:
        raise CheckpointError(f"{file}: weight_map is empty")
    present = set(listing)
    for name, target in weight_map.items():
        tensor = f"{file}: tensor {show(name)}"
        if not isinstance(target, str):
            raise CheckpointError(f"{tensor} must map to a file name, not {show(target)}")
        if "/" in target or "\\" in target or target in ("", ".", ".."):
            raise CheckpointError(f"{tensor} maps to {show(target)}: only names of files beside the index are allowed")
        if target not in present:
            raise CheckpointError(f"{tensor} maps to {show(target)}, which is not in the directory: download that file")
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, target in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {show(name)} is not in {target}, to which the index maps it")
        if tensors[name].file.name != target:
            raise CheckpointError(f"{index}: tensor {show(name)} maps to {target} but is in {tensors[name].file}")
    unnamed = [info for info in tensors.values() if info.name not in weight_map]
    if unnamed:
        count = f"{len(unnamed)} tensors, the first of them " if len(unnamed) > 1 else "tensor "
        raise CheckpointError(f"{index}: does not name {count}{show(unnamed[0].name)} in {unnamed[0].file}")
