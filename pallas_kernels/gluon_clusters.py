"""Blocks of a Hopper cluster that write into each other's shared memory, for Gluon kernels compiled one block at a time.

A kernel calls ``own_memory``, then ``cluster_start``; ``cluster_wait`` before it first writes to another block; it sends with PTX
of its own (``st.async``, which counts the bytes that arrive at the receiver's barrier) and waits for what it is sent with
``await_sent``. Blocks of a cluster are neighbours along the grid's first axis. Nothing here is a fence: a release at the
cluster's scope (``barrier.cluster.arrive`` as it is by default) becomes a MEMBAR.GPU, which waits for all that a thread wrote.
``jax_gluon`` reads the marks in the comments.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.gluon_shared import own_shared

_WAIT = gl.constexpr("{ barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0; }")
# Bounded: a block that waits in vain traps.
_AWAIT = gl.constexpr("""{
 .reg .pred p;
 .reg .b32 n;
 mov.u32 n, 0;
again:
 mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$1], 0;
 @p bra done;
 add.u32 n, n, 1;
 setp.lt.u32 p, n, 1000000;
 @p bra again;
 trap;
done:
 mov.u32 $0, 0;
}""")


@gluon.constexpr_function
def _prepare(SIZE):
    return f"""{{
 .reg .pred p;
 .reg .b32 t;
 .reg .b64 s;
 mov.u32 t, %tid.x;
 setp.eq.u32 p, t, 0;
 @p mbarrier.init.shared::cta.b64 [$1], 1;
 @p mbarrier.arrive.expect_tx.shared::cta.b64 s, [$1], {SIZE};
 fence.mbarrier_init.release.cluster;
 mov.u32 $0, 0;
}}"""


@gluon.constexpr_function
def _arrive(BLOCKS):
    return f"{{ // blocks of a cluster: {BLOCKS}\n barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0; }}"


@gluon.jit
def own_memory(SIZE: gl.constexpr, SENT: gl.constexpr):
    """Address of SIZE bytes of shared memory, the same in all blocks; behind them the barrier that awaits SENT bytes."""
    gl.static_assert(SIZE % 8 == 0)
    base = own_shared(SIZE + 8)
    gl.inline_asm_elementwise(_prepare(SENT), "=r,r", [base + SIZE], dtype=gl.uint32, is_pure=False, pack=1)
    return base


@gluon.jit
def cluster_start(BLOCKS: gl.constexpr):
    gl.inline_asm_elementwise(_arrive(BLOCKS), "=r", [], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def cluster_wait():
    """Until every block of the cluster has started."""
    gl.inline_asm_elementwise(_WAIT, "=r", [], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def await_sent(barrier):
    """Until the bytes that this block is sent are there."""
    gl.inline_asm_elementwise(_AWAIT, "=r,r", [barrier], dtype=gl.uint32, is_pure=False, pack=1)
