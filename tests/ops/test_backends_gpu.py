"""Every backend of every operation against its reference, on every named case at several numbers of rows."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import pytest

from bench.check import check, same_bits
from bench.operations import Operation, discover
from pallas_kernels.arch import ARCHS, Arch
from pallas_kernels.lowering import default_arch
from pallas_kernels.registry import Backend

pytestmark = pytest.mark.gpu

OPERATIONS = discover()
# Of decode; the last for backends that serve only more.
ROWS = (1, 5, 64, 130)


def served_rows(operation: Operation, case: str, backend: Backend, arch: Arch | None) -> tuple[int, ...]:
    """The rows of ROWS at which the backend serves a case there: those of decode, or else the last one."""
    cases = ((rows, dataclasses.replace(operation.cases[case], rows=rows)) for rows in ROWS)
    found = tuple(rows for rows, spec in cases if backend.supports(spec, arch) is None)
    return tuple(rows for rows in found if rows < ROWS[-1]) or found


# A case that a backend serves on no GPU (a cache's dtype, an arithmetic) is not one of its cases.
CASES = [
    pytest.param(operation, case, backend, id=f"{operation.name}-{case}-{backend.name}")
    for operation in OPERATIONS.values()
    for case in operation.cases
    for backend in operation.backends
    if backend.name != "reference" and any(served_rows(operation, case, backend, arch) for arch in ARCHS)
]


@pytest.mark.parametrize("operation,case,backend", CASES)
def test_backend_equals_reference(operation: Operation, case: str, backend: Backend) -> None:
    """Three layers, of which the last is checked too; a backend of another GPU refuses with a reason."""
    rows_here = served_rows(operation, case, backend, default_arch())
    if not rows_here:
        assert (refusal := backend.supports(operation.cases[case], default_arch())) is not None and refusal.reason
    for rows in rows_here:
        spec = dataclasses.replace(operation.cases[case], rows=rows)
        if hasattr(spec, "layers"):
            spec = dataclasses.replace(spec, layers=3)
        args = operation.inputs(spec, jax.random.key(zlib.crc32(f"{case}{rows}".encode())))
        result = check(operation, spec, backend.name, args)
        assert result.ok, f"{rows=}: {result}"
        assert same_bits(operation, spec, backend.name, args, repeats=3), f"{rows=}: not the same bits in every call"
