"""Checkpoint -> device arrays in their final layout, tensor by tensor.

Each stacked array is allocated once on the device and filled in place, so the device holds no second copy and the host no more
than what is on its way: the tensors are visited in the order of the files, and a file's mapping is dropped when its last tensor
is through. Threads read ahead, because a page that is touched first costs more than its copy. On several devices each gets its own
slices of a tensor, straight from the mapping, and nothing else of it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from glm52_jax.checkpoint import Checkpoint, CheckpointError
from glm52_jax.claims import FP8, SCALE_SUFFIX, Expected, check_claims, check_scales, scale_shape
from glm52_jax.config import SHARED, Config
from glm52_jax.layout import split_kv_b
from glm52_jax.parallel import check_split, partition
from glm52_jax.plan import Parallel
from glm52_jax.shares import Part, Shares, update
from glm52_jax.weights import Leaf, Source, Weights, mtp_prefix, weight_leaves
from pallas_kernels.blocks import BlockScaled, dequantize

type Progress = Callable[[int, int, str], None]
type Storage = Literal["checkpoint", "bfloat16", "float32"]

_FLOATS = ("BF16", "F32")
# Tensors, and bytes, that are read ahead, by a thread each, and that the devices may still be placing.
_AHEAD, _IN_FLIGHT = 4, 1 << 28


@dataclasses.dataclass
class _Target:
    """A leaf with its device arrays: ``data``, and ``scale`` when the leaf stays FP8."""

    leaf: Leaf
    data: jax.Array
    scale: jax.Array | None


def load_weights(
    checkpoint: Checkpoint,
    config: Config,
    *,
    dtype: str = "bfloat16",
    weights: Storage = "checkpoint",
    progress: Progress | None = None,
    parallel: Parallel | None = None,
) -> Weights:
    """Loads every weight of the model onto the default device, or each device's slices onto those of a mesh.

    Args:
      checkpoint: an open checkpoint; all headers are checked before anything is allocated.
      config: the model.
      dtype: the activations' dtype, "bfloat16" or "float32"; W_UK and W_UV of an FP8 checkpoint take it.
      weights: "checkpoint" keeps each tensor as stored, FP8 blocks included; "bfloat16" and "float32" convert (router weights are
        never narrowed, the router bias is float32).
      progress: called as progress(bytes done, bytes in total, tensor name).
      parallel: how several devices share the model.

    Warns:
      UserWarning, once, when the checkpoint holds indexer tensors of shared layers, which are skipped.

    Raises:
      CheckpointError: a missing, unexpected, wrongly shaped or wrongly typed tensor; scales that are not finite; a leaf stored
        partly as FP8.
      ValueError: a size that does not split over the devices.
    """
    mtp = holds_mtp(checkpoint, config)
    tree = weight_leaves(config, mtp)
    named, structure = jax.tree.flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Leaf))
    leaves = [leaf for _, leaf in named]
    _check_scales(checkpoint, _check(checkpoint, config, leaves))
    if weights == "checkpoint":
        _refuse_mixed_storage(checkpoint, leaves)
    if parallel is not None:
        names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in named}
        check_split(
            names, frozenset(name for name, leaf in names.items() if FP8 in _stored(checkpoint, leaf)), parallel
        )
    targets = [_allocate(checkpoint, leaf, dtype, weights, parallel) for leaf in leaves]
    _stream(checkpoint, targets, progress, _Placer(config, parallel))
    arrays = [t.data if t.scale is None else BlockScaled(t.data, t.scale) for t in targets]
    return jax.tree.unflatten(structure, arrays)


def holds_mtp(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether the checkpoint has the MTP layer's tensors; many copies announce the layer in their config and lack it."""
    prefix = mtp_prefix(config)
    return config.num_nextn_predict_layers > 0 and any(name.startswith(prefix) for name in checkpoint.tensors)


def _check(checkpoint: Checkpoint, config: Config, leaves: list[Leaf]) -> list[str]:
    """Compares the headers with what the leaves want; returns the claimed tensors."""
    expected: dict[str, Expected] = {}
    for leaf in leaves:
        linear = leaf.kind in ("linear", "w_uk", "w_uv")
        for source in leaf.sources:
            # kv_b alone has two homes, W_UK and W_UV.
            if source.tensor in expected and leaf.kind != "w_uv":
                raise AssertionError(f"tensor {source.tensor} is claimed twice")
            expected[source.tensor] = Expected(source.shape, _FLOATS, block_scaled_allowed=linear)
    shared = tuple(
        f"model.layers.{i}.self_attn.indexer." for i, kind in enumerate(config.indexer_types) if kind == SHARED
    )
    # Some re-quantized uploads keep indexer tensors on layers that have none.
    skipped = [name for name in checkpoint.tensors if name.startswith(shared)] if shared else []
    claimed = check_claims(checkpoint, expected, ignore=frozenset(skipped).__contains__)
    if skipped:
        message = f"skipped {len(skipped)} indexer tensors of shared layers, which run no indexer (first: {skipped[0]})"
        warnings.warn(message, stacklevel=4)
    return claimed


def _check_scales(checkpoint: Checkpoint, claimed: list[str]) -> None:
    """Reads every block scale (0.2 GB of the real 755): a bad one must not show after an hour of loading."""

    def file_of(name: str) -> Path:
        return checkpoint.tensors[name].file

    names = [name for name in claimed if name.endswith(SCALE_SUFFIX)]
    for file, group in groupby(sorted(names, key=file_of), file_of):
        for name in group:
            check_scales(name, checkpoint.read(name), file)
        checkpoint.release(file)


def _refuse_mixed_storage(checkpoint: Checkpoint, leaves: list[Leaf]) -> None:
    for leaf in leaves:
        stored = {checkpoint.tensors[s.tensor].dtype: s.tensor for s in leaf.sources}
        if len(stored) > 1 and FP8 in stored:
            listed = ", ".join(f"{name} is {kind}" for kind, name in stored.items())
            raise CheckpointError(
                f"mixed storage: {listed}. One kind of weight must be FP8 in all layers or in none; weights='bfloat16' "
                "dequantizes everything"
            )


def _stored(checkpoint: Checkpoint, leaf: Leaf) -> set[str]:
    return {checkpoint.tensors[source.tensor].dtype for source in leaf.sources}


def _allocate(checkpoint: Checkpoint, leaf: Leaf, dtype: str, weights: Storage, parallel: Parallel | None) -> _Target:
    stored = _stored(checkpoint, leaf)
    where = None if parallel is None else NamedSharding(parallel.mesh, partition(leaf.axes, parallel))
    if FP8 in stored and weights == "checkpoint" and leaf.kind == "linear":
        scale = jnp.zeros((*leaf.shape[:-2], *scale_shape(leaf.shape[-2:])), jnp.float32, device=where)
        return _Target(leaf, jnp.zeros(leaf.shape, jnp.float8_e4m3fn, device=where), scale)
    return _Target(leaf, jnp.zeros(leaf.shape, _dtype(leaf, stored, dtype, weights), device=where), None)


def _dtype(leaf: Leaf, stored: set[str], dtype: str, weights: Storage) -> jnp.dtype:
    """Dtype of a leaf that is not kept as FP8."""
    widest = "float32" if "F32" in stored else "bfloat16"
    if leaf.kind == "float32":
        return jnp.dtype("float32")
    if leaf.kind == "exact":
        return jnp.dtype("float32" if weights == "float32" else widest)
    if weights != "checkpoint":
        return jnp.dtype(weights)
    return jnp.dtype(dtype if FP8 in stored else widest)


def _stream(checkpoint: Checkpoint, targets: list[_Target], progress: Progress | None, placer: _Placer) -> None:
    def file_of(task: tuple[_Target, Source]) -> Path:
        return checkpoint.tensors[task[1].tensor].file

    def position(task: tuple[_Target, Source]) -> tuple[Path, int]:
        return file_of(task), checkpoint.tensors[task[1].tensor].begin

    tasks = sorted(((target, source) for target in targets for source in target.leaf.sources), key=position)
    total = sum(_nbytes(checkpoint, source) for _, source in tasks)
    done = placing = in_flight = 0
    with ThreadPoolExecutor(_AHEAD) as readers:
        for _, group in groupby(tasks, key=file_of):
            touched: set[Path] = set()
            for target, source, staged in _ahead(checkpoint, group, placer, readers):
                placer.put(target, source, staged)
                touched |= _files(checkpoint, source)
                size = _nbytes(checkpoint, source)
                done, placing, in_flight = done + size, placing + 1, in_flight + size
                if placing == _AHEAD or in_flight >= _IN_FLIGHT:
                    target.data.block_until_ready()
                    placing = in_flight = 0
                if progress is not None:
                    progress(done, total, source.tensor)
            # Scales may lie in other files: those are let go too, and mapped again when their turn comes.
            jax.block_until_ready([target.data for target in targets])
            for file in touched:
                checkpoint.release(file)


def _ahead(
    checkpoint: Checkpoint, tasks: Iterable[tuple[_Target, Source]], placer: _Placer, readers: ThreadPoolExecutor
) -> Iterator[tuple[_Target, Source, Any]]:
    """Tasks in their order, each with what ``placer.stage`` made of it while those before it were placed."""
    waiting: deque[tuple[_Target, Source, Future[Any]]] = deque()
    ahead = 0
    for target, source in tasks:
        waiting.append((target, source, readers.submit(placer.stage, checkpoint, target, source)))
        ahead += _nbytes(checkpoint, source)
        while ahead > _IN_FLIGHT or len(waiting) > _AHEAD:
            first, where, staged = waiting.popleft()
            ahead -= _nbytes(checkpoint, where)
            yield first, where, staged.result()
    for target, source, staged in waiting:
        yield target, source, staged.result()


def _files(checkpoint: Checkpoint, source: Source) -> set[Path]:
    names = (source.tensor, source.tensor + SCALE_SUFFIX)
    return {checkpoint.tensors[name].file for name in names if name in checkpoint.tensors}


def _nbytes(checkpoint: Checkpoint, source: Source) -> int:
    names = (source.tensor, source.tensor + SCALE_SUFFIX)
    return sum(checkpoint.tensors[name].nbytes for name in names if name in checkpoint.tensors)


class _Placer:
    """Puts checkpoint tensors where they belong in the stacks, on one device or on those that share the model."""

    def __init__(self, config: Config, parallel: Parallel | None) -> None:
        self._widths = (config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim)
        self._shares = None if parallel is None else Shares(parallel)

    def stage(self, checkpoint: Checkpoint, target: _Target, source: Source) -> Any:
        """Reads a tensor and sends it to its devices, for ``put``; may run in any thread."""
        value = checkpoint.read(source.tensor)
        scale = None
        if checkpoint.tensors[source.tensor].dtype == FP8:
            scale = checkpoint.read(source.tensor + SCALE_SUFFIX)
        leaf = target.leaf
        if self._shares is None:
            return jax.device_put((value, scale))
        scaled = target.scale is not None
        return self._shares.stage(leaf.shape, leaf.axes, source.index, value, scale, scaled, self._part(leaf))

    def put(self, target: _Target, source: Source, staged: Any) -> None:
        """Writes a staged tensor into its stack, in place."""
        if self._shares is not None:
            target.data, target.scale = self._shares.put((target.data, target.scale), staged)
            return
        (value, scale), start, part = staged, _start(target.data, source), self._part(target.leaf)
        if target.scale is not None:
            assert scale is not None
            target.data, target.scale = _place(target.data, start, value), _place(target.scale, start, scale)
        elif scale is None and part is None:
            target.data = _place(target.data, start, value)
        else:
            target.data = _place_converted(target.data, start, value, scale, part)

    def _part(self, leaf: Leaf) -> Part | None:
        return (leaf.kind, self._widths) if leaf.kind in ("w_uk", "w_uv") else None


def _start(buffer: jax.Array, source: Source) -> np.ndarray:
    return np.array((*source.index, *(0,) * (buffer.ndim - len(source.index))), np.int32)


@partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, start: jax.Array, value: jax.Array) -> jax.Array:
    """buffer[start] = value, in place."""
    return update(buffer, start, value)


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _place_converted(
    buffer: jax.Array, start: jax.Array, value: jax.Array, scale: jax.Array | None, part: Part | None
) -> jax.Array:
    """As ``_place``, after dequantizing FP8 blocks (by the tensor's own rows) and taking one half of kv_b."""
    if scale is not None:
        value = dequantize(BlockScaled(value, scale))
    if part is not None:
        kind, (heads, nope, v) = part
        w_uk, w_uv = split_kv_b(value, heads, nope, v)
        value = w_uk if kind == "w_uk" else w_uv
    return update(buffer, start, value)
