"""The prefill kernel of fp8_linear on the GPU: rows, hostile values, far layers, replays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_linear
from pallas_kernels.compare import compare
from pallas_kernels.fp8_linear import reference
from pallas_kernels.fp8_linear.spec import CASES, Spec, inputs

pytestmark = pytest.mark.gpu
BACKEND = "mosaic_prefill_sm90"
# Relative L2. wgmma keeps some 14 bits of the largest product within a block of 128: measured 2.2e-4 on random weights; bfloat16
# outputs add their one rounding, 1.7e-3. x is quantized with the reference's bits.
TOLERANCE = {"float32": 5e-4, "bfloat16": 2.5e-3}


def kernel(spec: Spec, x: jax.Array, weights: tuple[Any, ...], index: Any) -> tuple[jax.Array, ...]:
    if spec.form == "swiglu":
        return (fp8_linear.swiglu(x, weights[0], (index,), arithmetic=spec.arithmetic, backend=BACKEND),)
    dtype = jnp.dtype(spec.out_dtype)
    return fp8_linear.linears(x, weights, (index,), arithmetic=spec.arithmetic, dtype=dtype, backend=BACKEND)


def agrees(spec: Spec, x: jax.Array, weights: tuple[Any, ...], layer: int) -> None:
    got = jax.jit(lambda x, w, i: kernel(spec, x, w, i))(x, weights, jnp.asarray(layer, jnp.int32))
    wide = dataclasses.replace(spec, x_dtype="float32", out_dtype="float32")
    want = jax.jit(lambda x, w: reference.run(wide, x.astype(jnp.float32), w, (layer,)))(x, weights)
    for a, b in zip(got, want, strict=True):
        difference = compare(np.asarray(a.astype(jnp.float32)), b)
        assert difference.rel_l2 < TOLERANCE[a.dtype.name], f"{spec}: {difference}"


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
@pytest.mark.parametrize("rows", [65, 100, 128, 1000, 4096])
def test_every_number_of_rows(rows: int, arithmetic: str) -> None:
    """n = 576 beside another, float32 outputs: what is left is the accumulation of FP8 wgmma."""
    spec = Spec(rows, 1152, (128, 576), arithmetic, layers=2, out_dtype="float32")
    x, weights, *_ = inputs(spec, jax.random.key(rows))
    agrees(spec, x, weights, 1)


@pytest.mark.parametrize("name", ["o_proj_w8a8", "o_proj_w8a16", "dense_gate_up_w8a8"])
@pytest.mark.parametrize("rows", [128, 1000])
def test_real_shapes(name: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=2)
    x, weights, *_ = inputs(spec, jax.random.key(rows))
    agrees(spec, x, weights, 1)


@pytest.mark.parametrize("arithmetic", ["w8a8", "w8a16"])
def test_hostile_rows_stay_by_themselves(arithmetic: str) -> None:
    """One group of the first row is all hostile: the other rows keep their bits, nothing not finite gets lost."""
    spec = Spec(100, 1024, (64,), arithmetic, out_dtype="float32")
    x, weights, *_ = inputs(spec, jax.random.key(1))
    step = jax.jit(lambda x, w: kernel(spec, x, w, jnp.zeros((), jnp.int32))[0])
    clean = np.asarray(step(x, weights))
    for value in (0.0, np.nan, np.inf, 1e30, 1e-38):
        got = np.asarray(step(x.at[0, :128].set(jnp.bfloat16(value)), weights))
        np.testing.assert_array_equal(got[1:], clean[1:])
        assert np.isfinite(got[0]).all() if np.isfinite(value) else not np.isfinite(got[0]).any(), value


def test_reads_a_layer_beyond_32_bit_offsets() -> None:
    spec = dataclasses.replace(CASES["o_proj_w8a8"], rows=130, layers=45)
    x, weights, *_ = inputs(spec, jax.random.key(0))
    assert weights[0].data.size > 2**32
    agrees(spec, x, weights, 44)


@pytest.mark.parametrize("rows", [128, 1000])
@pytest.mark.parametrize("name", ["o_proj_w8a8", "o_proj_w8a16"])
def test_replays_give_the_bits_of_the_first_call(name: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=2)
    x, weights, *_ = inputs(spec, jax.random.key(0))
    step = jax.jit(lambda x, w, i: kernel(spec, x, w, i))
    first = np.asarray(step(x, weights, jnp.asarray(1, jnp.int32))[0].astype(jnp.float32))
    for _ in range(10):
        again = step(x, weights, jnp.asarray(1, jnp.int32))[0].astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(again), first)
