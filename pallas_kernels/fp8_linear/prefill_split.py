"""x to e4m3 by groups of 128 for the prefill kernel, in Pallas Mosaic GPU: one term (W8A8) or two (W8A16).

Written as the product reads it: [terms, padded rows, k], and the scales with the k-blocks outermost, so that a TMA copy fetches the
scales of one block of many rows. Rows beyond the last are zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptxas_version
from pallas_kernels.blocks import BLOCK, E4M3, E4M3_MAX

ptxas_version.install()

# [rows, 128] with a row in 16 lanes of 8 neighbouring elements: the maximum of a row stays in registers and shuffles.
_GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_ROWS = 32  # of a tile: 8 KB of x
_DEPTH = 4  # tiles of a block of threads, all in flight at once


@functools.lru_cache(maxsize=256)
def build(rows: int, padded_rows: int, k: int, terms: int, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(x bfloat16 [rows, k]) -> (values e4m3 [terms, padded_rows, k], scale float32 [k/128, padded_rows] of term 0)."""
    blocks = k // BLOCK
    depth = next(d for d in range(_DEPTH, 0, -1) if blocks % d == 0)

    def fp8_linear_split(x: Any, values: Any, scales: Any, tiles: Any, full: Any) -> None:
        row, first = lax.axis_index("rows") * _ROWS, lax.axis_index("blocks") * depth
        for d in range(depth):
            source = x.at[pl.ds(row, _ROWS), pl.ds((first + d) * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(source, tiles.at[d], full.at[d])
        for d in range(depth):
            plgpu.barrier_wait(full.at[d])
            tile = plgpu.load(tiles.at[d], layout=_GROUPS, optimized=False)
            parts, scale = _split(tile.astype(jnp.float32), terms)
            for t, part in enumerate(parts):
                values.at[t, pl.ds(row, _ROWS), pl.ds((first + d) * BLOCK, BLOCK)][...] = part
            scales.at[first + d, pl.ds(row, _ROWS)][...] = scale

    return plgpu.kernel(
        fp8_linear_split,
        out_type=[
            jax.ShapeDtypeStruct((terms, padded_rows, k), E4M3),
            jax.ShapeDtypeStruct((blocks, padded_rows), jnp.float32),
        ],
        grid=(padded_rows // _ROWS, blocks // depth),
        grid_names=("rows", "blocks"),
        scratch_types=(plgpu.SMEM((depth, _ROWS, BLOCK), jnp.bfloat16), plgpu.Barrier(num_barriers=depth)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )


def _split(v: jax.Array, terms: int) -> tuple[list[jax.Array], jax.Array]:
    """v [rows, 128] as scale * sum of terms[t] / 16^t, e4m3; the scale [rows] of term 0."""
    amax = jnp.max(jnp.abs(v), axis=1)
    if terms == 1:
        # As the reference: XLA turns its division by 448 into this product.
        scale = jnp.maximum(amax, 1e-10) * (1 / E4M3_MAX)
        q = v / _wide(scale, v)
    else:
        # A power of two, so that the split is exact; amax / scale is in (224, 448].
        bits = lax.bitcast_convert_type(jnp.maximum(amax, 2.0**-100) * (1 / E4M3_MAX), jnp.int32)
        bits = (bits + 0x7FFFFF) & 0x7F800000
        scale = lax.bitcast_convert_type(bits, jnp.float32)
        q = v * _wide(lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32), v)
    parts = []
    for t in range(terms):
        parts.append(q.astype(E4M3))
        if t + 1 < terms:
            q = (q - parts[-1].astype(jnp.float32)) * 16.0
    return parts, scale


def _wide(scale: jax.Array, like: jax.Array) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(scale, like.shape, (0,)), _GROUPS)
