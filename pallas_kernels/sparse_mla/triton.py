"""Split-KV sparse MLA decode in Triton: portable from SM80 to SM120.

One program attends a block of heads of one row to one split of its slots with an online softmax; with several splits it
writes a normalized float32 context and its log2-sum-exp, and ``merge`` weights them in a fixed order. No FP8 conversion
instruction is used: e4m3 bits are shifted into bfloat16 and multiplied by the scale in two steps (hi + lo), which rounds
once, as float32 would. The latents are kept times 2^-20, so that scales up to 2^27 do not overflow on the way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.sparse_mla.plan import Plan, make_plan
from pallas_kernels.sparse_mla.spec import Spec

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# What a decoded FP8 latent is multiplied by: 2^-120 from the exponent biases (127 - 7), 2^100 in the scale.
LATENT_FACTOR = 2.0**-20
_SCALE_FACTOR = tl.constexpr(2.0**100)


def dequant_asm(load_scales: str) -> str:
    """PTX that turns four e4m3 bytes ($2) into two bfloat16 pairs ($0, $1) times a scale.

    Sign and magnitude move to bfloat16's places (value * 2^-120, subnormals included); then times high + low, two parts of
    the scale: fma.rn.bf16x2 exists from SM80 on and keeps subnormals. load_scales fills h0, l0 (first pair) and h1, l1.
    """
    return f"""{{
 .reg .b32 t0, t1, m0, m1, h0, h1, l0, l1, z;
 {load_scales}
 mov.b32 z, 0x80008000;
 prmt.b32 t0, $2, 0, 0x1404;
 prmt.b32 t1, $2, 0, 0x3424;
 shr.u32 m0, t0, 4;
 shr.u32 m1, t1, 4;
 and.b32 m0, m0, 0x07f007f0;
 and.b32 m1, m1, 0x07f007f0;
 and.b32 t0, t0, 0x80008000;
 and.b32 t1, t1, 0x80008000;
 or.b32 m0, m0, t0;
 or.b32 m1, m1, t1;
 fma.rn.bf16x2 l0, m0, l0, z;
 fma.rn.bf16x2 l1, m1, l1, z;
 fma.rn.bf16x2 $0, m0, h0, l0;
 fma.rn.bf16x2 $1, m1, h1, l1;
}}"""


# Four elements with a scale each ($3 .. $6: high part in the upper half): they need not come from one row, because the
# compiler may run this in the layout of a matrix operand.
_DEQUANT = tl.constexpr(
    dequant_asm(
        "prmt.b32 h0, $3, $4, 0x7632; prmt.b32 l0, $3, $4, 0x5410; prmt.b32 h1, $5, $6, 0x7632; prmt.b32 l1, $5, $6, 0x5410;"
    )
)


@triton.jit
def _latent_group(cache, base, valid, group: tl.constexpr, QUANT: tl.constexpr):
    """One group of 128 latents of the rows at base, bfloat16 [n, 128], times LATENT_FACTOR where quantized."""
    at = base[:, None] + (group * 128 + tl.arange(0, 128))[None, :]
    raw = tl.load(cache + at, mask=valid[:, None], other=0)
    if not QUANT:
        return raw.to(tl.bfloat16)
    scales = (cache + base + 512).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales + group, mask=valid, other=0.0) * _SCALE_FACTOR
    high = scale.to(tl.bfloat16)
    low = (scale - high.to(tl.float32)).to(tl.bfloat16)
    both = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) | (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    # Called impure, or the compiler dequantizes twice, each time in the layout of one product's operand.
    return tl.inline_asm_elementwise(
        _DEQUANT, "=&r,=&r,r,r,r,r,r", [raw, both[:, None]], dtype=tl.bfloat16, is_pure=False, pack=4
    )


@triton.jit
def _rope_part(cache, base, valid, QUANT: tl.constexpr):
    """The roped key of the rows at base, bfloat16 [n, 64]."""
    columns = tl.arange(0, 64)
    if QUANT:
        pointers = (cache + base + 528).to(tl.pointer_type(tl.bfloat16))
        return tl.load(pointers[:, None] + columns[None, :], mask=valid[:, None], other=0.0)
    return tl.load(cache + base[:, None] + (512 + columns)[None, :], mask=valid[:, None], other=0.0).to(tl.bfloat16)


@triton.jit
def _rescale_add(acc, alpha, p, key):
    return tl.dot(p, key, acc * alpha[:, None])


@triton.jit
def split_kernel(
    q, cache, layer, slots, context, lse,
    HEADS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, QUANT: tl.constexpr,
    SCALE_LOG2: tl.constexpr, ROPE_FACTOR: tl.constexpr, OUT_FACTOR: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (head blocks, splits, rows). context, lse: the outputs for one split, else partials [rows, splits, heads, ...]."""
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    split, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    live = head < HEADS
    columns = tl.arange(0, 128)
    at_q = q + (row * HEADS + head)[:, None] * 576
    q0 = tl.load(at_q + columns[None, :], mask=live[:, None], other=0.0)
    q1 = tl.load(at_q + 128 + columns[None, :], mask=live[:, None], other=0.0)
    q2 = tl.load(at_q + 256 + columns[None, :], mask=live[:, None], other=0.0)
    q3 = tl.load(at_q + 384 + columns[None, :], mask=live[:, None], other=0.0)
    qr = tl.load(at_q + 512 + tl.arange(0, 64)[None, :], mask=live[:, None], other=0.0)
    qr = (qr.to(tl.float32) * ROPE_FACTOR).to(tl.bfloat16)
    start = layer_of(layer).to(tl.int64) * CAPACITY * WIDTH
    peak = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc0 = tl.zeros([BH, 128], tl.float32)
    acc1 = tl.zeros([BH, 128], tl.float32)
    acc2 = tl.zeros([BH, 128], tl.float32)
    acc3 = tl.zeros([BH, 128], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        at = (split * TILES + tile) * BN + tl.arange(0, BN)
        slot = tl.load(slots + row * K + at, mask=at < K, other=-1)
        valid = (slot >= 0) & (slot < CAPACITY)
        base = start + slot.to(tl.int64) * WIDTH
        k0 = _latent_group(cache, base, valid, 0, QUANT)
        k1 = _latent_group(cache, base, valid, 1, QUANT)
        k2 = _latent_group(cache, base, valid, 2, QUANT)
        k3 = _latent_group(cache, base, valid, 3, QUANT)
        kr = _rope_part(cache, base, valid, QUANT)
        score = tl.dot(q0, tl.trans(k0))
        score = tl.dot(q1, tl.trans(k1), score)
        score = tl.dot(q2, tl.trans(k2), score)
        score = tl.dot(q3, tl.trans(k3), score)
        score = tl.dot(qr, tl.trans(kr), score)
        score = tl.where(valid[None, :], score * SCALE_LOG2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A row with nothing selected so far keeps -inf: subtract 0 there, or -inf - -inf makes NaN.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - safe[:, None])
        alpha = tl.exp2(peak - safe)
        total = total * alpha + tl.sum(weight, 1)
        peak = new_peak
        p = weight.to(tl.bfloat16)
        acc0 = _rescale_add(acc0, alpha, p, k0)
        acc1 = _rescale_add(acc1, alpha, p, k1)
        acc2 = _rescale_add(acc2, alpha, p, k2)
        acc3 = _rescale_add(acc3, alpha, p, k3)
    factor = (OUT_FACTOR / tl.where(total > 0, total, 1.0))[:, None]
    log_sum = peak + tl.log2(total)
    at_head = (row * SPLITS + split) * HEADS + head
    at_out = context + at_head[:, None] * 512 + columns[None, :]
    tl.store(at_out, (acc0 * factor).to(context.dtype.element_ty), mask=live[:, None])
    tl.store(at_out + 128, (acc1 * factor).to(context.dtype.element_ty), mask=live[:, None])
    tl.store(at_out + 256, (acc2 * factor).to(context.dtype.element_ty), mask=live[:, None])
    tl.store(at_out + 384, (acc3 * factor).to(context.dtype.element_ty), mask=live[:, None])
    tl.store(lse + at_head, log_sum * LN2 if SPLITS == 1 else log_sum, mask=live)


@triton.jit
def merge_kernel(
    part, part_lse, context, lse,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (heads, 512 / COLUMNS, rows): weights the partials of one head by exp2(lse), all splits in one reduction."""
    head, row = tl.program_id(0), tl.program_id(2)
    split = tl.arange(0, SPLITS_PADDED)
    live = split < SPLITS
    at = (row * SPLITS + split) * HEADS + head
    partial = tl.load(part_lse + at, mask=live, other=float("-inf"))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(part + at.to(tl.int64)[:, None] * 512 + columns[None, :], mask=live[:, None], other=0.0)
    peak = tl.max(partial, 0)
    weight = tl.exp2(partial - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    merged = tl.sum(values * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    out = (row * HEADS + head).to(tl.int64)
    tl.store(context + out * 512 + columns, merged.to(context.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse + out, (peak + tl.log2(total)) * LN2)


@triton.jit
def merge_short_kernel(part, part_lse, context, lse, HEADS: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (heads, rows): as ``merge_kernel``, for bfloat16 partials of few splits: a thread has the same latents of all."""
    head, row = tl.program_id(0), tl.program_id(1)
    first = row * SPLITS * HEADS + head
    columns = tl.arange(0, 512)
    values, logs = (), ()
    for s in tl.static_range(SPLITS):
        at = first + s * HEADS
        logs = logs + (tl.load(part_lse + at),)  # noqa: RUF005 (Triton knows no unpacking)
        values = values + (tl.load(part + at.to(tl.int64) * 512 + columns),)  # noqa: RUF005
    peak = logs[0]
    for s in tl.static_range(1, SPLITS):
        peak = tl.maximum(peak, logs[s])
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    merged = tl.zeros([512], tl.float32)
    for s in tl.static_range(SPLITS):
        weight = tl.exp2(logs[s] - safe)
        total += weight
        merged += values[s].to(tl.float32) * weight
    merged = merged / tl.where(total > 0, total, 1.0)
    out = (row * HEADS + head).to(tl.int64)
    tl.store(context + out * 512 + columns, merged.to(context.dtype.element_ty))
    tl.store(lse + out, (peak + tl.log2(total)) * LN2)


def _merged_outputs(spec: Spec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((spec.rows, spec.heads, 512), jnp.dtype(spec.q_dtype)),
        jax.ShapeDtypeStruct((spec.rows, spec.heads), jnp.float32),
    )


def merge(spec: Spec, splits: int, part: jax.Array, part_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Partials float32 [rows, splits, heads, 512] and log2-sum-exps [rows, splits, heads] -> (context, lse)."""
    padded = triton.next_power_of_2(splits)
    # Measured: few heads want many small programs; else 8192 values a program (8 rows, 16 splits: 3.8 us against 8.0 of 2048).
    columns = 64 if spec.rows * spec.heads <= 64 else max(64, min(512, 8192 // padded))
    return jax_triton.triton_call(
        part, part_lse, kernel=merge_kernel, out_type=_merged_outputs(spec), grid=(spec.heads, 512 // columns, spec.rows),
        name="sparse_mla_merge", num_warps=4, **triton_options(),
        HEADS=spec.heads, SPLITS=splits, SPLITS_PADDED=padded, COLUMNS=columns,
    )  # fmt: skip


def merge_short(spec: Spec, splits: int, part: jax.Array, part_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``merge`` of bfloat16 partials."""
    return jax_triton.triton_call(
        part, part_lse, kernel=merge_short_kernel, out_type=_merged_outputs(spec), grid=(spec.heads, spec.rows),
        name="sparse_mla_merge", num_warps=4, **triton_options(), HEADS=spec.heads, SPLITS=splits,
    )  # fmt: skip


def outputs(spec: Spec, splits: int, short: bool = False) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What the split kernel writes: the outputs themselves for one split, else partials, float32 or in q's dtype.

    In bfloat16 only ``merge_short`` reads them fast (8 rows of 64 heads: 2.05 us, ``merge`` 4.3; of float32 both 2.5).
    """
    lead = (spec.rows, spec.heads) if splits == 1 else (spec.rows, splits, spec.heads)
    dtype = jnp.dtype(spec.q_dtype) if splits == 1 or short else jnp.dtype(jnp.float32)
    return jax.ShapeDtypeStruct((*lead, 512), dtype), jax.ShapeDtypeStruct(lead, jnp.float32)


def constants(spec: Spec) -> dict[str, int | float | bool]:
    factor = LATENT_FACTOR if spec.quantized else 1.0
    return {
        "HEADS": spec.heads, "K": spec.k, "WIDTH": spec.width, "CAPACITY": spec.capacity, "QUANT": spec.quantized,
        "SCALE_LOG2": spec.scale * LOG2E / factor, "ROPE_FACTOR": factor, "OUT_FACTOR": 1.0 / factor,
    }  # fmt: skip


def run(
    spec: Spec, q: jax.Array, cache: jax.Array, layer: int | jax.Array, slots: jax.Array, plan: Plan | None = None
) -> tuple[jax.Array, jax.Array]:
    plan = plan or make_plan(spec, default_arch())
    part, part_lse = jax_triton.triton_call(
        q, cache, layer_argument(layer), slots, kernel=split_kernel, out_type=outputs(spec, plan.splits),
        grid=(-(-spec.heads // plan.block_heads), plan.splits, spec.rows), name="sparse_mla_split",
        num_warps=plan.warps, num_stages=plan.stages, **triton_options(), **constants(spec),
        SPLITS=plan.splits, TILES=plan.tiles, BH=plan.block_heads, BN=plan.block_keys, STAGES=plan.stages,
    )  # fmt: skip
    return (part, part_lse) if plan.splits == 1 else merge(spec, plan.splits, part, part_lse)
