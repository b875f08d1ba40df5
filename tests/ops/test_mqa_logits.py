"""Index scores over paged keys against numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged
from pallas_kernels.mqa_logits import paged_logits
from tests.ops.numpy_ops import E4M3, assert_close, normal, wide

FULL, PAGES, BATCH, ROWS, HEADS, DIM, SPAN_PAGES = 2, 9, 2, 3, 4, 32, 3
SPAN = 64 * SPAN_PAGES
run = jax.jit(paged_logits)
# Pages in no order, none shared; page 0 belongs to nobody.
TABLE = np.array([[7, 2, 5], [3, 8, 1]], np.int32)
LENGTHS = np.array([[0, 1, 64], [65, 191, 192]], np.int32)
LAYER = jnp.asarray(1, jnp.int32)


def make_cache(quantized: bool, limits: np.ndarray) -> jax.Array:
    """Layer 1 holds keys up to the longest length of each sequence; everything else is NaN."""
    shape, dtype = ((FULL, PAGES, 64 * (DIM + 4)), jnp.uint8) if quantized else ((FULL, PAGES, 64, DIM), jnp.float32)
    empty = jnp.full(shape, 0xFF if quantized else jnp.nan, dtype)
    slots = [TABLE[b, s // 64] * 64 + s % 64 for b in range(BATCH) for s in range(limits[b])]
    slots = jnp.asarray(np.array(slots, np.int32))
    return paged.write_index_keys(empty, 1, slots, jnp.asarray(normal(0, slots.size, DIM)))


def expected(q: np.ndarray, w: np.ndarray, cache: jax.Array, lengths: np.ndarray) -> np.ndarray:
    keys = wide(paged.read_index_pages(cache, 1, jnp.arange(PAGES, dtype=jnp.int32), DIM)).reshape(PAGES, 64, DIM)
    scores = np.full((BATCH, ROWS, SPAN), -np.inf)
    for b, t in np.ndindex(BATCH, ROWS):
        for s in range(lengths[b, t]):
            key = keys[TABLE[b, s // 64], s % 64]
            scores[b, t, s] = (wide(w)[b, t] * np.maximum(wide(q)[b, t] @ key, 0)).sum()
    return scores


W = normal(1, BATCH, ROWS, HEADS)


@pytest.mark.parametrize("quantized", [False, True])
def test_scores(quantized: bool) -> None:
    q = normal(2, BATCH, ROWS, HEADS, DIM, scale=100.0)
    q = np.clip(q, -448, 448).astype(E4M3) if quantized else q
    cache = make_cache(quantized, LENGTHS.max(1))
    got = run(jnp.asarray(q), jnp.asarray(W), cache, LAYER, jnp.asarray(TABLE), jnp.asarray(LENGTHS))
    want = expected(q, W, cache, LENGTHS)
    assert got.dtype == jnp.float32 and got.shape == (BATCH, ROWS, SPAN)
    np.testing.assert_array_equal(np.isneginf(np.asarray(got)), np.isneginf(want))
    assert_close(got, want, 2e-6)
    assert (want[np.isfinite(want)] < 0).any()


def test_one_sequence_and_one_row() -> None:
    q, cache = normal(2, BATCH, ROWS, HEADS, DIM), make_cache(False, LENGTHS.max(1))
    want = expected(q, W, cache, LENGTHS)
    args = (a[1:, 1:2] for a in (q, W))
    got = run(*map(jnp.asarray, args), cache, 1, jnp.asarray(TABLE[1:]), jnp.asarray(LENGTHS[1:, 1:2]))
    assert_close(got, want[1:, 1:2], 2e-6)


def test_pages_past_the_length_may_be_anything() -> None:
    """Ids outside the cache in the unused tail of the table, and NaN keys behind them."""
    q, cache = normal(2, BATCH, ROWS, HEADS, DIM), make_cache(False, np.array([64, 64]))
    lengths, table = np.minimum(LENGTHS, 64), TABLE.copy()
    table[0, 1:], table[1, 1:] = -1, 2**31 - 1
    got = run(*map(jnp.asarray, (q, W)), cache, LAYER, jnp.asarray(table), jnp.asarray(lengths))
    assert_close(got, expected(q, W, cache, lengths), 2e-6)


def test_starts_cut_the_front() -> None:
    q, cache = normal(2, BATCH, ROWS, HEADS, DIM), make_cache(False, LENGTHS.max(1))
    starts = np.array([[0, 1, 0], [64, 65, 190]], np.int32)
    args = (*map(jnp.asarray, (q, W)), cache, LAYER, jnp.asarray(TABLE), jnp.asarray(LENGTHS))
    got = np.asarray(jax.jit(paged_logits)(*args, starts=jnp.asarray(starts)))
    want = expected(q, W, cache, LENGTHS)
    want[np.arange(SPAN) < starts[..., None]] = -np.inf
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert_close(got, want, 2e-6)


def test_relu_is_inside_the_sum_over_heads() -> None:
    """One key; heads with negative dots count nothing, whatever the sign of their weight."""
    cache = paged.write_index_keys(
        jnp.zeros((1, 1, 64, DIM)), 0, jnp.asarray([0], jnp.int32), jnp.ones((1, DIM), jnp.float32)
    )
    q = np.zeros((1, 1, 3, DIM), np.float32)
    q[0, 0, :, 0] = [2.0, -5.0, -7.0]
    for weights, want in (([3.0, 10.0, -10.0], 6.0), ([-3.0, 10.0, 10.0], -6.0), ([0.0, 1.0, 1.0], 0.0)):
        w = jnp.asarray(np.array(weights, np.float32)[None, None])
        got = paged_logits(jnp.asarray(q), w, cache, 0, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        assert np.asarray(got)[0, 0, 0] == want
        assert (np.asarray(got)[0, 0, 1:] == -np.inf).all()
