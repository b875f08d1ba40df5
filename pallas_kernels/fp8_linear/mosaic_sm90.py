"""FP8 block-scaled linear layers for 1 to 64 rows on Hopper, in Pallas Mosaic GPU: launches and their buffers.

One block of threads owns 64 output rows (gate and up rows for SwiGLU) and all of k; where that makes few blocks, a cluster of them
shares k. What it does is in ``mosaic_tile_sm90``. Up to 8 rows it quantizes x by itself, and may norm it first (one row: of
x + delta). More rows come quantized from a launch before, because every block would repeat that work: in W8A16 from that of a norm
with a residual (``norm_quant.add_norm_split``), else from one of their own (``prefill_split``).

Up to 8 rows of what is short of time, not of bytes, have a kernel of another kind, ``mosaic_once_sm90``. A layer that is known
when a launch is traced is sliced from its stacks before it, which costs nothing (``layer_index``): no index has to be loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3, BlockScaled
from pallas_kernels.fp8_linear import mosaic_once_sm90, prefill_split
from pallas_kernels.fp8_linear.mosaic_launch_sm90 import launched
from pallas_kernels.fp8_linear.mosaic_tile_sm90 import Tile
from pallas_kernels.fp8_linear.norm import add_norm, add_norm_split, flat_layer
from pallas_kernels.fp8_linear.once_plan import OncePlan, once_plan_for
from pallas_kernels.fp8_linear.plan import TILE, Plan, plan_for
from pallas_kernels.fp8_linear.spec import Spec
from pallas_kernels.layer_index import layer_slice, scale_slice


def run(
    spec: Spec,
    x: jax.Array,
    weights: tuple[BlockScaled, ...],
    index: tuple[Any, ...],
    after: Any = None,
    norm: jax.Array | None = None,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Outputs [..., n] of every weight, as ``fp8_linear`` describes them; with a norm (total, normed, outputs ...).

    after: an array that must be ready before.
    """
    once = once_plan_for(spec)
    if once is not None:
        return launch(spec, once, x, weights, index, after, norm, delta)
    if norm is not None and plan_for(spec) is None:
        plain = dataclasses.replace(spec, norm="", delta=False, eps=0.0)
        plan = once_plan_for(plain) or plan_for(plain)
        assert plan is not None, plain
        if delta is None or not plan.ready or plan.terms == 1:
            total, normed = add_norm(x, delta, norm, index, spec.eps)
            return (total, normed, *launch(plain, plan, normed, weights, index, after))
        total, normed, *split = add_norm_split(x, delta, norm, index, spec.eps)
        return (total, normed, *launch(plain, plan, normed, weights, index, after, quantized=split))
    plan = plan_for(spec)
    assert plan is not None, spec
    return launch(spec, plan, x, weights, index, after, norm, delta)


def launch(
    spec: Spec,
    plan: Plan | OncePlan,
    x: jax.Array,
    weights: tuple[BlockScaled, ...],
    index: tuple[Any, ...],
    after: Any = None,
    norm: jax.Array | None = None,
    delta: jax.Array | None = None,
    quantized: Sequence[jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """``run`` with a plan that serves the spec. quantized: x as ``build`` takes it for a plan that is ready, if it is there."""
    stack = weights[0].data.shape[: len(index)]
    known = all(isinstance(i, int) for i in index)
    layer = flat_layer(stack, index)
    view = (spec.rows, plan.blocks, BLOCK)
    operands: list[Any] = [x.reshape(view)]
    if quantized is not None:
        operands = list(quantized)
    elif plan.ready:
        padded = -(-spec.rows // 32) * 32
        operands = list(prefill_split.build(spec.rows, padded, spec.k, plan.terms)(x.reshape(spec.rows, spec.k)))
    if norm is not None:
        norm = norm.reshape(-1, plan.blocks, BLOCK)
        operands.append(layer_slice(norm, layer) if known else norm)
        operands += [] if delta is None else [delta.reshape(view)]
    offsets = []
    for w, n in zip(weights, spec.ns, strict=True):
        data = w.data.reshape(-1, n, spec.k)
        scale, offset = _scales(plan, w.scale.reshape(-1), data.shape[0] // plan.mats, layer if known else None)
        operands += [layer_slice(data, layer, plan.mats) if known else data, scale]
        offsets.append(offset)
    if known:
        plan = dataclasses.replace(plan, offsets=tuple(offsets))
    else:
        operands.insert(0, jnp.asarray(layer, jnp.int32).reshape(1))
    # What has to be ready before is an operand that nobody reads.
    kernel = mosaic_once_sm90.build if isinstance(plan, OncePlan) else build
    outs = kernel(plan, jnp.dtype(spec.out_dtype).name)(*operands, operands[0] if after is None else after)
    rows, outs = outs[: plan.row_outputs], outs[plan.row_outputs :]
    results = tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)
    if norm is None:
        return results
    return (x if delta is None else rows[1].reshape(x.shape), rows[0].reshape(x.shape), *results)


def _scales(plan: Plan | OncePlan, flat: jax.Array, layers: int, layer: int | None) -> tuple[jax.Array, int]:
    """Scales in one row, as many at least as one copy takes, and where those of the layer start: all, and 0, for a traced layer."""
    size = flat.size // layers
    if layer is not None:
        part, offset = scale_slice(flat, size, layer, plan.scale_slots)
        if part.size >= plan.scale_slots:
            return part, offset
    return jnp.pad(flat, (0, max(0, plan.scale_slots - flat.size))), 0 if layer is None else layer * size


@functools.lru_cache(maxsize=256)
def build(plan: Plan, out_dtype: str, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """The kernel of a plan: call(layer [1], x, (norm, delta), (data [stack, n, k], scale [...]) per weight, after).

    With the plan's ``offsets`` there is no layer: norm, data and scale are of one, scale from that offset on.
    x, delta: bfloat16 [rows, blocks, 128]; norm [layers, blocks, 128]; a plan that is ready takes for x values e4m3
    [terms, padded rows, k] and scales float32 [blocks, padded rows]. Returns normed and total (of a plan with a norm and delta),
    then the outputs.
    """
    tiled = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    groups, stages, mats, buffers = plan.warpgroups, plan.stages, plan.mats, plan.buffers
    x_shape = (groups, plan.x_slots, plan.atoms, plan.columns, BLOCK)
    x8_shape = (plan.n, plan.unit * BLOCK) if plan.ready else (plan.atoms, plan.n, BLOCK)
    scratch = {
        "ring": plgpu.SMEM((groups, stages, mats, TILE, plan.step * BLOCK), E4M3, transforms=tiled),
        "scales": plgpu.SMEM((mats, plan.scale_slots), jnp.float32),
        "x8": plgpu.SMEM((groups, buffers, *x8_shape), E4M3, transforms=tiled),
        "factors": plgpu.SMEM((groups, buffers, plan.unit, plan.factor_slots), jnp.float32),
        "partial": plgpu.SMEM((groups, mats, TILE, plan.partial), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=mats, num_barriers=groups * stages),
        "x_full": plgpu.Barrier(num_arrivals=plan.x_arrivals, num_barriers=1 if plan.whole else groups * plan.x_slots),
        "scales_full": plgpu.Barrier(num_arrivals=mats),
        "done": plgpu.Barrier(num_arrivals=groups),
    }
    if not (plan.ready or plan.whole):
        scratch["xbuf"] = plgpu.SMEM(x_shape, jnp.bfloat16)
    if plan.delta:
        scratch["dbuf"] = plgpu.SMEM(x_shape, jnp.bfloat16)
    if plan.whole:
        scratch["rows"] = plgpu.SMEM((plan.units, plan.columns, plan.unit, BLOCK), jnp.bfloat16)
        scratch["nbuf"] = plgpu.SMEM((plan.blocks, BLOCK), jnp.dtype(plan.norm))
        scratch["norm_full"] = plgpu.Barrier()
        scratch["inverse"] = plgpu.SMEM((groups, plan.columns), jnp.float32)
        if groups > 1:
            scratch["squares"] = plgpu.SMEM((groups, plan.columns), jnp.float32)
            scratch["summed"] = plgpu.Barrier(num_arrivals=groups)
    elif plan.norm:
        scratch["nbuf"] = plgpu.SMEM((groups, plan.x_slots, plan.unit, BLOCK), jnp.dtype(plan.norm))
        scratch["zero"] = plgpu.SMEM((groups, plan.unit), jnp.int16)
        scratch["squares"] = plgpu.SMEM((groups, plan.unit), jnp.float32)
        scratch["summed"] = plgpu.Barrier(num_arrivals=groups)
        scratch["inverse"] = plgpu.SMEM((groups, plan.unit), jnp.float32)
    if plan.split > 1:
        # A row of 8 sums is 32 bytes: stores to another block's shared memory want a tiled and swizzled buffer.
        swizzled = (plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32))
        shape = (plan.split - 1, groups, mats, TILE, plan.width)
        scratch["sent"] = plgpu.SMEM(shape, jnp.float32, transforms=swizzled)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=(plan.split - 1) * groups * mats)
    return launched(plan, Tile, scratch, out_dtype, interpret)
