"""Histograms in shared memory for Triton kernels: three planes of counts that inline PTX declares and adds to.

Triton's own histogram only counts, by ballots: 64 instructions an element for 2048 bins. An element that two threads hold
would count twice: blocks are at least as long as a program has threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

BINS = tl.constexpr(2048)
# Behind the planes a word for what is not live: a predicate would become a branch around every addition.
_TRASH = tl.constexpr(3 * 2048)
_DECLARE = tl.constexpr("{ .shared .align 16 .b32 sample_bins[6148]; mov.u32 $0, sample_bins; }")
_CLEAR = tl.constexpr("{ st.shared.u32 [$1], 0; mov.u32 $0, 0; }")
_ADD = tl.constexpr("{ red.shared.add.u32 [$1], $2; mov.u32 $0, 0; }")
_LOAD = tl.constexpr("ld.shared.u32 $0, [$1];")


@triton.jit
def declare():
    """Address of the bins; call it once in a kernel."""
    return tl.inline_asm_elementwise(_DECLARE, "=r", [], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def clear(bins):
    at = tl.arange(0, BINS).to(tl.uint32) * 4
    for plane in tl.static_range(3):
        tl.inline_asm_elementwise(
            _CLEAR, "=r,r", [bins + plane * 8192 + at], dtype=tl.uint32, is_pure=False, pack=1
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def add(bins, PLANE: tl.constexpr, digit, amount, live):
    """Adds uint32 amounts to bins of a plane; ``read`` waits for all of them."""
    address = bins + 4 * tl.where(live, digit + PLANE * BINS, _TRASH).to(tl.uint32)
    tl.inline_asm_elementwise(_ADD, "=r,r,r", [address, amount], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def read(bins, PLANE: tl.constexpr):
    """uint32 [BINS] of a plane."""
    tl.debug_barrier()
    at = bins + PLANE * 8192 + tl.arange(0, BINS).to(tl.uint32) * 4
    return tl.inline_asm_elementwise(_LOAD, "=r,r", [at], dtype=tl.uint32, is_pure=False, pack=1)
