"""Every backend of every operation against its reference, on every named case at several numbers of rows."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import pytest

from bench.check import check, same_bits
from bench.operations import discover
from pallas_kernels.lowering import default_arch

pytestmark = pytest.mark.gpu

OPERATIONS = discover()
CASES = [
    pytest.param(operation, case, backend.name, id=f"{operation.name}-{case}-{backend.name}")
    for operation in OPERATIONS.values()
    for case in operation.cases
    for backend in operation.backends
    if backend.name != "reference"
]


@pytest.mark.parametrize("operation,case,backend", CASES)
def test_backend_equals_reference(operation, case: str, backend: str) -> None:
    """Three layers, of which the last is checked too; an unserved size is a refusal that names its reason."""
    served = 0
    for rows in (1, 5, 64):
        spec = dataclasses.replace(operation.cases[case], rows=rows)
        if hasattr(spec, "layers"):
            spec = dataclasses.replace(spec, layers=3)
        chosen = next(b for b in operation.backends if b.name == backend)
        refusal = chosen.supports(spec, default_arch())
        if refusal is not None:
            assert refusal.reason
            continue
        args = operation.inputs(spec, jax.random.key(zlib.crc32(f"{case}{rows}".encode())))
        result = check(operation, spec, backend, args)
        assert result.ok, f"{rows=}: {result}"
        assert same_bits(operation, spec, backend, args, repeats=3), f"{rows=}: not the same bits in every call"
        served += 1
    assert served, f"{backend} serves none of the rows of {case} on {default_arch()}"
