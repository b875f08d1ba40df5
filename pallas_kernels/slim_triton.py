"""A short key for every launch of jax-triton, which costs host time in every run of a program.

XLA initializes each custom call of a program in each run, also where a CUDA graph replays them, and jaxlib then looks the kernel
up by the whole of its serialized form. Most of that is of no use to a launch: the text of Triton's IR (two thirds) and the PTX'
line table. Without them the collectives' keys are 2 to 3 KB, not 11 to 19. Measured with the long keys, on four GPUs: 11 us a node
for 11 KB, 16 for 19 KB; on two: 4 and 8. With short ones a decode step of 599 launches is queued on four GPUs in 4.1 ms, 7 us a
node.
Source: TritonKernelCallFfiInitialize in jaxlib, CommandBufferThunk::Initialize and CustomCallThunk::Initialize in XLA.
"""

from __future__ import annotations

import os
from typing import Any

from jax_triton import triton_lib
from triton import knobs


class _Library:
    """jaxlib's Triton bindings, except that a kernel is kept without the text of Triton's IR, which only dumps read."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def TritonKernel(
        self, name: str, num_warps: int, num_ctas: int, shared: int, binary: Any, ir: str, *rest: Any
    ) -> Any:
        return self._real.TritonKernel(name, num_warps, num_ctas, shared, binary, "", *rest)


def install() -> None:
    """Once for the process. TRITON_DISABLE_LINE_INFO=0 keeps the line tables, for profilers that show source lines."""
    if "TRITON_DISABLE_LINE_INFO" not in os.environ:
        knobs.compilation.disable_line_info = True
    library = triton_lib.triton_kernel_call_lib
    if library is not None and not getattr(library, "keeps_no_ir", False):
        triton_lib.triton_kernel_call_lib = slim = _Library(library)
        slim.keeps_no_ir = True
