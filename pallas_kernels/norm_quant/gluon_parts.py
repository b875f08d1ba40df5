"""The weighted sum of the experts' parts, the residual add and the RMSNorm in one launch, for Hopper: a cluster of blocks a row.

Each block sums its share of the columns and sends the sums of squares of its groups of 128 to every block of the row. All that a
block reads is under way before any of it is used. Sums are taken in the order of ``Parts.summed`` and of ``triton.row_kernel``, so
that the bits are those of the two launches.
"""

from __future__ import annotations

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels import jax_gluon
from pallas_kernels.gluon_clusters import await_sent, cluster_start, cluster_wait, own_memory
from pallas_kernels.gluon_layer import layer_of
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import triton_options
from pallas_kernels.norm_quant.spec import Spec
from pallas_kernels.parts import Parts

jax_gluon.install()
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_LOAD = gl.constexpr("ld.shared.f32 $0, [$1];")


@gluon.constexpr_function
def _parts(K, HELD):
    """[choices, groups, 128]: sixteen threads a group, eight neighbouring columns of every choice each."""
    return gl.BlockedLayout([K, 1, 8], [1, 2, 16], [1, HELD // 2, 1], [2, 1, 0])


@gluon.constexpr_function
def _all_groups(PADDED, ROW_WARPS, WARPS):
    """[PADDED] in every warp, laid out so that a sum adds in the order of ``triton.row_kernel``, whose warps have two groups each:
    in a thread those 2 * ROW_WARPS apart, then neighbours, then warps, far ones first."""
    inside = min(PADDED, 2 * ROW_WARPS)
    registers = [[inside << i] for i in range((PADDED // inside).bit_length() - 1)]
    # A sum over lanes begins with the highest bit.
    bits = [1, *(inside >> i for i in range(1, inside.bit_length() - 1))]
    lanes = [[bit] for bit in (bits + [0] * (5 - len(bits)))[::-1]]
    return gl.DistributedLinearLayout(registers, lanes, [[0]] * (WARPS.bit_length() - 1), [], [PADDED])


@gluon.constexpr_function
def _send(CLUSTER):
    """PTX: $1 to the address $2 of every block where $3, a block from each of the first threads of a group; barrier at $4."""
    return f"""{{
 .reg .pred p;
 .reg .b32 a, m, t;
 mov.u32 t, %laneid;
 and.b32 t, t, 15;
 setp.lt.u32 p, t, {CLUSTER};
 setp.ne.and.u32 p, $3, 0, p;
 and.b32 t, t, {CLUSTER - 1};
 mapa.shared::cluster.u32 a, $2, t;
 mapa.shared::cluster.u32 m, $4, t;
 @p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], $1, [m];
 mov.u32 $0, 0;
}}"""


@gluon.jit
def _square_sum(
    squares, own, block, base, GROUPS: gl.constexpr, EACH: gl.constexpr, HELD: gl.constexpr, CLUSTER: gl.constexpr,
    ROW_WARPS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """The sum of the squares of all groups of the row; squares [HELD]: of this block's groups."""
    ALL: gl.constexpr = _all_groups(PADDED, ROW_WARPS, HELD // 2)
    at = base + (block * EACH + own) * 4
    barrier = base + GROUPS * 4
    cluster_wait()
    given = [squares.to(gl.int32, bitcast=True), at, (own < EACH).to(gl.int32), barrier + own * 0]
    gl.inline_asm_elementwise(_send(CLUSTER), "=r,r,r,r,r", given, dtype=gl.uint32, is_pure=False, pack=1)
    await_sent(barrier)
    group = gl.arange(0, PADDED, ALL)
    at = base + gl.minimum(group, GROUPS - 1) * 4
    found = gl.inline_asm_elementwise(_LOAD, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)
    return gl.sum(gl.where(group < GROUPS, found, 0.0), 0)


@gluon.jit
def add_parts_norm_kernel(
    parts, ids, weights, x, norm, layer, total, out,
    ROWS: gl.constexpr, K: gl.constexpr, EXPERTS: gl.constexpr, WIDTH: gl.constexpr, EPS: gl.constexpr,
    CLUSTER: gl.constexpr, EACH: gl.constexpr, HELD: gl.constexpr, ROW_WARPS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Grid (CLUSTER, rows). parts [ROWS * K + ROWS, WIDTH]; a block has EACH groups of 128 columns, HELD with padding."""
    P: gl.constexpr = _parts(K, HELD)
    CHOICES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, P))
    L: gl.constexpr = gl.SliceLayout(0, P)
    GROUPS: gl.constexpr = WIDTH // 128
    base = own_memory(GROUPS * 4, GROUPS * 4)
    cluster_start(CLUSTER)
    block, row = gl.program_id(0), gl.program_id(1)
    own = gl.arange(0, HELD, gl.SliceLayout(1, L))
    # What is held twice is stored once. A load that may not be executed would wait for others.
    inside = gl.arange(0, 128, gl.SliceLayout(0, L))
    column = (block * EACH + gl.minimum(own, EACH - 1))[:, None] * 128 + inside[None, :]
    choice = row * K + gl.arange(0, K, CHOICES)
    held = gl.load(parts + gl.expand_dims(gl.expand_dims(choice * WIDTH, 1), 2) + gl.expand_dims(column, 0))
    shared = gl.load(parts + ((ROWS * K + row) * WIDTH + column))
    before = gl.load(x + (row * WIDTH + column))
    factor = gl.load(norm + layer_of(layer).to(gl.int64) * WIDTH + column)
    chosen, weight = gl.load(ids + choice), gl.load(weights + choice)
    # Through shared memory, so that all is asked for before anything is used: the compiler would have loads wait for each other,
    # which takes fewer registers.
    chosen_here = gl.allocate_shared_memory(gl.int32, [K], _FLAT, chosen)
    weight_here = gl.allocate_shared_memory(gl.float32, [K], _FLAT, weight)
    gl.thread_barrier()
    chosen, weight = chosen_here.load(CHOICES), weight_here.load(CHOICES)
    # Parts of choices that are no expert's were never written. What stands between product and sum keeps them two roundings.
    placed = gl.expand_dims(gl.expand_dims((chosen >= 0) & (chosen < EXPERTS), 1), 2)
    summed = gl.sum(gl.where(placed, gl.expand_dims(gl.expand_dims(weight, 1), 2) * held, 0.0), 0)
    delta = (summed + shared).to(gl.bfloat16)
    rounded = (before.to(gl.float32) + delta.to(gl.float32)).to(gl.bfloat16)
    y = rounded.to(gl.float32)
    live = (own < EACH)[:, None] & (column >= 0)
    square = _square_sum(gl.sum(y * y, 1), own, block, base, GROUPS, EACH, HELD, CLUSTER, ROW_WARPS, PADDED)
    gl.store(total + (row * WIDTH + column), rounded, mask=live)
    y = y * gl.rsqrt(square / WIDTH + EPS) * factor.to(gl.float32)
    gl.store(out + (row * WIDTH + column), y.to(gl.bfloat16), mask=live)


def sizes_of(spec: Spec, parts: Parts, cluster: int) -> dict[str, int | float]:
    """The kernel's, for ``cluster`` blocks a row."""
    groups = spec.width // 128
    each = groups // cluster
    return {
        **{"ROWS": spec.rows, "K": spec.parts, "EXPERTS": parts.experts, "WIDTH": spec.width, "EPS": spec.eps},
        **{"CLUSTER": cluster, "EACH": each, "HELD": max(2, 1 << (each - 1).bit_length())},
        **{"ROW_WARPS": 16 if spec.width > 2048 else 4, "PADDED": 1 << (groups - 1).bit_length()},
    }


def run(
    spec: Spec, x: jax.Array, parts: Parts, weight: jax.Array, layer: int | jax.Array, cluster: int = 8
) -> tuple[jax.Array, jax.Array]:
    """As ``norm_quant.add_norm``. cluster: blocks a row."""
    sizes = sizes_of(spec, parts, cluster)
    row = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = jax_triton.triton_call(
        parts.parts, parts.ids, parts.weights, x, weight, layer_argument(layer), kernel=add_parts_norm_kernel,
        out_type=(row, row), grid=(cluster, spec.rows), name="add_parts_norm", num_warps=sizes["HELD"] // 2,
        **triton_options(), **sizes,
    )  # fmt: skip
    return total, normed
