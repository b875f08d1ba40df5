"""The merge of the attention's parts and W_UV in one launch, for Hopper: a cluster of eight blocks a head and four or eight rows.

Each block merges 64 of the 512 latents of the rows' contexts and sends them, rounded to bfloat16, to all eight; then it makes 32
of the head's 256 values. So every part is read once, W_UV once, and both are under way before anything is waited for.
"""

from __future__ import annotations

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from pallas_kernels import fp8_linear, jax_gluon
from pallas_kernels.blocks import Weight
from pallas_kernels.gluon_clusters import await_sent, cluster_start, cluster_wait, own_memory
from pallas_kernels.gluon_layer import layer_of
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import triton_options
from pallas_kernels.mla_out.spec import Spec

jax_gluon.install()
BLOCKS = gl.constexpr(8)
# Of a product: rows of the context, of which a cluster has EACH.
COLUMNS = gl.constexpr(8)
LATENT, V = gl.constexpr(512), gl.constexpr(256)
_LOG2E = gl.constexpr(1.4426950408889634)
# Bytes of a row of the context in shared memory: 16 more than it has, so that eight rows are in different banks.
_ROW = gl.constexpr(1040)
_PARTS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
_WEIGHTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
_PART_LINES = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0]))
_WEIGHT_LINES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
# Products [quarter of the latents, values, rows]: four pairs of warps have a quarter each.
_MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 2, 1], [1, 16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 2))
_LOAD_PAIR = gl.constexpr("ld.shared.b32 $0, [$1];")


@gluon.constexpr_function
def _by_row(S, EACH):
    """[EACH rows, S parts, 64 latents]: a warp a row, of four rows two; four latents a thread, the lanes' highest bits a part."""
    own = 2 if EACH == 8 else 4
    parts = [[0, own << i, 0] for i in range((S // own).bit_length() - 1)]
    if EACH == 8:
        lanes, warps = [[0, 0, 32], [0, 1, 0]], [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
    else:
        lanes, warps = [[0, 1, 0], [0, 2, 0]], [[1, 0, 0], [2, 0, 0], [0, 0, 32]]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 0, 16], *lanes]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], *parts], lanes, warps, [], [EACH, S, 64])


@gluon.constexpr_function
def _send(i, COPIES):
    """PTX, four bfloat16 ($1, $2) at a time: to the address $3 of block i or, from the upper of COPIES groups of lanes, which have
    the same values, of a later one; a block's barrier is at $7."""
    lanes = (32 // COPIES).bit_length() - 1
    blocks = (8 // COPIES).bit_length() - 1
    return f"""{{
 .reg .b32 a, m, t;
 mov.u32 t, %laneid;
 shr.u32 t, t, {lanes};
 shl.b32 t, t, {blocks};
 add.u32 t, t, {i};
 mapa.shared::cluster.u32 a, $3, t;
 mapa.shared::cluster.u32 m, $7, t;
 st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [a], {{$1, $2}}, [m];
 mov.u32 $0, 0;
}}"""


@gluon.jit
def _copy_parts(
    parts, target, first_row, head, block,
    ROWS: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, S: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Starts copies of this block's latents of every row and part; what is beyond them becomes zero."""
    line = gl.arange(0, EACH * S, gl.SliceLayout(1, _PART_LINES))
    row, part = first_row + line // S, line % S
    columns = block * 64 + gl.arange(0, 64, gl.SliceLayout(0, _PART_LINES))
    at = ((row * PARTS + part) * HEADS + head) * LATENT
    live = (row < ROWS) & (part < PARTS)
    async_copy.async_copy_global_to_shared(target, parts + (at[:, None] + columns[None, :]), mask=live[:, None])
    async_copy.commit_group()


@gluon.jit
def _copy_weights(w_uv, target):
    value = gl.arange(0, V // BLOCKS, gl.SliceLayout(1, _WEIGHT_LINES))
    inner = gl.arange(0, LATENT, gl.SliceLayout(0, _WEIGHT_LINES))
    async_copy.async_copy_global_to_shared(target, w_uv + (value * LATENT)[:, None] + inner[None, :])
    async_copy.commit_group()


@gluon.jit
def _context(base, EACH: gl.constexpr):
    """The rows' merged contexts [quarter, latent of it, row] as the right operand."""
    quarter = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, _RIGHT)))
    k = gl.arange(0, LATENT // 4, gl.SliceLayout(0, gl.SliceLayout(2, _RIGHT)))
    row = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, _RIGHT))) % EACH
    at = gl.expand_dims(gl.expand_dims(quarter, 1), 2) * (LATENT // 2) + gl.expand_dims(gl.expand_dims(k, 0), 2) * 2
    at = base + at + gl.expand_dims(gl.expand_dims(row, 0), 1) * _ROW
    return gl.inline_asm_elementwise(_LOAD_PAIR, "=r,r,r", [at], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def up_project_parts_kernel(
    parts, lse, w_uv, layer, out,
    ROWS: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, S: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Grid (blocks, heads, groups of rows). parts [rows, PARTS, heads, 512], lse [rows, PARTS, heads] -> out [rows, heads, 256]."""
    P: gl.constexpr = _by_row(S, EACH)
    M: gl.constexpr = gl.SliceLayout(1, P)
    rows_parts: gl.constexpr = gl.SliceLayout(2, P)
    base = own_memory(EACH * _ROW, EACH * LATENT * 2)
    cluster_start(BLOCKS)
    block, head, first_row = gl.program_id(0), gl.program_id(1), gl.program_id(2) * EACH
    part = gl.allocate_shared_memory(gl.float32, [EACH * S, 64], _PARTS)
    weights = gl.allocate_shared_memory(gl.bfloat16, [V // BLOCKS, LATENT], _WEIGHTS)
    row = first_row + gl.arange(0, EACH, gl.SliceLayout(1, rows_parts))
    number = gl.arange(0, S, gl.SliceLayout(0, rows_parts))
    live = (row < ROWS)[:, None] & (number < PARTS)[None, :]
    at = (row * (PARTS * HEADS) + head)[:, None] + (number * HEADS)[None, :]
    log_sum = gl.load(lse + at, mask=live, other=float("-inf")) * _LOG2E
    start = (layer_of(layer).to(gl.int64) * HEADS + head) * (V * LATENT) + block * (V // BLOCKS * LATENT)
    _copy_parts(parts, part, first_row, head, block, ROWS, HEADS, PARTS, S, EACH)
    _copy_weights(w_uv + start, weights)
    # Where nothing is selected the peak is -inf: subtract 0 there, or -inf - -inf makes NaN.
    peak = gl.max(log_sum, 1)
    weight = gl.exp2(log_sum - gl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = gl.sum(weight, 1)
    total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, M))
    async_copy.wait_group(1)
    gl.thread_barrier()
    merged = gl.sum(part.reshape([EACH, S, 64]).load(P) * weight[:, :, None], 1)
    merged = (merged / total[:, None]).to(gl.bfloat16)
    column = block * 64 + gl.arange(0, 64, gl.SliceLayout(0, M))
    place = base + (gl.arange(0, EACH, gl.SliceLayout(1, M)) * _ROW)[:, None] + (column * 2)[None, :]
    barrier = base + EACH * _ROW
    cluster_wait()
    given = [merged, place, barrier + place * 0]
    COPIES: gl.constexpr = 2 if EACH == 8 else 4
    for i in gl.static_range(8 // COPIES):
        gl.inline_asm_elementwise(
            _send(i, COPIES), "=r,r,r,r,r,r,r,r,r,r,r", given, dtype=gl.int8, is_pure=False, pack=4
        )
    async_copy.wait_group(0)
    await_sent(barrier)
    gl.thread_barrier()
    left = weights.reshape([V // BLOCKS, 4, LATENT // 4]).permute((1, 0, 2)).load(_LEFT)
    zero = gl.full([4, V // BLOCKS, COLUMNS], 0.0, gl.float32, _MMA)
    values = gl.sum(mma_v2(left, _context(base, EACH), zero), 0)
    OUT: gl.constexpr = values.type.layout
    value = head * V + block * (V // BLOCKS) + gl.arange(0, V // BLOCKS, gl.SliceLayout(1, OUT))
    own = gl.arange(0, COLUMNS, gl.SliceLayout(0, OUT))
    row = first_row + own
    live = (row < ROWS) & (own < EACH)
    gl.store(out + value[:, None] + (row * (HEADS * V))[None, :], values.to(gl.bfloat16), mask=live[None, :])


def up_project(spec: Spec, parts: jax.Array, lse: jax.Array, w_uv: jax.Array, layer: int | jax.Array) -> jax.Array:
    """parts float32 [rows, parts, heads, 512] with their log-sums -> values [rows, heads * 256]."""
    # Measured with eight heads: 2 rows 3.68 us in a cluster for eight, 3.34 in one for four; 8 rows 3.42, in two of these 4.05.
    each = 4 if spec.rows <= 4 and spec.heads <= 8 else 8
    return jax_triton.triton_call(
        parts, lse, w_uv, layer_argument(layer), kernel=up_project_parts_kernel, grid=(8, spec.heads, -(-spec.rows // each)),
        name="mla_up_project_parts", num_warps=8, **triton_options(),
        out_type=jax.ShapeDtypeStruct((spec.rows, spec.heads * spec.v), w_uv.dtype),
        ROWS=spec.rows, HEADS=spec.heads, PARTS=spec.parts, EACH=each, S=max(16 // each, 1 << (spec.parts - 1).bit_length()),
    )  # fmt: skip


def run(
    spec: Spec, parts: jax.Array, w_uv: jax.Array, o_proj: Weight, layer: int | jax.Array, lse: jax.Array
) -> jax.Array:
    return fp8_linear.linear(up_project(spec, parts, lse, w_uv, layer), o_proj, (layer,), arithmetic=spec.arithmetic)
