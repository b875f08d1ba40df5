"""Partials of few heads merged by a cluster: a block has one share of the keys and sends every head to the block that merges it.

Shared memory of a block: [senders, own heads, 512] float32 and behind it their log2 sums [senders, own heads].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.gluon_clusters import await_sent
from pallas_kernels.sparse_mla.gluon_few_layouts import out_words

_COLUMNS = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
_RANK = gl.constexpr("mov.u32 $0, %cluster_ctarank;")
# pack 4: four neighbouring values ($1 to $4) to the address $5 of the block $9, whose barrier is at $13.
_SEND = gl.constexpr("""{
 .reg .b32 a, m;
 mapa.shared::cluster.u32 a, $5, $9;
 mapa.shared::cluster.u32 m, $13, $9;
 st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [a], {$1, $2, $3, $4}, [m];
 mov.u32 $0, 0;
}""")
# The first four threads have all heads, each once.
_SEND_ONE = gl.constexpr("""{
 .reg .pred p;
 .reg .b32 a, m, t;
 mov.u32 t, %tid.x;
 setp.lt.u32 p, t, 4;
 mapa.shared::cluster.u32 a, $2, $3;
 mapa.shared::cluster.u32 m, $4, $3;
 @p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], $1, [m];
 mov.u32 $0, 0;
}""")
_LOAD4 = gl.constexpr("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];")
_LOAD = gl.constexpr("ld.shared.f32 $0, [$1];")


@gluon.jit
def cluster_rank():
    return gl.inline_asm_elementwise(_RANK, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_values(x, base, me, group: gl.constexpr, H: gl.constexpr, CLUSTER: gl.constexpr):
    """x [H, 128] in out_words(H), whose threads have four neighbouring latents: every head to its block."""
    OUT: gl.constexpr = out_words(H)
    OWN: gl.constexpr = H // CLUSTER
    head = gl.arange(0, H, gl.SliceLayout(1, OUT))
    column = group * 128 + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    at = (base + (me * OWN + head % OWN) * 2048)[:, None] + (column * 4)[None, :]
    block = (head // OWN)[:, None] + (column * 0)[None, :]
    barrier = base + H * 2052 + at * 0
    x = x.to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        _SEND, "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [x, at, block, barrier], dtype=gl.int8, is_pure=False, pack=4
    )


@gluon.jit
def send_log_sums(log_sum, base, me, HEADS: gl.constexpr, H: gl.constexpr, CLUSTER: gl.constexpr):
    """log_sum [H] in the layout HEADS of the accumulators' columns."""
    OWN: gl.constexpr = H // CLUSTER
    head = gl.arange(0, H, HEADS)
    at = base + H * 2048 + (me * OWN + head % OWN) * 4
    given = [log_sum.to(gl.int32, bitcast=True), at, head // OWN, base + H * 2052 + at * 0]
    gl.inline_asm_elementwise(_SEND_ONE, "=r,r,r,r,r", given, dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _log_sum(base, sender, own, H: gl.constexpr, OWN: gl.constexpr):
    at = base + H * 2048 + (sender * OWN + own) * 4
    return gl.inline_asm_elementwise(_LOAD, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _merged(base, own: gl.constexpr, H: gl.constexpr, CLUSTER: gl.constexpr):
    """([512], log2 sum) of one of this block's heads."""
    OWN: gl.constexpr = H // CLUSTER
    column = gl.arange(0, 512, _COLUMNS) * 4
    peak = _log_sum(base, 0, own, H, OWN)
    for s in gl.static_range(1, CLUSTER):
        peak = gl.maximum(peak, _log_sum(base, s, own, H, OWN))
    # Where nothing is selected the peak is -inf: subtract 0 there, or -inf - -inf makes NaN.
    safe = gl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    merged = gl.full([512], 0.0, gl.float32, _COLUMNS)
    for s in gl.static_range(CLUSTER):
        weight = gl.exp2(_log_sum(base, s, own, H, OWN) - safe)
        at = column + (base + (s * OWN + own) * 2048)
        x = gl.inline_asm_elementwise(_LOAD4, "=f,=f,=f,=f,r,r,r,r", [at], dtype=gl.float32, is_pure=False, pack=4)
        total += weight
        merged += weight * x
    return merged / gl.where(total > 0, total, 1.0), peak + gl.log2(total)


@gluon.jit
def store_merged(context, lse, heads, base, me, LSE_FACTOR: gl.constexpr, H: gl.constexpr, CLUSTER: gl.constexpr):
    """Awaits what the cluster sends and writes this block's heads of the first ``heads``."""
    await_sent(base + H * 2052)
    for own in gl.static_range(H // CLUSTER):
        merged, log_sum = _merged(base, own, H, CLUSTER)
        head = me * (H // CLUSTER) + own
        column = gl.arange(0, 512, _COLUMNS)
        live = (column >= 0) & (head < heads)
        gl.store(context + head * 512 + column, merged.to(context.dtype.element_ty), mask=live)
        gl.store(lse + head, log_sum * LSE_FACTOR, mask=head < heads)
