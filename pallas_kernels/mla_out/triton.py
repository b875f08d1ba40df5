"""MLA output with its value up-projection in Triton; portable from SM80 to SM120.

o_proj is the fp8_linear operation; what is written here streams W_UV once: a tile of 32 value rows a program, 512 programs at
64 heads.
"""

from __future__ import annotations

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import fp8_linear
from pallas_kernels.blocks import Weight
from pallas_kernels.lowering import triton_options
from pallas_kernels.mla_out.spec import Spec


@triton.jit
def up_project_kernel(
    context, w_uv, layer, out,
    ROWS: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, LATENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (value tiles, heads, row blocks). context [rows, heads, latent] -> out [rows, heads, v]."""
    head = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    live = row < ROWS
    start = (tl.load(layer).to(tl.int64) * HEADS + head) * V * LATENT
    at = (row * HEADS + head) * LATENT
    total = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(0, LATENT, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(context + at[:, None] + inner[None, :], mask=live[:, None], other=0.0)
        b = tl.load(w_uv + start + column[:, None] * LATENT + inner[None, :])
        total = tl.dot(a, tl.trans(b), total)
    at_out = (row * HEADS + head) * V
    tl.store(out + at_out[:, None] + column[None, :], total.to(tl.bfloat16), mask=live[:, None])


def up_project(spec: Spec, context: jax.Array, w_uv: jax.Array, layer: jax.Array) -> jax.Array:
    """context [rows, heads, kv_lora_rank] -> values [rows, heads * v]."""
    rows = 16 if spec.rows <= 16 else 64
    return jax_triton.triton_call(
        context, w_uv, layer.reshape(1), kernel=up_project_kernel,
        out_type=jax.ShapeDtypeStruct((spec.rows, spec.heads * spec.v), context.dtype),
        grid=(spec.v // 32, spec.heads, -(-spec.rows // rows)), name="mla_up_project", num_warps=4,
        **triton_options(), ROWS=spec.rows, HEADS=spec.heads, V=spec.v, LATENT=spec.kv_lora_rank,
        BM=rows, BN=32, BK=128,
    )  # fmt: skip


def run(spec: Spec, context: jax.Array, w_uv: jax.Array, o_proj: Weight, layer: jax.Array) -> jax.Array:
    values = up_project(spec, context, w_uv, layer)
    return fp8_linear.linear(values, o_proj, (layer,), arithmetic=spec.arithmetic)
