"""FP8 block-scaled weights against numpy, with partial blocks, stacks and hostile values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import BlockScaled, dequantize, quantize_blocks, take, to_e4m3
from tests.ops.numpy_ops import BF16, E4M3, assert_close, normal, random_blocks, wide
from tests.ops.numpy_ops import dequantize as numpy_dequantize

quantized = jax.jit(quantize_blocks)


@pytest.mark.parametrize("shape", [(128, 128), (192, 130), (1, 1), (3, 129, 257), (2, 2, 64, 300)])
def test_dequantize_indexes_scales_by_block(shape: tuple[int, ...]) -> None:
    w = random_blocks(0, *shape)
    got = dequantize(w)
    assert got.dtype == jnp.float32 and w.shape == shape and w.ndim == len(shape)
    # One product of two float32: exact but for its rounding.
    np.testing.assert_array_equal(np.asarray(got), numpy_dequantize(w).astype(np.float32))


def test_dequantize_to_bfloat16_rounds_once() -> None:
    w = random_blocks(1, 130, 130)
    want = (np.asarray(w.data).astype(np.float32) * wide(numpy_scale(w)).astype(np.float32)).astype(BF16)
    np.testing.assert_array_equal(wide(dequantize(w, jnp.bfloat16)), wide(want))


def numpy_scale(w: BlockScaled) -> np.ndarray:
    n, k = w.shape
    return np.asarray(w.scale)[np.arange(n)[:, None] // 128, np.arange(k)[None, :] // 128]


def test_dequantize_passes_float_weights() -> None:
    w = jnp.asarray(normal(2, 4, 6))
    assert dequantize(w).dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(dequantize(w.astype(jnp.bfloat16), jnp.float32)), w.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(128, 256), (200, 150), (2, 130, 70)])
def test_quantize_blocks_is_amax_over_448(shape: tuple[int, ...]) -> None:
    x = normal(3, *shape, scale=3.0)
    w = quantized(jnp.asarray(x))
    assert (w.data.dtype, w.scale.dtype, w.shape) == (jnp.float8_e4m3fn, jnp.float32, shape)
    n, k = shape[-2:]
    assert w.scale.shape == (*shape[:-2], -(-n // 128), -(-k // 128))
    for r in range(w.scale.shape[-2]):
        for c in range(w.scale.shape[-1]):
            part = x[..., 128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            scale = np.asarray(w.scale)[..., r, c]
            # XLA multiplies by the reciprocal of 448: one unit in the last place.
            np.testing.assert_allclose(scale, np.abs(part).max((-2, -1)) / 448, rtol=1.2e-7)
            want = np.clip(part / scale[..., None, None], -448, 448).astype(E4M3)
            got = np.asarray(w.data)[..., 128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            np.testing.assert_array_equal(wide(got), wide(want))
    # e4m3 keeps four significant bits: half a unit in the last place is 1/16 of a value, 1/1024 of a subnormal's scale.
    error = np.abs(wide(dequantize(w)) - x)
    bound = np.maximum(
        np.abs(x) / 16, 2.0**-10 * np.repeat(np.repeat(np.asarray(w.scale), 128, -2), 128, -1)[..., :n, :k]
    )
    assert (error <= bound * (1 + 1e-5)).all()


def test_quantize_is_idempotent() -> None:
    once = quantized(jnp.asarray(normal(4, 200, 150)))
    twice = quantized(dequantize(once))
    np.testing.assert_array_equal(wide(twice.data), wide(once.data))
    np.testing.assert_allclose(np.asarray(twice.scale), np.asarray(once.scale), rtol=2e-7)


def test_quantize_survives_hostile_blocks() -> None:
    """Zeros, one huge value, denormals, negative only: no NaN, the largest magnitude becomes 448."""
    x = np.zeros((128, 5 * 128), np.float32)
    x[3, 130] = 3e38
    x[:, 256:384] = -1e-39
    x[:, 384:512] = -7.0
    x[0, 600], x[1, 600] = 1e-12, 5.0
    w = quantized(jnp.asarray(x))
    data = wide(w.data)
    assert np.isfinite(data).all() and np.isfinite(np.asarray(w.scale)).all()
    assert not data[:, :128].any() and data[3, 130] == 448 and (data[:, 384:512] == -448).all()
    np.testing.assert_allclose(np.asarray(w.scale)[0, [0, 2]], 1e-10 / 448, rtol=1e-6)
    assert (data[0, 600], data[1, 600]) == (0, 448)
    assert_close(wide(dequantize(w))[:, 384:], x[:, 384:])


def test_floor_of_the_scale() -> None:
    w = quantize_blocks(jnp.full((1, 1), 1e-6, jnp.float32), floor=1e-4)
    np.testing.assert_allclose(np.asarray(w.scale), 1e-4 / 448, rtol=1e-6)


def test_cast_saturates_and_rounds_to_even() -> None:
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, np.float32(np.inf)), [449.0, 464.0, 465.0, 1e9, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(wide(to_e4m3(jnp.asarray(x))), wide(np.clip(x, -448, 448).astype(E4M3)))
    assert np.isnan(wide(to_e4m3(jnp.asarray([np.nan], jnp.float32)))).all()


def test_take_reads_one_matrix() -> None:
    w = random_blocks(5, 2, 3, 130, 8)
    third = take(w, (1, 2))
    traced = jax.jit(lambda w, i: take(w, (1, i)))(w, jnp.asarray(2, jnp.int32))
    for got in (third, traced):
        assert isinstance(got, BlockScaled) and got.shape == (130, 8) and got.scale.shape == (2, 1)
        np.testing.assert_array_equal(wide(got.data), wide(w.data)[1, 2])
        np.testing.assert_array_equal(np.asarray(got.scale), np.asarray(w.scale)[1, 2])
    assert take(w, ()) is w
