"""The launch that sums parts, adds and norms gives the bits of XLA's sum and the launch that adds and norms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import norm_quant
from pallas_kernels.norm_quant.spec import CASES, inputs
from tests.ops.numpy_ops import wide

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "width", "k"), [(2, 6144, 8), (8, 6144, 8), (8, 2048, 4), (5, 16384, 2)])
def test_parts_have_the_bits_of_their_sum(rows: int, width: int, k: int) -> None:
    spec = dataclasses.replace(CASES["add_parts_norm_6144"], rows=rows, width=width, parts=k, layers=2)
    x, parts, weight, _ = inputs(spec, jax.random.key(rows))
    parts = dataclasses.replace(parts, ids=parts.ids.at[0].set(-1))  # Row 0 has the shared expert alone.
    apart = jax.jit(lambda layer: norm_quant.add_norm(x, parts, weight, layer, 1e-5))
    summed = jax.jit(lambda p: p.summed(x.dtype))(parts)
    before = jax.jit(lambda layer: norm_quant.add_norm(x, summed, weight, layer, 1e-5))
    known = jax.jit(lambda: norm_quant.add_norm(x, parts, weight, 1, 1e-5))()
    for got in (apart(jnp.int32(1)), known):
        for a, b in zip(got, before(jnp.int32(1)), strict=True):
            np.testing.assert_array_equal(wide(a), wide(b))
