"""Sparse MLA decode for Hopper in Gluon: FP8 latents, any number of heads, four kinds of warps.

One warpgroup copies rows as they are into a ring of three tiles of 64 keys; one computes scores and softmax weights;
two compute the context, 256 latents each, a tile behind. Shared memory for 64 heads: ring 3 x 41 KiB, query 72 KiB (two
e4m3 terms and the roped part), weights 2 x 8 KiB, sums 8 KiB.
"""

from __future__ import annotations

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from pallas_kernels import jax_gluon
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.sparse_mla import gluon_few
from pallas_kernels.sparse_mla.gluon_load import BYTES, FLAT, FLAT_ROW, HALVES, WORDS, produce
from pallas_kernels.sparse_mla.gluon_math import multiply, score
from pallas_kernels.sparse_mla.plan import hopper_plan, one_tile_each
from pallas_kernels.sparse_mla.spec import Spec
from pallas_kernels.sparse_mla.triton import LATENT_FACTOR, LOG2E, merge, merge_short, outputs

jax_gluon.install()


@gluon.constexpr_function
def _registers(N):
    """Of values, scores and copies; of 512 for the four warpgroups' threads. The default warpgroup, which multiplies too, keeps
    the rest, as many as the other.

    Of 64 heads: with 168 for the values ptxas serializes every product of the kernel (C7511, C7512).
    """
    return [176, 136, 24] if N > 32 else [144, 184, 40]


@gluon.jit
def _barriers(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        hopper.mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def split_kernel(
    q, cache, layer, slots, context, lse,
    HEADS: gl.constexpr, N: gl.constexpr, K: gl.constexpr, CAPACITY: gl.constexpr,
    SCALE_LOG2: gl.constexpr, OUT_FACTOR: gl.constexpr, SPLITS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (splits, head blocks, rows). context, lse: the outputs for one split, else partials [rows, splits, heads, ...].

    Head blocks are not the first axis, whose numbers the compiler believes to overflow: it would keep the work of heads that a
    block has not (64 rows of 8 heads: 41.0 us, now 38.0).
    """
    split, row = gl.program_id(0), gl.program_id(2).to(gl.int64)
    first_head = gl.program_id(1) * N
    words = cache.to(gl.pointer_type(gl.int32))
    end = gl.minimum(K, (split + 1) * TILES * 64)
    at = split * TILES * 64
    out = (row * SPLITS + split) * HEADS
    # Partials keep log2 sums; the single split writes natural logs.
    LSE_FACTOR: gl.constexpr = 0.6931471805599453 if SPLITS == 1 else 1.0
    latents = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 128], WORDS)
    ropes = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], WORDS)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 4], FLAT)
    picks = gl.allocate_shared_memory(gl.int32, [STAGES, 64], FLAT_ROW)
    query = gl.allocate_shared_memory(gl.float8e4nv, [2, N, 512], BYTES)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [N, 64], HALVES)
    factors = gl.allocate_shared_memory(gl.float32, [N], FLAT_ROW)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, 64, N], gl.NVMMASharedLayout(2 * N, 16, 2))
    highs = gl.allocate_shared_memory(gl.bfloat16, [2, 256], FLAT_ROW)
    lows = gl.allocate_shared_memory(gl.bfloat16, [2, 256], FLAT_ROW)
    alphas = gl.allocate_shared_memory(gl.float32, [2, N], FLAT_ROW)
    final = gl.allocate_shared_memory(gl.float32, [N], FLAT_ROW)
    bases = gl.allocate_shared_memory(gl.float32, [N], FLAT_ROW)
    totals = gl.allocate_shared_memory(gl.float32, [32, N], FLAT)
    flags = gl.allocate_shared_memory(gl.int32, [4], FLAT_ROW)
    full = _barriers(STAGES, 128)  # every copying thread, when its copies are there
    free = _barriers(STAGES, 3)
    p_full = _barriers(2, 1)
    p_free = _barriers(2, 2)
    q_full = _barriers(1, 2).index(0)
    done = _barriers(1, 1).index(0)
    slots += row * K
    q += row * (HEADS * 576)
    context += out * 512
    gl.warp_specialize(
        [
            (multiply, (
                q, first_head, context, latents, query, query_rope, factors, weights, highs, lows, alphas, final,
                full, free, p_full, p_free, q_full, done, 0, HEADS, N, SCALE_LOG2, TILES, STAGES,
            )),
            (multiply, (
                q, first_head, context, latents, query, query_rope, factors, weights, highs, lows, alphas, final,
                full, free, p_full, p_free, q_full, done, 1, HEADS, N, SCALE_LOG2, TILES, STAGES,
            )),
            (score, (
                at, end, layer, first_head, lse + out, latents, ropes, scales, picks, query, query_rope, factors, weights,
                highs, lows, alphas, final, bases, totals, flags, full, free, p_full, p_free, q_full, done,
                HEADS, N, CAPACITY, OUT_FACTOR, LSE_FACTOR, TILES, STAGES,
            )),
            (produce, (words, layer, slots, at, end, latents, ropes, scales, picks, full, free, CAPACITY, TILES, STAGES)),
        ],
        [4, 4, 4],
        _registers(N),
    )  # fmt: skip


def run(
    spec: Spec, q: jax.Array, cache: jax.Array, layer: int | jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if one_tile_each(spec):
        return gluon_few.run(spec, q, cache, layer, slots)
    plan = hopper_plan(spec, default_arch())
    # Measured where it is so; of 64 heads a program and of single splits bfloat16 was no faster.
    short = plan.block_heads == 32 and plan.splits == 8
    part, part_lse = jax_triton.triton_call(
        q, cache, layer_argument(layer), slots, kernel=split_kernel, out_type=outputs(spec, plan.splits, short),
        grid=(plan.splits, -(-spec.heads // plan.block_heads), spec.rows), name="sparse_mla_split_sm90",
        num_warps=plan.warps, **triton_options(),
        HEADS=spec.heads, N=plan.block_heads, K=spec.k, CAPACITY=spec.capacity, SCALE_LOG2=spec.scale * LOG2E,
        OUT_FACTOR=1 / LATENT_FACTOR, SPLITS=plan.splits, TILES=plan.tiles, STAGES=plan.stages,
    )  # fmt: skip
    if plan.splits == 1:
        return part, part_lse
    return (merge_short if short else merge)(spec, plan.splits, part, part_lse)
