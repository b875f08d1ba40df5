"""Operands of a Triton product that are loaded in one round."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loaded(x):
    """bfloat16 x as it is, but put into shared memory for a product only behind the barrier that its caller places before it.

    Triton puts an operand there directly behind its load, and ptxas even between the loads of one operand, to save registers:
    each such store waits for a memory latency before the next loads start. No load moves behind a barrier, and no instruction
    called impure in front of one (8 rows of 8 heads: 4.0 us before, 3.5 so).
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
