"""Index keys and queries in Triton, portable from SM80 to SM120.

Two launches around ``fp8_linear`` for wq_b. The first multiplies the hidden state with wk and weights_proj, each program a slice of
the hidden size, with bfloat16 products (exact for FP8 weights) and float32 sums. The second adds the slices in a fixed order,
norms, rotates, quantizes and writes the keys, and rotates and quantizes the queries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import fp8_linear
from pallas_kernels.blocks import BlockScaled, Weight
from pallas_kernels.e4m3_triton import from_e4m3, to_e4m3_bits
from pallas_kernels.index_keys.plan import Plan, plan_for
from pallas_kernels.index_keys.reference import LAYER_NORM_EPS
from pallas_kernels.index_keys.spec import QUERY, WRITE, Spec
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.paged import INDEX_SCALE_FLOOR, PAGE


@triton.jit
def project_kernel(
    x, wk, wk_scale, proj, layer, wk_layer, partial,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KEY_TILES: tl.constexpr, BLOCKS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Grid (splits, KEY_TILES tiles of wk then one of weights_proj, row blocks): BLOCKS blocks of 128 of the hidden size.

    partial [splits, rows, WIDTH]: keys, then head weights.
    """
    split, tile = tl.program_id(0), tl.program_id(1)
    row, lane = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, 128)
    live = row < ROWS
    which = layer_of(layer).to(tl.int64)
    rows = x + row[:, None] * HIDDEN + lane[None, :]
    out = partial + (split.to(tl.int64) * ROWS + row)[:, None] * WIDTH
    if tile < KEY_TILES:
        n = tile * BN + tl.arange(0, BN)
        columns = wk + (layer_of(wk_layer).to(tl.int64) * DIM + n)[:, None] * HIDDEN + lane[None, :]
        keys = tl.zeros([BM, BN], tl.float32)
        for block in range(split * BLOCKS, split * BLOCKS + BLOCKS):
            a = tl.load(rows + block * 128, mask=live[:, None], other=0.0)
            b = tl.load(columns + block * 128)
            if FP8:
                scale = tl.load(wk_scale + which * (HIDDEN // 128) + block)
                keys += tl.dot(a, tl.trans(from_e4m3(b).to(tl.bfloat16))) * scale
            else:
                keys = tl.dot(a, tl.trans(b), keys)
        tl.store(out + n[None, :], keys, mask=live[:, None])
    else:
        head = tl.arange(0, HEADS)
        head_columns = proj + (which * HEADS + head)[:, None] * HIDDEN + lane[None, :]
        weights = tl.zeros([BM, HEADS], tl.float32)
        for block in range(split * BLOCKS, split * BLOCKS + BLOCKS):
            a = tl.load(rows + block * 128, mask=live[:, None], other=0.0)
            weights = tl.dot(a, tl.trans(tl.load(head_columns + block * 128)), weights)
        tl.store(out + WIDTH - HEADS + head[None, :], weights, mask=live[:, None])


@triton.jit
def _rotate_quantize(even, odd, cos, sin, FLOOR: tl.constexpr):
    """Pairs [n, 64] turned by angles [64] -> (e4m3 bits uint8 [n, 128], scale float32 [n])."""
    y = tl.interleave(even * cos[None, :] - odd * sin[None, :], odd * cos[None, :] + even * sin[None, :])
    # amax * (1 / 448), as XLA computes amax / 448: the two agree on which way a middle rounds.
    scale = tl.maximum(tl.max(tl.abs(y), 1), FLOOR) * (1.0 / 448.0)
    y = tl.math.div_rn(y, tl.broadcast_to(scale[:, None], y.shape))
    return to_e4m3_bits(tl.minimum(tl.maximum(y, -448.0), 448.0)).to(tl.uint8), scale


@triton.jit
def _write_key(
    partial, norm, bias, cache, layer, slot, row, cos, sin,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    PAGES: tl.constexpr, PAGE: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """LayerNorm, rotation, quantization and write of one key. Masked, not skipped: a branch on the slot would wait for it."""
    live = (slot >= 0) & (slot < PAGES * PAGE)
    split, at = tl.arange(0, PADDED)[:, None], tl.arange(0, DIM)
    parts = partial + (split.to(tl.int64) * ROWS + row) * WIDTH + at[None, :]
    key = tl.sum(tl.load(parts, mask=split < SPLITS, other=0.0), 0)
    key -= tl.sum(key, 0) / DIM
    key *= tl.rsqrt(tl.sum(key * key, 0) / DIM + EPS)
    key = key * tl.load(norm + layer * DIM + at).to(tl.float32) + tl.load(bias + layer * DIM + at).to(tl.float32)
    even, odd = tl.split(tl.reshape(key, [1, DIM // 2, 2]))
    bits, scale = _rotate_quantize(even, odd, cos, sin, FLOOR)
    page = cache + (layer.to(tl.int64) * PAGES + slot // PAGE) * (PAGE * (DIM + 4))
    tl.store(page + (slot % PAGE) * DIM + at[None, :], bits, mask=live)
    scales = (page + PAGE * DIM).to(tl.pointer_type(tl.float32))
    tl.store(scales + slot % PAGE + tl.arange(0, 1), scale, mask=live)


@triton.jit
def finish_kernel(
    q, partial, norm, bias, layer, slots, cos, sin, cache, q8, w,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, EPS: tl.constexpr,
    FLOOR: tl.constexpr, FOLD: tl.constexpr, BH: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Grid (rows, KEYS + head blocks): program 0 of a row writes its key, the others quantize BH heads and fold their weights."""
    row, part = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, DIM // 2)
    co = tl.load(cos + row * (ROPE // 2) + pair, mask=pair < ROPE // 2, other=1.0)
    si = tl.load(sin + row * (ROPE // 2) + pair, mask=pair < ROPE // 2, other=0.0)
    if KEYS and part == 0:
        _write_key(
            partial, norm, bias, cache, layer_of(layer), tl.load(slots + row), row, co, si,
            ROWS, DIM, WIDTH, SPLITS, PADDED, PAGES, PAGE, EPS, FLOOR,
        )  # fmt: skip
    elif QUERIES:
        head = (part - KEYS) * BH + tl.arange(0, BH)
        at = (row.to(tl.int64) * HEADS + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        even, odd = tl.split(tl.reshape(tl.load(q + at), [BH, DIM // 2, 2]))
        bits, scale = _rotate_quantize(even, odd, co, si, 1e-10)
        tl.store(q8.to(tl.pointer_type(tl.uint8)) + at, bits)
        split = tl.arange(0, PADDED)[:, None]
        parts = partial + (split.to(tl.int64) * ROWS + row) * WIDTH + (WIDTH - HEADS + head)[None, :]
        weight = tl.sum(tl.load(parts, mask=split < SPLITS, other=0.0), 0)
        tl.store(w + row.to(tl.int64) * HEADS + head, weight * FOLD * scale)


def run(
    spec: Spec,
    cache: jax.Array | None,
    latent: jax.Array | None,
    x: jax.Array,
    wk: Weight | None,
    norm: jax.Array | None,
    bias: jax.Array | None,
    wq_b: Weight | None,
    proj: jax.Array | None,
    layer: int | jax.Array,
    slots: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    plan: Plan | None = None,
) -> Any:
    """Outputs of the spec's form: the cache, (q, w), or (cache, q, w)."""
    plan = plan or plan_for(spec, default_arch())
    keys, queries = spec.form != QUERY, spec.form != WRITE
    partial = _project(spec, plan, x, wk, proj, layer)
    # What a form has no use for is passed as a dummy and not touched.
    q = partial
    if latent is not None and wq_b is not None:
        q = fp8_linear.linear(latent, wq_b, (layer,), arithmetic=spec.arithmetic, dtype=jnp.float32)
    target = x if cache is None else jax.new_ref(cache)
    kind = jnp.float8_e4m3fn if plan.native else jnp.uint8
    shape = (spec.rows, spec.heads, spec.head_dim) if queries else (1, 1, 1)
    out_type = (jax.ShapeDtypeStruct(shape, kind), jax.ShapeDtypeStruct(shape[:2], jnp.float32))
    q8, w = jax_triton.triton_call(
        q, partial, x if norm is None else norm, x if bias is None else bias, layer_argument(layer),
        x if slots is None else slots,
        cos, sin, target, kernel=finish_kernel, out_type=out_type,
        grid=(spec.rows, keys + (spec.heads // plan.block_heads if queries else 0)), name=f"index_{spec.form}",
        num_warps=plan.finish_warps, **triton_options(), ROWS=spec.rows, HEADS=spec.heads, DIM=spec.head_dim,
        ROPE=spec.rope, WIDTH=spec.outputs, SPLITS=plan.splits, PADDED=triton.next_power_of_2(plan.splits),
        PAGES=spec.pages, PAGE=PAGE, EPS=LAYER_NORM_EPS, FLOOR=INDEX_SCALE_FLOOR, FOLD=spec.fold, BH=plan.block_heads,
        KEYS=int(keys), QUERIES=queries,
    )  # fmt: skip
    if queries and not plan.native:
        q8 = jax.lax.bitcast_convert_type(q8, jnp.float8_e4m3fn)
    if not queries:
        return jax.freeze(target)
    return (jax.freeze(target), q8, w) if keys else (q8, w)


def _project(
    spec: Spec, plan: Plan, x: jax.Array, wk: Weight | None, proj: jax.Array | None, layer: int | jax.Array
) -> jax.Array:
    """Sums over slices of the hidden size, float32 [splits, rows, keys' head_dim | heads]."""
    data, scale, at = (x, x, layer) if wk is None else _operand(wk, layer, plan.native)
    places = (layer_argument(layer), layer_argument(at))
    return jax_triton.triton_call(
        x, data, scale, x if proj is None else proj, *places, kernel=project_kernel,
        out_type=jax.ShapeDtypeStruct((plan.splits, spec.rows, spec.outputs), jnp.float32),
        grid=(plan.splits, plan.key_tiles + (spec.form != WRITE), -(-spec.rows // plan.block_rows)),
        name="index_project", num_warps=plan.project_warps, num_stages=plan.stages, **triton_options(),
        ROWS=spec.rows, HIDDEN=spec.hidden, DIM=spec.head_dim, HEADS=spec.heads or 16, WIDTH=spec.outputs,
        BM=plan.block_rows, BN=plan.block_keys, KEY_TILES=plan.key_tiles, BLOCKS=spec.hidden // 128 // plan.splits,
        FP8=isinstance(wk, BlockScaled),
    )  # fmt: skip


def _operand(w: Weight, layer: int | jax.Array, native: bool) -> tuple[jax.Array, jax.Array, int | jax.Array]:
    """(stack, scales, index into the stack). A GPU without e4m3 gets one layer's bytes: Triton refuses the type there."""
    if not isinstance(w, BlockScaled):
        return w, w, layer
    if native:
        return w.data, w.scale, layer
    one = jax.lax.bitcast_convert_type(jax.lax.dynamic_index_in_dim(w.data, layer), jnp.uint8)
    return one, w.scale, 0
