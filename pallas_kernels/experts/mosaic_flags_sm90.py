"""Numbers that programs of one launch give each other through global memory, in Pallas Mosaic GPU: no fence, no counter.

A word is 32 bits: a bfloat16 above, the launch's epoch below. Whoever reads it sees by the epoch that the number is there, and
looks again until it is. An epoch (1 .. 65535) must not have been written to these words before: they are zeroed once for many
launches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS

# Some 2 s of looks, 0.7 us each: a launch that waits for what never comes ends in an error.
MOST_POLLS = 1 << 21
_ROWS = 8


def stamped(values: jax.Array, epoch: Any) -> jax.Array:
    """float32 values, rounded once to bfloat16, as words of that epoch; to be stored like any array."""
    bits = lax.bitcast_convert_type(values.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32)
    return bits | epoch


def value_of(words: jax.Array) -> jax.Array:
    """The float32 values, which are bfloat16 numbers, of words that have come."""
    return lax.bitcast_convert_type(words & jnp.int32(-65536), jnp.float32)


def words_of(ref: Any, starts: Any, offsets: list[Any], epoch: Any) -> list[jax.Array]:
    """[8, 128] words, in the layout GROUPS, for each of ``offsets``: row r is ref[starts[r] + offset : ... + 128].

    ref: flat int32 in global memory; starts: int32 [8] in shared memory, written and ordered (``commit_smem``)
    before, multiples of 4 as the offsets are. Returns when all words have come; each thread looks for its own, so all loads are
    under way together.
    """
    shape = plgpu.ShapeDtypeStruct((_ROWS, BLOCK), jnp.int32, layout=GROUPS)
    scalar = plgpu.Layout.WG_SPLAT
    kinds = (plgpu.RefType(), plgpu.RefType(), scalar, [scalar] * len(offsets))

    @plgpu.inline_mgpu(arg_types=kinds, return_type=[shape] * len(offsets))
    def load(_: Any, ref: Any, starts: Any, epoch: Any, offsets: list[Any]) -> list[Any]:
        epoch = scalar_of(epoch)
        row, column = _place()
        start = arith.addi(memref.load(starts, [row]), column)
        pointers = [pointer_to(ref, arith.addi(start, scalar_of(offset))) for offset in offsets]
        first = [utils.inline_ptx(_LOOK, p, result_types=[epoch.type] * 8, has_side_effects=True) for p in pointers]
        kind = ir.VectorType.get((_ROWS,), epoch.type)
        last = [_look_again(p, words, epoch) for p, words in zip(pointers, first, strict=True)]
        return [_array(vector.from_elements(kind, list(words)), True) for words in last]

    return load(ref, starts, jnp.int32(epoch), [jnp.int32(offset) for offset in offsets])


def rows_of(ref: Any, block: Any) -> jax.Array:
    """A k-block [8, 128] of ref [rows, blocks, 128], in the layout GROUPS; rows that there are not repeat the last."""
    shape = plgpu.ShapeDtypeStruct((_ROWS, BLOCK), ref.dtype, layout=GROUPS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=shape)
    def load(_: Any, ref: Any, block: Any) -> Any:
        index, (row, column) = ir.IndexType.get(), _place()
        row = arith.minui(row, utils.c(ir.MemRefType(ref.type).shape[0] - 1, index))
        kind = ir.VectorType.get((_ROWS,), ir.MemRefType(ref.type).element_type)
        place = [row, arith.index_cast(index, scalar_of(block)), arith.index_cast(index, column)]
        return _array(vector.load(kind, ref, place), None)

    return load(ref, jnp.int32(block))


def store_columns(values: jax.Array, ref: Any, slots: Any, columns: Any, first: Any) -> None:
    """The first ``columns`` columns of values [64, 8], of wgmma's layout: column c to ref[slots[c], first : first + 64].

    ref: float32 in global memory; slots: int32 [8] in shared memory, written and ordered before. Each thread stores what it has:
    the eight neighbouring rows of a column that a warp has are a sector.
    """
    scalar = plgpu.Layout.WG_SPLAT
    kinds = (plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType(), scalar, scalar)

    @plgpu.inline_mgpu(arg_types=kinds)
    def store(_: Any, values: Any, ref: Any, slots: Any, columns: Any, first: Any) -> None:
        i32, places = ir.IntegerType.get_signless(32), []
        values.foreach(lambda value, place: places.append((value, *place)))
        across = utils.c(ir.MemRefType(ref.type).shape[1], i32)
        base = utils.memref_ptr(ref)
        rows = [memref.load(slots, [column]) for _, _, column in places]
        for (value, row, column), slot in zip(places, rows, strict=True):
            element = arith.addi(arith.muli(slot, across), arith.addi(scalar_of(first), arith.index_cast(i32, row)))
            live = arith.cmpi(arith.CmpIPredicate.slt, arith.index_cast(i32, column), scalar_of(columns))
            pointer = utils.getelementptr(base, [element], values.mlir_dtype)
            utils.inline_ptx("st.f32 [$0], $1;", pointer, value, predicate=live)

    store(values, ref, slots, jnp.int32(columns), jnp.int32(first))


_LOOK = "ld.relaxed.gpu.v4.b32 {$0, $1, $2, $3}, [$8]; ld.relaxed.gpu.v4.b32 {$4, $5, $6, $7}, [$8+16];"
# Operands: 0 to 7 the words, 8 the address, 9 the epoch, 10 to 17 the words of the first look. Results are written last.
# ``bad`` gathers all differences; its lower half is zero where all epochs are right.
_LOOK_AGAIN = (
    "{ .reg .pred p; .reg .b32 t, bad, n; .reg .b32 w<8>; mov.b32 n, 0;"
    + "".join(f"mov.b32 w{i}, ${10 + i};" for i in range(8))
    + "LOOK: mov.b32 bad, 0;"
    + "".join(f"xor.b32 t, w{i}, $9; or.b32 bad, bad, t;" for i in range(8))
    + "and.b32 bad, bad, 65535; setp.eq.u32 p, bad, 0; @p bra HERE;"
    + "ld.relaxed.gpu.v4.b32 {w0, w1, w2, w3}, [$8]; ld.relaxed.gpu.v4.b32 {w4, w5, w6, w7}, [$8+16];"
    + f"add.u32 n, n, 1; setp.lt.u32 p, n, {MOST_POLLS}; @p bra LOOK; trap; HERE:"
    + "".join(f"mov.b32 ${i}, w{i};" for i in range(8))
    + "}"
)


def _look_again(pointer: Any, words: tuple[Any, ...], epoch: Any) -> tuple[Any, ...]:
    """words where all have come; else loads them until they have, or traps."""
    kinds = [epoch.type] * 8
    return utils.inline_ptx(_LOOK_AGAIN, pointer, epoch, *words, result_types=kinds, has_side_effects=True)


def scalar_of(array: Any) -> Any:
    """The one value of an array that is the same everywhere."""
    return array.registers.flat[0]


def _place() -> tuple[Any, Any]:
    """(row as an index, first of eight columns) of this thread in the layout GROUPS."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(128, i32))
    row = arith.index_cast(ir.IndexType.get(), arith.divui(thread, utils.c(16, i32)))
    return row, arith.muli(arith.remui(thread, utils.c(16, i32)), utils.c(8, i32))


def pointer_to(ref: Any, element: Any) -> Any:
    """Address of an element of an int32 array, counted as if it were flat."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.getelementptr(utils.memref_ptr(ref), [element], i32)


def _array(eight: Any, is_signed: bool | None) -> Any:
    """A vector of eight of every thread as [8, 128] of the layout GROUPS."""
    layout = GROUPS.to_mgpu()
    registers = np.full(layout.registers_shape((_ROWS, BLOCK)), eight, dtype=object)
    assert registers.size == 1, registers.shape
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)
