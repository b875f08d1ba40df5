"""Selection against a sort in plain Python: ties, NaN, infinities, every relation of length, k and n."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k import top_k

N = 40
run = jax.jit(top_k, static_argnums=2)


def expected(scores: np.ndarray, length: int, k: int) -> list[int]:
    if length <= k:
        chosen = list(range(length))
    else:
        key = [(-s if not np.isnan(s) else np.inf, i) for i, s in enumerate(scores[:length].tolist())]
        chosen = [i for _, i in sorted(key)[:k]]
    return chosen + [-1] * (k - len(chosen))


@functools.cache
def hostile() -> np.ndarray:
    """Rows of scores: random, few distinct values, constant, NaN and infinities, and a NaN behind every second."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=N), rng.integers(-2, 2, N), np.zeros(N), np.full(N, -np.inf), np.full(N, np.nan)]
    rows.append(rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.5, -3e38], N))
    rows.append(np.where(np.arange(N) % 2, np.nan, rng.normal(size=N)))
    rows.append(-rng.uniform(1, 2, N))
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("k", [1, 8, N, N + 5])
def test_against_a_sort(k: int) -> None:
    lengths = sorted({n for n in (0, 1, k - 1, k, k + 1, N - 1, N) if 0 <= n <= N})
    for length in lengths:
        scores = hostile().copy()
        want = [expected(row, length, k) for row in scores]
        scores[:, length:] = np.resize(np.array([np.inf, np.nan, 9.0], np.float32), N - length)
        got = run(jnp.asarray(scores), jnp.full((len(scores),), length, jnp.int32), k)
        assert got.dtype == jnp.int32 and got.shape == (len(scores), k)
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=f"{length=} {k=}")


def test_each_row_has_its_length() -> None:
    lengths = np.array([0, 1, 7, 8, 9, 30, 39, 40], np.int32)
    got = run(jnp.asarray(hostile()), jnp.asarray(lengths), 8)
    np.testing.assert_array_equal(
        np.asarray(got), [expected(row, int(n), 8) for row, n in zip(hostile(), lengths, strict=True)]
    )


def test_large_rows_keep_ties_in_order() -> None:
    scores = np.random.default_rng(1).integers(0, 50, (2, 5000)).astype(np.float32)
    got = run(jnp.asarray(scores), jnp.asarray([5000, 4001], jnp.int32), 2048)
    np.testing.assert_array_equal(np.asarray(got), [expected(scores[0], 5000, 2048), expected(scores[1], 4001, 2048)])


def test_negative_zero_equals_zero() -> None:
    """Exact zeros come from relu, negative ones from a negative head weight times zero: equal scores, lower position first."""
    scores = jnp.asarray([[-0.0, 0.0, -0.0, 0.0, -1.0]], jnp.float32)
    assert run(scores, jnp.asarray([5], jnp.int32), 2).tolist() == [[0, 1]]
