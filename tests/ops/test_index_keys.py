"""The indexer's keys and queries against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_keys, paged
from pallas_kernels.blocks import Weight
from tests.ops.numpy_ops import (
    assert_close,
    dequantize,
    layer_norm,
    normal,
    quantize,
    random_blocks,
    regroup,
    rotate_front,
    to_bf16,
    to_jnp,
    wide,
)

FULL, ROWS, HIDDEN, Q_RANK, HEADS, DIM, ROPE, PAGES = 2, 6, 140, 132, 3, 32, 8, 2
write = jax.jit(index_keys.write)
query = jax.jit(index_keys.query, static_argnames=("quantized", "arithmetic"))
ANGLE = np.random.default_rng(0).uniform(-9, 9, (ROWS, ROPE // 2))
COS, SIN = jnp.asarray(np.cos(ANGLE), jnp.float32), jnp.asarray(np.sin(ANGLE), jnp.float32)
X = normal(1, ROWS, HIDDEN)
LATENT = normal(2, ROWS, Q_RANK)
SLOTS = np.array([3, -1, 64, 63, 127, 0], np.int32)
LAYER = jnp.asarray(1, jnp.int32)


def weight(kind: str, seed: int, *shape: int) -> Weight:
    """Small weights, so that LayerNorm's epsilon of 1e-6 shows: keys have a variance near 1e-5."""
    return random_blocks(seed, *shape) if kind == "fp8" else to_jnp(normal(seed, *shape, scale=3e-4), kind)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("fp8", "float32")])
def test_write(kind: str, dtype: str, quantized: bool) -> None:
    x, wk = to_jnp(X, dtype), weight(kind, 3, FULL, DIM, HIDDEN)
    norm, bias = to_jnp(normal(4, FULL, DIM), dtype), to_jnp(normal(5, FULL, DIM), dtype)
    shape, store = ((FULL, PAGES, 64 * (DIM + 4)), jnp.uint8) if quantized else ((FULL, PAGES, 64, DIM), jnp.float32)
    before = jnp.full(shape, 9, store)
    after = write(x, wk, norm, bias, before, LAYER, jnp.asarray(SLOTS), COS, SIN)
    assert after.dtype == store and after.shape == shape
    keys = layer_norm(wide(x) @ dequantize(wk)[1].T, norm[1], bias[1], 1e-6)
    keys = rotate_front(keys, ANGLE)
    if kind == "float32":
        # The epsilon is 1e-6 and not the model's 1e-5: the case must be able to tell.
        other = rotate_front(layer_norm(wide(x) @ dequantize(wk)[1].T, norm[1], bias[1], 1e-5), ANGLE)
        assert np.linalg.norm(other - keys) > 1e-2 * np.linalg.norm(keys)
    read = wide(paged.read_index_pages(after, 1, jnp.arange(PAGES, dtype=jnp.int32), DIM))
    real = SLOTS >= 0
    if quantized:
        # One scale a key; at most one code away where a value lies in the middle of two.
        want = regroup(*quantize(keys, DIM, 1e-4), DIM)
        assert (np.abs(read[SLOTS[real]] - want[real]) > 1e-5 * np.abs(want[real])).mean() < 0.01
        assert_close(read[SLOTS[real]], want[real], 2e-2)
    else:
        assert_close(read[SLOTS[real]], keys[real], 5e-6)
        untouched = np.setdiff1d(np.arange(64 * PAGES), SLOTS)
        assert (read[untouched] == 9).all()
    np.testing.assert_array_equal(np.asarray(after)[0], np.asarray(before)[0])


def test_write_of_a_constant_key_is_the_rotated_bias() -> None:
    """x = 0: the norm's statistics vanish, and the bias itself is rotated (rope comes after the norm)."""
    bias = normal(6, FULL, DIM)
    before = jnp.zeros((FULL, PAGES, 64, DIM), jnp.float32)
    args = (jnp.zeros((ROWS, HIDDEN)), jnp.ones((FULL, DIM, HIDDEN)), jnp.ones((FULL, DIM)), jnp.asarray(bias))
    after = write(*args, before, LAYER, jnp.asarray(SLOTS), COS, SIN)
    want = rotate_front(np.tile(bias[1], (ROWS, 1)), ANGLE)
    got = np.asarray(after)[1].reshape(-1, DIM)[SLOTS[SLOTS >= 0]]
    assert_close(got, want[SLOTS >= 0])


def expected_query(latent: np.ndarray, x: np.ndarray, wq_b: Weight, proj: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    q = rotate_front((latent @ dequantize(wq_b)[1].T).reshape(ROWS, HEADS, DIM), ANGLE)
    return q, x @ wide(proj)[1].T * HEADS**-0.5 * DIM**-0.5


@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
@pytest.mark.parametrize(("kind", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("fp8", "float32")])
def test_query(kind: str, dtype: str, arithmetic: str) -> None:
    latent, x = to_jnp(LATENT, dtype), to_jnp(X, dtype)
    wq_b, proj = weight(kind, 7, FULL, HEADS * DIM, Q_RANK), to_jnp(normal(8, FULL, HEADS, HIDDEN), dtype)
    used = wide(latent)
    if (kind, arithmetic) == ("fp8", "w8a8"):
        used = regroup(*quantize(np.asarray(latent), 128, 1e-10), 128)
    want_q, want_w = expected_query(used, wide(x), wq_b, proj)
    q, w = query(latent, x, wq_b, proj, LAYER, COS, SIN, quantized=False, arithmetic=arithmetic)
    assert q.dtype == w.dtype == jnp.float32 and q.shape == (ROWS, HEADS, DIM) and w.shape == (ROWS, HEADS)
    assert_close(q, want_q, 2e-6)
    assert_close(w, want_w, 2e-6)
    assert (wide(w) < 0).any()
    # Quantised: one scale a head, folded into the weight, so that the product is what counts.
    q8, w8 = query(latent, x, wq_b, proj, LAYER, COS, SIN, quantized=True, arithmetic=arithmetic)
    assert q8.dtype == jnp.float8_e4m3fn and w8.dtype == jnp.float32
    scale = np.abs(wide(q)).max(-1) / 448
    assert_close(w8, wide(w) * scale, 2e-6)
    assert (np.abs(wide(q8)).max(-1) == 448).all()
    bound = np.maximum(np.abs(wide(q)) / 16, 2.0**-10 * scale[..., None])
    assert (np.abs(wide(q8) * scale[..., None] - wide(q)) <= bound * (1 + 1e-5)).all()


def test_query_keeps_float32_between_projection_and_quantisation() -> None:
    """bfloat16 inputs: neither q nor w is rounded to bfloat16."""
    latent, x = to_jnp(LATENT, jnp.bfloat16), to_jnp(X, jnp.bfloat16)
    wq_b, proj = weight("bfloat16", 7, FULL, HEADS * DIM, Q_RANK), to_jnp(normal(8, FULL, HEADS, HIDDEN), jnp.bfloat16)
    for part in query(latent, x, wq_b, proj, 1, COS, SIN, quantized=False):
        assert (to_bf16(part) != wide(part)).mean() > 0.9
