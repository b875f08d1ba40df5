"""Norms and group quantization against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import norm_quant
from pallas_kernels.parts import Parts
from tests.ops.numpy_ops import E4M3, assert_bf16, assert_close, layer_norm, normal, quantize, regroup, rms, wide

rms_norm = jax.jit(norm_quant.rms_norm, static_argnums=2)
layer_norm_op = jax.jit(norm_quant.layer_norm, static_argnums=3)


quantize_op = jax.jit(norm_quant.quantize_groups, static_argnames=("group", "floor"))


def assert_quantized(
    x: np.ndarray, values: jax.Array, scale: jax.Array, group: int = 128, floor: float = 1e-10
) -> None:
    """Scales to a unit in the last place (XLA multiplies by the reciprocal of 448), values bit for bit given the scales."""
    _, want_scale = quantize(x, group, floor)
    np.testing.assert_allclose(np.asarray(scale), want_scale, rtol=1.2e-7)
    by_element = np.asarray(scale)[..., np.arange(x.shape[-1]) // group]
    np.testing.assert_array_equal(wide(values), wide(np.clip(x / by_element, -448, 448).astype(E4M3)))


# The mean square of real embedding rows is 3e-5: with the wrong epsilon the result is off by a tenth.
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("magnitude", [1.0, 5e-3, 1e-15, 1e15])
def test_rms_norm(eps: float, magnitude: float) -> None:
    x, weight = normal(0, 4, 3, 100, scale=magnitude), normal(1, 100)
    got = rms_norm(jnp.asarray(x), jnp.asarray(weight), eps)
    assert got.dtype == jnp.float32
    assert_close(got, rms(x, weight, eps))


def test_rms_norm_of_zero_is_zero() -> None:
    assert not np.asarray(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-5)).any()


def test_rms_norm_in_bfloat16_rounds_once() -> None:
    x, weight = jnp.asarray(normal(2, 64, 100)).astype(jnp.bfloat16), jnp.asarray(normal(3, 100)).astype(jnp.bfloat16)
    assert_bf16(rms_norm(x, weight, 1e-5), rms(x, weight, 1e-5))
    # A float32 weight keeps its bits until the one rounding.
    assert_bf16(rms_norm(x, jnp.asarray(normal(3, 100)), 1e-5), rms(x, normal(3, 100), 1e-5))


@pytest.mark.parametrize("magnitude", [1.0, 1e-3])
def test_layer_norm(magnitude: float) -> None:
    x, weight, bias = normal(4, 5, 2, 128, scale=magnitude) + np.float32(3 * magnitude), normal(5, 128), normal(6, 128)
    got = layer_norm_op(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias), 1e-6)
    assert_close(got, layer_norm(x, weight, bias, 1e-6))


def test_layer_norm_of_a_constant_is_the_bias() -> None:
    bias = normal(7, 64)
    got = layer_norm_op(jnp.full((1, 64), 4.0), jnp.ones(64), jnp.asarray(bias), 1e-6)
    np.testing.assert_array_equal(np.asarray(got)[0], bias)


def test_layer_norm_in_bfloat16_rounds_once() -> None:
    x = jnp.asarray(normal(8, 64, 128) + 2).astype(jnp.bfloat16)
    weight, bias = (jnp.asarray(normal(s, 128)).astype(jnp.bfloat16) for s in (9, 10))
    assert_bf16(layer_norm_op(x, weight, bias, 1e-6), layer_norm(x, weight, bias, 1e-6))


@pytest.mark.parametrize(
    ("k", "group", "floor"), [(256, 128, 1e-10), (300, 128, 1e-10), (40, 128, 1e-10), (64, 64, 1e-4)]
)
def test_quantize_groups(k: int, group: int, floor: float) -> None:
    """Also for groups of zeros, of denormals, of huge values and below the floor."""
    x = normal(11, 8, 2, k) * np.float32(10) ** np.arange(-5, 3, dtype=np.float32)[:, None, None]
    x[0], x[1, 0], x[2] = 0.0, 1e-39, normal(12, 2, k, scale=1e-13)
    x[3, 1, -1], x[4] = 3e38, -np.abs(x[4])
    values, scale = quantize_op(jnp.asarray(x), group=group, floor=floor)
    assert (values.dtype, values.shape) == (jnp.float8_e4m3fn, x.shape)
    assert (scale.dtype, scale.shape) == (jnp.float32, (8, 2, -(-k // group)))
    assert_quantized(x, values, scale, group, floor)
    assert np.isfinite(wide(values)).all()


def test_quantize_groups_error_and_idempotence() -> None:
    x = normal(13, 6, 300, scale=4.0)
    values, scale = quantize_op(jnp.asarray(x))
    back = regroup(values, scale, 128)
    bound = np.maximum(np.abs(x) / 16, 2.0**-10 * np.asarray(scale)[:, np.arange(300) // 128])
    assert (np.abs(back - x) <= bound * (1 + 1e-5)).all()
    again, _ = quantize_op(jnp.asarray(back.astype(np.float32)))
    np.testing.assert_array_equal(wide(again), wide(values))


def test_quantize_groups_widens_bfloat16() -> None:
    x = jnp.asarray(normal(14, 3, 200)).astype(jnp.bfloat16)
    assert_quantized(np.asarray(x, np.float32), *quantize_op(x))


@pytest.mark.parametrize("rows", [1, 32, 40])
def test_add_norm_split(rows: int) -> None:
    """The norm of add_norm, and terms that give it back but for what is tiny beside the rest of its group."""
    x, residual = (jnp.asarray(normal(seed, rows, 256)).astype(jnp.bfloat16) for seed in (15, 16))
    weight = jnp.asarray(normal(17, 3, 256)).astype(jnp.bfloat16)
    total, normed, values, scales = norm_quant.add_norm_split(x, residual, weight, 2, 1e-5)
    for got, want in zip((total, normed), norm_quant.add_norm(x, residual, weight, 2, 1e-5), strict=True):
        np.testing.assert_array_equal(wide(got), wide(want))
    padded = 32 if rows <= 32 else 64
    assert values.shape == (2, padded, 256) and scales.shape == (2, padded)
    scale = np.repeat(np.asarray(scales, np.float64)[:, :rows].T, 128, axis=1)
    high, low = wide(values)[:, :rows]
    np.testing.assert_allclose(
        (high + low / 16) * scale, wide(normed), rtol=0, atol=2.0**-21 * np.abs(wide(normed)).max()
    )
    assert (np.log2(scale) % 1 == 0).all() and np.abs(high).max() > 224


def test_add_norm_split_refuses() -> None:
    x, weight = jnp.zeros((2, 200), jnp.bfloat16), jnp.zeros((1, 200), jnp.bfloat16)
    with pytest.raises(ValueError, match="multiple of 128"):
        norm_quant.add_norm_split(x, x, weight, 0, 1e-5)


def parts_of(rows: int, k: int, width: int) -> Parts:
    """Of five experts; row 0 has chosen one that there is not, the last row nothing, and their parts are NaN."""
    ids = (np.arange(rows * k) % 5).astype(np.int32).reshape(rows, k)
    ids[0, 1], ids[rows - 1] = 5, -1
    parts = normal(18, rows * k + rows, width)
    parts[: rows * k][((ids < 0) | (ids >= 5)).reshape(-1)] = np.nan
    return Parts(jnp.asarray(parts), jnp.asarray(ids), jnp.asarray(normal(19, rows, k)), 5)


def test_parts_are_summed_in_order_of_the_choices() -> None:
    given = parts_of(3, 4, 256)
    parts, weights, ids = np.asarray(given.parts), np.asarray(given.weights), np.asarray(given.ids)
    want = np.zeros((3, 256), np.float32)
    for row in range(3):
        for j in range(4):
            if 0 <= ids[row, j] < 5:
                want[row] += weights[row, j] * parts[4 * row + j]
        want[row] += parts[12 + row]
    np.testing.assert_array_equal(np.asarray(given.summed(jnp.float32)), want)
    np.testing.assert_array_equal(wide(given.summed(jnp.bfloat16)), wide(jnp.asarray(want).astype(jnp.bfloat16)))


def test_add_norm_of_parts_is_that_of_their_sum() -> None:
    x, weight = jnp.asarray(normal(20, 3, 256)).astype(jnp.bfloat16), jnp.asarray(normal(21, 2, 256))
    given = parts_of(3, 4, 256)
    want = norm_quant.add_norm(x, given.summed(jnp.bfloat16), weight, 1, 1e-5)
    total, normed = jax.jit(lambda x, delta, w: norm_quant.add_norm(x, delta, w, 1, 1e-5))(x, given, weight)
    for got, sum_first in zip((total, normed), want, strict=True):
        np.testing.assert_array_equal(wide(got), wide(sum_first))
    with pytest.raises(ValueError, match=r"residual \(3, 256\)"):
        norm_quant.add_norm(x[:2], given, weight, 1, 1e-5)
