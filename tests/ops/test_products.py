"""A rounding point of the references rounds, whatever the compiler may simplify."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.products import rounded

# Middles between two bfloat16, both parities; a subnormal, the largest float32, and what has no number.
HARD = np.float32([1.00390625, 1.01171875, -1.00390625, 1e-40, 3.4e38, np.inf, -np.inf, np.nan, 0.0, 1 / 3])


def test_rounded_is_the_cast() -> None:
    got, want = jax.jit(lambda x: rounded(x, jnp.bfloat16))(HARD), jnp.asarray(HARD).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), np.asarray(want.astype(jnp.float32)))


def test_no_compiler_may_drop_it() -> None:
    """XLA for GPUs removes a cast to bfloat16 and back; it keeps what says that precision is to be lost."""
    text = jax.jit(lambda x: rounded(x, jnp.bfloat16).astype(jnp.float32)).lower(HARD).as_text()
    assert "reduce_precision" in text and "e8m7" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_dtypes_are_cast(dtype: type) -> None:
    assert rounded(jnp.asarray(HARD), dtype).dtype == dtype
    assert "reduce_precision" not in jax.jit(lambda x: rounded(x, dtype)).lower(HARD).as_text()
