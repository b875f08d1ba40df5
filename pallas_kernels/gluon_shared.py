"""Shared memory by address, in Gluon; SM80 to SM120. Words are 32 bits, places bytes.

What a program does to a word here its other threads see behind ``thread_barrier``, those of its warp behind ``warp_barrier``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.jax_gluon import BEHIND

_PUT_TWO = gl.constexpr("st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0;")
_PUT_IF = gl.constexpr("{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }")
_PUT_TWO_IF = gl.constexpr("{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }")
_GET = gl.constexpr("ld.shared.b32 $0, [$1];")
_GET_TWO = gl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")
_GET_FOUR = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
_WARP = gl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, 0;")


@gluon.constexpr_function
def _declare(SIZE):
    return f"{{ // bytes behind: {SIZE}\n mov.u32 $0, global_smem; add.u32 $0, $0, {BEHIND}; }}"


@gluon.jit
def own_shared(SIZE: gl.constexpr):
    """Address of SIZE bytes of shared memory, the same in all blocks; once a kernel. ``jax_gluon`` reads the mark in the PTX."""
    return gl.inline_asm_elementwise(_declare(SIZE), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warp_barrier():
    """Of a warp's shared memory. ptxas moves no load across it, and it costs nothing."""
    gl.inline_asm_elementwise(_WARP, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_two(at, a, b):
    given = [at, a.to(gl.int32, bitcast=True), b.to(gl.int32, bitcast=True)]
    gl.inline_asm_elementwise(_PUT_TWO, "=r,r,r,r", given, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_if(at, a, known):
    given = [at, a.to(gl.int32, bitcast=True), known.to(gl.int32)]
    gl.inline_asm_elementwise(_PUT_IF, "=r,r,r,r", given, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_two_if(at, a, b, known):
    given = [at, a.to(gl.int32, bitcast=True), b, known.to(gl.int32)]
    gl.inline_asm_elementwise(_PUT_TWO_IF, "=r,r,r,r,r", given, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def get_word(at):
    return gl.inline_asm_elementwise(_GET, "=r,r", [at], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def get_number(at):
    return gl.inline_asm_elementwise(_GET, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def get_two_words(at):
    return gl.inline_asm_elementwise(_GET_TWO, "=r,=r,r", [at], dtype=(gl.uint32, gl.uint32), is_pure=False, pack=1)


@gluon.jit
def get_number_and_word(at):
    return gl.inline_asm_elementwise(_GET_TWO, "=f,=r,r", [at], dtype=(gl.float32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def get_four_counts(at):
    kinds: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(_GET_FOUR, "=r,=r,=r,=r,r", [at], dtype=kinds, is_pure=False, pack=1)


@gluon.jit
def get_four_numbers(at):
    kinds: gl.constexpr = (gl.float32, gl.float32, gl.float32, gl.float32)
    return gl.inline_asm_elementwise(_GET_FOUR, "=f,=f,=f,=f,r", [at], dtype=kinds, is_pure=False, pack=1)
