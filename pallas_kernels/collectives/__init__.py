"""Collectives over one axis of a device mesh, called inside ``jax.shard_map``.

Every sum and exchange between the devices of a model goes through this folder. ``axis`` is the name of the mesh axis; every device
of it makes the same calls in the same order, with operands of the same shape. The kernels serve where a workspace is open
(``workspace.bound``), XLA's collectives everywhere else.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import (
    ADD_NORM,
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    Form,
    Message,
)
from pallas_kernels.registry import Backend, Module, always

# NVLink multicast stays off. NCCL and NVSHMEM read these when they first connect devices, long after this module is imported.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")


def all_reduce(x: jax.Array, axis: str, *, backend: str | None = None) -> jax.Array:
    """Sum over the devices, on every device.

    Computes: sum_d x_d.
    Inputs: x of any shape, float32 or bfloat16.
    Outputs: x's shape and dtype, the same bits on every device.
    Rounding points: summands are widened to float32 and added in it, in an order that depends on the number of devices but not on
      the device that asks; one rounding at the end.
    Refuses: nothing. Graph-safe: the kernels are, the reference is not (XLA's collectives split a CUDA graph).
    Bound: 12 KB a row at GLM's width: latency, not bytes.
    """
    return _call(ALL_REDUCE, axis, x, (), backend=backend)


def all_reduce_add_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    layer: int | jax.Array,
    eps: float,
    axis: str,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum over the devices, residual add and the RMSNorm that follows.

    Computes: h = residual + sum_d x_d; (h, weight[layer] * h / sqrt(mean(h^2) + eps)).
    Inputs: x, residual [rows, n] of one dtype, float32 or bfloat16, residual the same on every device; weight [layers, n]; layer:
      static or traced scalar; eps: static.
    Outputs: both [rows, n] in x's dtype, the same bits on every device.
    Rounding points: sum and residual in float32, h rounded once; the norm is taken of the rounded h in float32 and rounded once.
    Refuses: ValueError for a residual of another shape or dtype and for a weight that is not [layers, n].
    Source: spec section 5.
    """
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual {residual.shape} {residual.dtype} must match x {x.shape} {x.dtype}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight of shape {weight.shape} must be [layers, {x.shape[-1]}]")
    return _call(ADD_NORM, axis, x, (residual, weight, jnp.asarray(layer, jnp.int32)), eps=float(eps), backend=backend)


def all_gather(x: jax.Array, axis: str, dim: int = 0, *, backend: str | None = None) -> jax.Array:
    """Every device's x, joined along ``dim`` in the order of the axis, on every device.

    Inputs: x of any shape and dtype; dim: static, may be negative. Outputs: x's shape with ``dim`` times the number of devices.
    Rounding points: none, bits are copied.
    """
    return _call(ALL_GATHER, axis, x, (), dim=dim % x.ndim, backend=backend)


def reduce_scatter(x: jax.Array, axis: str, dim: int = 0, *, backend: str | None = None) -> jax.Array:
    """Sum over the devices, of which each device keeps its own part along ``dim``.

    Inputs: x, float32 or bfloat16; dim: static. Outputs: x's shape with ``dim`` divided by the number of devices.
    Rounding points: as ``all_reduce``.
    Refuses: ValueError where ``dim`` does not divide by the number of devices.
    """
    return _call(REDUCE_SCATTER, axis, x, (), dim=dim % x.ndim, backend=backend)


def all_to_all(x: jax.Array, axis: str, split: int, into: int, *, backend: str | None = None) -> jax.Array:
    """Part d of x along ``split`` goes to device d, which joins what it gets along ``into`` in the order of the senders.

    Inputs: x of any shape and dtype; split, into: static dimensions. Outputs: x's shape with ``split`` divided by the number of
      devices and ``into`` times it.
    Rounding points: none, bits are copied.
    Refuses: ValueError where ``split`` does not divide by the number of devices.
    """
    return _call(ALL_TO_ALL, axis, x, (), dim=split % x.ndim, into=into % x.ndim, backend=backend)


def rank(axis: str) -> jax.Array:
    """This device's number along the axis, int32 scalar: ``lax.axis_index``, or what the open workspace holds, which is data.

    Graph-safe: with a workspace; XLA's own number is an operation that splits a CUDA graph.
    """
    if not workspace.opened():
        return jax.lax.axis_index(axis)
    return workspace.current().workspace.table[0, -1, 0].astype(jnp.int32)


def _call(form: Form, axis: str, x: jax.Array, more: tuple[Any, ...], *, backend: str | None, **fields: Any) -> Any:
    fields["peers"] = workspace.opened()
    spec = Message(form, x.shape, x.dtype.name, jax.lax.axis_size(axis), **fields)
    if form in (REDUCE_SCATTER, ALL_TO_ALL) and x.shape[spec.dim] % spec.devices:
        raise ValueError(f"{form} of {x.shape}: dimension {spec.dim} must divide by {spec.devices} devices")
    return registry.call("collectives", BACKENDS, spec, (axis, x, *more), forced=backend)


BACKENDS = (
    Backend("triton", workspace.supports, Module("pallas_kernels.collectives.triton")),
    Backend("reference", always, Module("pallas_kernels.collectives.reference")),
)
