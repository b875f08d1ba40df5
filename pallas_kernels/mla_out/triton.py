"""MLA output with its value up-projection in Triton; portable from SM80 to SM120.

o_proj is the fp8_linear operation; what is written here streams W_UV once. A program has all its loads in flight before it uses
the first: with four dependent rounds of loads the projection took 11 us instead of the 4 that its bytes need.
"""

from __future__ import annotations

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import fp8_linear
from pallas_kernels.blocks import Weight
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.loaded_triton import loaded
from pallas_kernels.lowering import triton_options
from pallas_kernels.mla_out import reference
from pallas_kernels.mla_out.spec import Spec

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def up_project_row_kernel(
    context, w_uv, layer, out, HEADS: tl.constexpr, V: tl.constexpr, LATENT: tl.constexpr, BV: tl.constexpr
):
    """Grid (value tiles, heads), one row. context [1, heads, latent] -> out [1, heads, v], by vector instructions."""
    head = tl.program_id(1)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    inner = tl.arange(0, LATENT)
    start = (layer_of(layer).to(tl.int64) * HEADS + head) * V * LATENT
    w = tl.load(w_uv + start + column[:, None] * LATENT + inner[None, :], eviction_policy="evict_first")
    x = tl.load(context + head * LATENT + inner)
    total = tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    tl.store(out + head * V + column, total.to(tl.bfloat16))


@triton.jit
def up_project_parts_row_kernel(
    parts, lse, w_uv, layer, out,
    HEADS: tl.constexpr, V: tl.constexpr, LATENT: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (value tiles, heads), one row. parts [1, PARTS, heads, latent], lse [1, PARTS, heads] -> out [1, heads, v]."""
    head = tl.program_id(1)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    inner = tl.arange(0, LATENT)
    part = tl.arange(0, PADDED)
    log_sum = tl.load(lse + part * HEADS + head, mask=part < PARTS, other=float("-inf")) * LOG2E
    at = parts + (part * HEADS + head)[:, None] * LATENT + inner[None, :]
    x = tl.load(at, mask=(part < PARTS)[:, None], other=0.0)
    start = (layer_of(layer).to(tl.int64) * HEADS + head) * V * LATENT
    w = tl.load(w_uv + start + column[:, None] * LATENT + inner[None, :], eviction_policy="evict_first")
    peak = tl.max(log_sum, 0)
    weight = tl.exp2(log_sum - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    merged = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    values = tl.sum(w.to(tl.float32) * merged.to(tl.bfloat16).to(tl.float32)[None, :], 1)
    tl.store(out + head * V + column, values.to(tl.bfloat16))


@triton.jit
def _rounds(context, w_uv, at, start, column, live, total, LATENT: tl.constexpr, BK: tl.constexpr):
    """The product in rounds of BK latents."""
    for k in tl.static_range(0, LATENT, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(context + at[:, None] + inner[None, :], mask=live[:, None], other=0.0)
        w = tl.load(w_uv + start + column[:, None] * LATENT + inner[None, :])
        total = tl.dot(a, tl.trans(w), total)
    return total


@triton.jit
def up_project_kernel(
    context, w_uv, layer, out,
    ROWS: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, LATENT: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (value tiles, heads, row blocks). context [rows, heads, latent] -> out [rows, heads, v], by matrix instructions."""
    head = tl.program_id(1)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    live = row < ROWS
    start = (layer_of(layer).to(tl.int64) * HEADS + head) * V * LATENT
    at = (row * HEADS + head) * LATENT
    total = tl.zeros([BM, BV], tl.float32)
    if BK == LATENT:
        inner = tl.arange(0, BK)
        w = tl.load(w_uv + start + column[:, None] * LATENT + inner[None, :])
        a = tl.load(context + at[:, None] + inner[None, :], mask=live[:, None], other=0.0)
        tl.debug_barrier()  # see ``loaded``
        total = tl.dot(loaded(a), tl.trans(loaded(w)), total)
    else:
        total = _rounds(context, w_uv, at, start, column, live, total, LATENT, BK)
    at_out = (row * HEADS + head) * V
    tl.store(out + at_out[:, None] + column[None, :], total.to(tl.bfloat16), mask=live[:, None])


def _depth(latent: int, few: bool) -> int:
    """Latents of one round; all of them where they fit a thread's registers."""
    if few and latent in (128, 256, 512):
        return latent
    return 256 if few and latent % 256 == 0 else 128


def up_project(spec: Spec, context: jax.Array, w_uv: jax.Array, layer: int | jax.Array) -> jax.Array:
    """context [rows, heads, kv_lora_rank] -> values [rows, heads * v]."""
    latent = spec.kv_lora_rank
    sizes = {"HEADS": spec.heads, "V": spec.v, "LATENT": latent}
    warps = 4
    if spec.rows == 1 and latent & (latent - 1) == 0:
        # 16 a program: 6.3 us; 32: 6.6; 64: 6.9. Of eight heads 2.84 us with four warps, 2.70 with eight.
        warps = 8 if spec.heads * spec.v < 8192 else 4
        kernel, grid = up_project_row_kernel, (spec.v // 16, spec.heads)
        sizes |= {"BV": 16}
    else:
        few = spec.rows <= 16
        # A shard of the heads needs smaller tiles to give every SM a part.
        rows, tile = 16 if few else 64, 16 if few and spec.heads * spec.v < 8192 else 32
        kernel, grid = up_project_kernel, (spec.v // tile, spec.heads, -(-spec.rows // rows))
        sizes |= {"ROWS": spec.rows, "BM": rows, "BV": tile, "BK": _depth(latent, few)}
    return jax_triton.triton_call(
        context, w_uv, layer_argument(layer), kernel=kernel, grid=grid, name="mla_up_project", num_warps=warps,
        out_type=jax.ShapeDtypeStruct((spec.rows, spec.heads * spec.v), context.dtype), **triton_options(), **sizes,
    )  # fmt: skip


def merges(spec: Spec) -> bool:
    """Whether W_UV's programs merge the parts: of one row, few enough for each program to read all of its head."""
    latent = spec.kv_lora_rank
    return spec.rows == 1 and spec.parts <= 16 and latent & (latent - 1) == 0


def up_project_parts(
    spec: Spec, parts: jax.Array, lse: jax.Array, w_uv: jax.Array, layer: int | jax.Array
) -> jax.Array:
    """parts float32 [1, parts, heads, kv_lora_rank] with natural logs of their sums -> values [1, heads * v]."""
    return jax_triton.triton_call(
        parts, lse, w_uv, layer_argument(layer), kernel=up_project_parts_row_kernel, grid=(spec.v // 16, spec.heads),
        name="mla_up_project_parts_row", num_warps=8, **triton_options(),
        out_type=jax.ShapeDtypeStruct((1, spec.heads * spec.v), w_uv.dtype),
        HEADS=spec.heads, V=spec.v, LATENT=spec.kv_lora_rank, BV=16, PARTS=spec.parts, PADDED=triton.next_power_of_2(spec.parts),
    )  # fmt: skip


def run(
    spec: Spec,
    context: jax.Array,
    w_uv: jax.Array,
    o_proj: Weight,
    layer: int | jax.Array,
    lse: jax.Array | None = None,
) -> jax.Array:
    if lse is not None and merges(spec):
        values = up_project_parts(spec, context, lse, w_uv, layer)
    else:
        context = context if lse is None else reference.merged(context, lse, w_uv.dtype)
        values = up_project(spec, context, w_uv, layer)
    return fp8_linear.linear(values, o_proj, (layer,), arithmetic=spec.arithmetic)
