"""Filling stacks that several devices share: every device gets its own slice of a tensor from the host, and nothing else of it.

One program places a tensor on all devices. Where a stack is split along its experts, a tensor belongs to one device, and the others
take part in the program without changing anything.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm52_jax.layout import split_kv_b
from glm52_jax.parallel import partition, spread
from glm52_jax.plan import Parallel
from pallas_kernels.blocks import BLOCK

# Which half of kv_b, and (heads, nope, v).
type Part = tuple[str, tuple[int, int, int]]
# Values, and scales where they stay FP8 blocks.
type Stack = tuple[jax.Array, jax.Array | None]


def update(buffer: jax.Array, start: jax.Array, value: jax.Array, here: jax.Array | None = None) -> jax.Array:
    """buffer[start] = value, in place where buffer is donated; where ``here`` is given and false, buffer as it is."""
    block = value.reshape((1,) * (buffer.ndim - value.ndim) + value.shape).astype(buffer.dtype)
    raw = buffer
    if buffer.dtype == jnp.float8_e4m3fn:
        # As bytes: XLA's CPU backend widens an FP8 update, and with it the whole buffer, every time.
        raw, block = (jax.lax.bitcast_convert_type(a, jnp.uint8) for a in (buffer, block))
    if here is not None:
        # Neither a conditional around the update nor one program for the selection and it: both copy the stack.
        block = jnp.where(here, block, jax.lax.dynamic_slice(raw, tuple(start), block.shape))
        block = jax.lax.optimization_barrier(block)
    raw = jax.lax.dynamic_update_slice(raw, block, tuple(start))
    return raw if raw.dtype == buffer.dtype else jax.lax.bitcast_convert_type(raw, buffer.dtype)


def contiguous(view: np.ndarray) -> np.ndarray:
    """The view itself where its rows follow each other, else a copy, made as integers: numpy lets other threads run then."""
    if view.flags.c_contiguous:
        return view
    return np.ascontiguousarray(view.view(f"u{view.itemsize}")).view(view.dtype)


@dataclasses.dataclass(frozen=True)
class _How:
    """How a tensor goes to the devices.

    stack, tensor: PartitionSpecs of the stack and of the tensor, whose slices the devices get. owned: one device gets all of it
    instead, because the stack is split along its experts. part: the half of kv_b to take.
    """

    parallel: Parallel
    stack: PartitionSpec
    tensor: PartitionSpec
    owned: bool
    part: Part | None


@dataclasses.dataclass(frozen=True)
class Staged:
    """A tensor on the devices, each with its part, and where it goes."""

    start: np.ndarray
    value: jax.Array
    scale: jax.Array | None
    how: _How


class Shares:
    """Places tensors on the devices of one mesh."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        # What devices pass where a tensor is not theirs; goes with this object.
        self._nothing: dict[Any, jax.Array] = {}

    def stage(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        index: tuple[int, ...],
        value: np.ndarray,
        scale: np.ndarray | None,
        scaled: bool,
        part: Part | None,
    ) -> Staged:
        """Sends a tensor on its way to the devices, for ``put``; may run in any thread.

        shape, axes: of the stack, with logical axes, of which value has those after ``index`` (kv_b: heads, latent). scaled: the
        stack keeps scales, else value is dequantized by them. part: the half of kv_b to take.
        """
        parallel = self._parallel
        spec = partition(axes, parallel)
        own = (axes[1], axes[3]) if part is not None else axes[len(index) :]
        how = _How(parallel, spec, partition(own, parallel), parallel.axis in spec[: len(index)], part)
        start = np.array((*index, *(0,) * (len(shape) - len(index))), np.int32)
        if how.owned:
            owner = index[_EXPERTS] * parallel.devices // shape[_EXPERTS]
            blocks = None if scale is None else self._only(scale, owner)
            return Staged(start, self._only(value, owner), blocks, how)
        sliced = how.tensor if scaled else PartitionSpec()
        blocks = None if scale is None else self._slices(scale, sliced)
        return Staged(start, self._slices(value, how.tensor), blocks, how)

    @staticmethod
    def put(stack: Stack, staged: Staged) -> Stack:
        """stack, donated, with the tensor in its place."""
        return _place_shared(stack, staged.start, staged.value, staged.scale, staged.how)

    def _slices(self, value: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """Each device's slice of the tensor."""
        sharding = NamedSharding(self._parallel.mesh, spec)
        return jax.make_array_from_callback(value.shape, sharding, lambda where: contiguous(value[where]))

    def _only(self, value: np.ndarray, owner: int) -> jax.Array:
        """[devices, *shape]: the tensor on its owner, something of that shape that is always there on the others."""
        mesh, parts = self._parallel.mesh, []
        for i, device in enumerate(mesh.devices.flat):
            if device.process_index != jax.process_index():
                continue
            if i == owner:
                parts.append(jax.device_put(value[None], device))
                continue
            key = (i, value.shape, value.dtype)
            if key not in self._nothing:
                self._nothing[key] = jax.device_put(np.zeros((1, *value.shape), value.dtype), device)
            parts.append(self._nothing[key])
        sharding = NamedSharding(mesh, PartitionSpec(self._parallel.axis))
        return jax.make_array_from_single_device_arrays((mesh.size, *value.shape), sharding, parts)


# Position of the experts in the stacks of experts, after the layers.
_EXPERTS = 1


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _place_shared(stack: Stack, start: jax.Array, value: jax.Array, scale: jax.Array | None, how: _How) -> Stack:
    """``update`` on every device; start: in the whole stack; value and scale: [devices, ...] if owned."""
    parallel, axis = how.parallel, how.parallel.axis

    def fill(stack: Stack, start: jax.Array, value: jax.Array, scale: jax.Array | None) -> Stack:
        (data, scales), device, here = stack, jax.lax.axis_index(axis), None
        if how.owned:
            value, scale = jax.tree.map(lambda a: a[0], (value, scale))
            expert = start[_EXPERTS] - device * data.shape[_EXPERTS]
            here = (expert >= 0) & (expert < data.shape[_EXPERTS])
            start = start.at[_EXPERTS].set(jnp.where(here, expert, 0))
        if scales is not None and scale is not None:
            return update(data, start, value, here), update(scales, start, scale, here)
        if scale is not None:
            sliced = zip(how.tensor, value.shape, strict=True)
            value = _dequantize(value, scale, [device * size if name == axis else 0 for name, size in sliced])
        if how.part is not None:
            kind, (heads, nope, v) = how.part
            w_uk, w_uv = split_kv_b(value, heads // (parallel.devices if axis in how.tensor else 1), nope, v)
            value = w_uk if kind == "w_uk" else w_uv
        return update(data, start, value, here), None

    values = PartitionSpec(axis) if how.owned else how.tensor
    scales = values if how.owned or stack[1] is not None else PartitionSpec()
    return spread(fill, parallel, (how.stack, PartitionSpec(), values, scales), how.stack)(stack, start, value, scale)


def _dequantize(value: jax.Array, scale: jax.Array, first: list[int | jax.Array]) -> jax.Array:
    """float32 of an FP8 slice that begins at ``first`` of a tensor with these scales; its ends may lie inside blocks."""
    rows, columns = ((begin + jnp.arange(n)) // BLOCK for begin, n in zip(first, value.shape, strict=True))
    return value.astype(jnp.float32) * scale[rows][:, columns]
