"""Lets jax-triton 0.4.1 launch warp-specialized kernels.

It launches the num_warps that it was asked for, which are those of the default partition: the workers' warps would be
missing and the kernel would wait for them for ever. The compiled PTX states the number of threads; take it from there.
"""

from __future__ import annotations

import re
from typing import Any

from jax_triton import triton_lib


class _Library:
    """jaxlib's Triton bindings, except that a kernel is launched with the threads its PTX requires."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def TritonKernel(self, name: str, num_warps: int, num_ctas: int, shared: int, binary: str, *rest: Any) -> Any:
        required = re.search(r"\.reqntid (\d+)", binary) if isinstance(binary, str) else None
        warps = int(required[1]) // 32 if required else num_warps
        return self._real.TritonKernel(name, warps, num_ctas, shared, binary, *rest)


def launch_all_warps() -> None:
    """Installs it once for the process; kernels without workers are launched as before."""
    if triton_lib.triton_kernel_call_lib is not None and not isinstance(triton_lib.triton_kernel_call_lib, _Library):
        triton_lib.triton_kernel_call_lib = _Library(triton_lib.triton_kernel_call_lib)
