"""MLA front with its absorption in Triton; portable from SM80 to SM120.

The norm and q_b are the operations of those names; what is written here is one launch that absorbs W_UK, rotates the rope part
and lays both side by side. It streams W_UK once: a tile of 64 latents a program, 512 programs at 64 heads.
"""

from __future__ import annotations

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import fp8_linear, norm_quant
from pallas_kernels.blocks import Weight
from pallas_kernels.lowering import triton_options
from pallas_kernels.mla_front.spec import Spec


@triton.jit
def _rotate(q, cos, sin, out, row, live, at_q, at_out, ROPE: tl.constexpr):
    """Rotates the rope part of a block of rows of one head."""
    pair = tl.arange(0, ROPE // 2)[None, :]
    mask = live[:, None]
    even = tl.load(q + at_q[:, None] + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(q + at_q[:, None] + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    co = tl.load(cos + row[:, None] * (ROPE // 2) + pair, mask=mask, other=0.0)
    si = tl.load(sin + row[:, None] * (ROPE // 2) + pair, mask=mask, other=0.0)
    tl.store(out + at_out[:, None] + 2 * pair, (even * co - odd * si).to(tl.bfloat16), mask=mask)
    tl.store(out + at_out[:, None] + 2 * pair + 1, (odd * co + even * si).to(tl.bfloat16), mask=mask)


@triton.jit
def absorb_kernel(
    q, w_uk, layer, cos, sin, out,
    ROWS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (latent tiles, heads, row blocks). q [rows, heads, nope + rope] -> out [rows, heads, latent + rope]."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    live = row < ROWS
    at_q = (row * HEADS + head) * (NOPE + ROPE)
    at_out = (row * HEADS + head) * (LATENT + ROPE)
    column = tile * BN + tl.arange(0, BN)
    start = (tl.load(layer).to(tl.int64) * HEADS + head) * NOPE * LATENT
    total = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(0, NOPE, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(q + at_q[:, None] + inner[None, :], mask=live[:, None], other=0.0)
        b = tl.load(w_uk + start + inner[:, None] * LATENT + column[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + at_out[:, None] + column[None, :], total.to(tl.bfloat16), mask=live[:, None])
    if tile == 0:
        _rotate(q, cos, sin, out, row, live, at_q + NOPE, at_out + LATENT, ROPE)


def absorb(spec: Spec, q: jax.Array, w_uk: jax.Array, layer: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """q [rows, heads * (nope + rope)] -> absorbed query [rows, heads, kv_lora_rank + rope]."""
    rows = 16 if spec.rows <= 16 else 64
    out = jax.ShapeDtypeStruct((spec.rows, spec.heads, spec.kv_lora_rank + spec.rope), q.dtype)
    return jax_triton.triton_call(
        q, w_uk, layer.reshape(1), cos, sin, kernel=absorb_kernel, out_type=out,
        grid=(spec.kv_lora_rank // 64, spec.heads, -(-spec.rows // rows)), name="mla_absorb", num_warps=4,
        **triton_options(), ROWS=spec.rows, HEADS=spec.heads, NOPE=spec.nope, ROPE=spec.rope,
        LATENT=spec.kv_lora_rank, BM=rows, BN=64, BK=64,
    )  # fmt: skip


def run(
    spec: Spec,
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    latent = norm_quant.rms_norm(q_a, norm[layer], spec.eps)
    q = fp8_linear.linear(latent, q_b, (layer,), arithmetic=spec.arithmetic)
    return latent, absorb(spec, q, w_uk, layer, cos, sin)
