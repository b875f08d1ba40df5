"""Corrections of jax-triton 0.4.1 for Gluon kernels; kernels of plain Triton are compiled and launched as before.

* It compiles Gluon modules with Triton's own passes (coalescing, layout removal), which move tensors to other layouts than
  the kernel states: slower, and here 48 KiB more shared memory than an SM has. Triton compiles them with gluon_to_ttgir.
* It launches the num_warps that it was asked for, which are those of the default partition: a warp-specialized kernel
  would wait for its workers for ever. The compiled PTX states the number of threads.
* It knows no clusters of blocks: ``gluon_clusters`` marks a kernel that wants them, and shared memory of its own behind
  what the compiler allocated.
"""

from __future__ import annotations

import re
from typing import Any

from jax_triton import triton_lib

# Stands in a kernel's PTX for where its own shared memory starts.
BEHIND = "0x7f5a0001"


class _GluonStages:
    """A CUDA backend whose module is in Gluon's dialect already."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, metadata: Any, options: Any, capability: int) -> Any:
        return module

    def make_ttgir(self, module: Any, metadata: Any, options: Any, capability: int) -> Any:
        return self._backend.gluon_to_ttgir(module, metadata, options, capability)


def clustered(ptx: str, shared: int) -> tuple[str, int]:
    """(PTX, bytes of shared memory) with what the marks in the kernel's inline PTX ask for (``gluon_clusters``)."""
    blocks = re.search(r"blocks of a cluster: (\d+)", ptx)
    if blocks:
        directive = rf"\1.explicitcluster\n.reqnctapercluster {blocks[1]}, 1, 1\n"
        ptx, found = re.subn(r"(\.reqntid [^\n]*\n)", directive, ptx, count=1)
        if not found:
            raise ValueError("the compiled kernel states no number of threads, behind which the cluster's size belongs")
    own = re.search(r"bytes behind: (\d+)", ptx)
    if own:
        start = -(-shared // 16) * 16
        ptx, shared = ptx.replace(BEHIND, str(start)), start + int(own[1])
    return ptx, shared


class _Library:
    """jaxlib's Triton bindings, except that a kernel is launched with the threads and blocks its PTX requires."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def TritonKernel(self, name: str, num_warps: int, num_ctas: int, shared: int, binary: Any, *rest: Any) -> Any:
        required = re.search(r"\.reqntid (\d+)", binary) if isinstance(binary, str) else None
        warps = int(required[1]) // 32 if required else num_warps
        if isinstance(binary, str):
            binary, shared = clustered(binary, shared)
        return self._real.TritonKernel(name, warps, num_ctas, shared, binary, *rest)


_compile = triton_lib.compile_ttir_inplace


def _compile_gluon_too(module: Any, backend: Any, options: Any, gpu_target: Any) -> Any:
    # Only Gluon's front end sets the number of warps on a fresh module.
    if "ttg.num-warps" in str(module):
        return triton_lib.compile_ttir_to_ptx_inplace(module, _GluonStages(backend), options, gpu_target.arch)
    return _compile(module, backend, options, gpu_target)


def install() -> None:
    """Installs both once for the process."""
    if triton_lib.triton_kernel_call_lib is not None and not isinstance(triton_lib.triton_kernel_call_lib, _Library):
        triton_lib.triton_kernel_call_lib = _Library(triton_lib.triton_kernel_call_lib)
        triton_lib.compile_ttir_inplace = _compile_gluon_too
