"""Every backend of every operation lowers for every GPU it claims to serve; Triton kernels become machine code on the way."""

from __future__ import annotations

import jax
import pytest

from bench.operations import discover
from pallas_kernels import arch as archs
from pallas_kernels.lowering import lower_for_cuda

GPUS = ("A100-80", "H200-141", "B200-180", "RTX PRO 6000")


def _cases(language: str) -> list:
    """(operation, case, backend, gpu) of every backend whose kernels are written in that language."""
    return [
        pytest.param(operation, case, backend.name, gpu, id=f"{operation.name}-{case}-{backend.name}-{gpu}")
        for operation in discover().values()
        for case, spec in operation.cases.items()
        for backend in operation.backends
        if backend.name != "reference" and backend.name.startswith("mosaic") == (language == "mosaic")
        for gpu in GPUS
        if backend.supports(spec, archs.by_name(gpu)) is None
    ]


def _lower(operation, case: str, backend: str, gpu: str) -> str:
    spec = operation.cases[case]
    args = jax.eval_shape(lambda: operation.inputs(spec, jax.random.key(0)))
    return lower_for_cuda(operation.function(spec, backend), *args, arch=archs.by_name(gpu))


@pytest.mark.needs_triton
@pytest.mark.parametrize("operation,case,backend,gpu", _cases("triton"))
def test_triton_kernels_compile(operation, case: str, backend: str, gpu: str) -> None:
    assert "triton_kernel_call" in _lower(operation, case, backend, gpu)


@pytest.mark.parametrize("operation,case,backend,gpu", _cases("mosaic"))
def test_mosaic_kernels_lower(operation, case: str, backend: str, gpu: str) -> None:
    assert "mosaic_gpu" in _lower(operation, case, backend, gpu)


def test_the_portable_backend_serves_every_generation() -> None:
    """Each operation with a Triton backend has a case that it serves from SM80 to SM120."""
    for operation in discover().values():
        for backend in operation.backends:
            if backend.name == "triton":
                for gpu in GPUS:
                    assert any(backend.supports(s, archs.by_name(gpu)) is None for s in operation.cases.values()), gpu
