"""The index of a layer in a Triton launch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, lowering, norm_quant
from pallas_kernels.layer_index import layer_index

LAYERS, ROWS, WIDTH = 4, 3, 256


def lowered(layer: int | None) -> str:
    """add_norm for an H200; None: a traced layer."""

    def call(x: jax.Array, delta: jax.Array, weight: jax.Array, traced: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm_quant.add_norm(x, delta, weight, traced if layer is None else layer, 1e-5)

    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, WIDTH), (LAYERS, WIDTH)))
    given = (x, x, weight, jax.ShapeDtypeStruct((), jnp.int32))
    return lowering.lower_for_cuda(call, *given, arch=arch.by_name("H200-141"))


def test_an_int_stays_one_and_everything_else_is_an_int32_scalar() -> None:
    assert layer_index(3) == 3 and isinstance(layer_index(3), int)
    for given in (np.int64(3), jnp.int8(3)):
        found = layer_index(given)
        assert isinstance(found, jax.Array) and found.dtype == jnp.int32 and found.shape == () and int(found) == 3


@pytest.mark.needs_triton
def test_known_layers_share_a_kernel_that_reads_none() -> None:
    from pallas_kernels.layer_index import layer_argument

    assert [layer_argument(layer) for layer in range(4)] == [17, 49, 81, 113]
    assert all(layer_argument(layer) >> 5 == layer and layer_argument(layer) % 16 == 1 for layer in range(128))
    first, second, traced = lowered(0), lowered(3), lowered(None)
    assert first != second

    # A traced layer is an operand of the call, a known one is not.
    def operands(text: str) -> int:
        (call,) = re.findall(r"stablehlo\.custom_call @triton_kernel_call\w*\(([^)]*)\)", text)
        return len(call.split(","))

    assert operands(traced) == operands(first) + 1 == operands(second) + 1
