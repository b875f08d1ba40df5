"""What the one launch of several rows needs of single threads, in PTX: its list of items, a barrier without a fence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts.mosaic_flags_sm90 import pointer_to
from pallas_kernels.experts.mosaic_plan import UNIT

_THREADS = 128
_SPLAT = plgpu.Layout.WG_SPLAT
_NUMBER = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SPLAT)
# Operands: 1 the address, 2 whether to load; else 0.
_LOAD = "{ .reg .pred p; .reg .b32 v; setp.ne.u32 p, $2, 0; mov.b32 v, 0; @p ld.global.b32 v, [$1]; mov.b32 $0, v; }"
# Operands: an expert, pairs before it and up to it, items before it and up to it, address of the list.
_LIST = (
    "{ .reg .pred q; .reg .b32 n, place, left, at; mov.b32 n, $3; mov.b32 place, $1;"
    "NEXT: setp.ge.s32 q, n, $4; @q bra DONE;"
    f"mad.lo.s32 at, n, 12, $5; sub.s32 left, $2, place; min.s32 left, left, {UNIT};"
    "st.shared.b32 [at+12], $0; st.shared.b32 [at+16], place; st.shared.b32 [at+20], left;"
    f"add.s32 n, n, 1; add.s32 place, place, {UNIT}; bra NEXT; DONE: bar.warp.sync 0xffffffff; }}"
)


def list_items(table: Any, here: Any, experts: int, rows: int, most: int) -> jax.Array:
    """Writes (expert, first place in the order, rows) of each item to ``here``, flat in shared memory; returns how many there are.

    The first is (-1, 0, rows), of the shared expert; there are ``most`` at most. table: int32 in global memory, pairs up to and
    with each expert, then items up to and with each. A thread looks at experts of its own, all loads are under way together.
    To be ordered (``meet``) before it is read.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=_NUMBER)
    def write(_: Any, table: Any, here: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        zero, one = utils.c(0, i32), utils.c(1, i32)
        thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))

        def look(element: Any, known: Any) -> Any:
            return utils.inline_ptx(_LOAD, pointer_to(table, element), known, result_types=i32, has_side_effects=True)

        found = []
        for first in range(0, experts, _THREADS):
            expert = arith.addi(thread, utils.c(first, i32))
            inside = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.slt, expert, utils.c(experts, i32)))
            behind = arith.andi(inside, arith.extui(i32, arith.cmpi(arith.CmpIPredicate.sgt, expert, zero)))
            # Pairs, then items.
            starts = [arith.addi(expert, utils.c(start, i32)) for start in (0, experts)]
            ends = [(look(arith.subi(at, one), behind), look(at, inside)) for at in starts]
            found.append((expert, *ends[0], *ends[1]))
        count = arith.minsi(look(utils.c(2 * experts - 1, i32), one), utils.c(most - 1, i32))
        base = utils.memref_ptr(here)
        for *numbers, last in found:
            operands = (*numbers, arith.minsi(last, count), base)
            utils.inline_ptx(_LIST, *operands, has_side_effects=True, convergent=True)
        first_thread = arith.cmpi(arith.CmpIPredicate.eq, thread, zero)
        for n, value in enumerate((-1, 0, rows)):
            utils.inline_ptx(f"st.shared.b32 [$0+{4 * n}], $1;", base, utils.c(value, i32), predicate=first_thread)
        return _splat(arith.addi(count, one))

    return write(table, here)


def meet() -> None:
    """All threads of the warpgroup have come here, and see what the others have written. Not for what copies or wgmma then read.

    ``plgpu.commit_smem`` is for that.
    """

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        utils.warpgroup_barrier()

    wait()


def _splat(value: Any) -> Any:
    """A number of every thread as an array without dimensions."""
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)
