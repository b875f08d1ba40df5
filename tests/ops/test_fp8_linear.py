"""Linear layers and SwiGLU with float and FP8 weights against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_linear
from pallas_kernels.blocks import Weight
from tests.ops.numpy_ops import (
    assert_bf16,
    assert_close,
    dequantize,
    normal,
    quantize,
    random_blocks,
    regroup,
    rms,
    silu,
    to_jnp,
    wide,
)

N, K = 200, 300
linear = jax.jit(fp8_linear.linear, static_argnames=("arithmetic", "dtype"))
swiglu = jax.jit(fp8_linear.swiglu, static_argnames=("arithmetic",))
X = normal(0, 5, K)


def weight(kind: str, *shape: int) -> Weight:
    return random_blocks(1, *shape) if kind == "fp8" else to_jnp(normal(1, *shape), kind)


def quantized(x: np.ndarray) -> np.ndarray:
    """What W8A8 multiplies instead of x."""
    return regroup(*quantize(x, 128, 1e-10), 128)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(kind: str, dtype: str) -> None:
    x, w = to_jnp(X, dtype), weight(kind, N, K)
    want = wide(x) @ dequantize(w).T
    assert_close(linear(x, w, dtype=jnp.float32), want)
    got = linear(x, w)
    assert got.dtype == jnp.dtype(dtype) and got.shape == (5, N)
    # Rounded once: the default output is the float32 one, rounded.
    np.testing.assert_array_equal(wide(got), wide(linear(x, w, dtype=jnp.float32).astype(dtype)))
    if dtype == "bfloat16":
        assert_bf16(got, want)


def test_fp8_weights_are_not_rounded_after_scaling() -> None:
    """A bfloat16 dequantised weight would be off by 1e-3."""
    w = random_blocks(2, 128, 128)
    got = fp8_linear.linear(jnp.eye(128, dtype=jnp.bfloat16), w, dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(got).T, dequantize(w).astype(np.float32))


def test_w8a8_quantises_x_by_groups_of_128() -> None:
    x = X * np.float32(10) ** (np.arange(K) // 128).astype(np.float32)
    x[1], x[2, :128] = 0.0, 0.0
    w = weight("fp8", N, K)
    got = linear(jnp.asarray(x), w, arithmetic="w8a8")
    assert_close(got, quantized(x) @ dequantize(w).T)
    assert np.linalg.norm(wide(got) - wide(linear(jnp.asarray(x), w))) > 1e-3 * np.linalg.norm(wide(got))


def test_w8a8_leaves_float_weights_alone() -> None:
    w = weight("bfloat16", N, K)
    np.testing.assert_array_equal(linear(jnp.asarray(X), w, arithmetic="w8a8"), linear(jnp.asarray(X), w))


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_stacked_weights_give_the_bits_of_one(kind: str) -> None:
    """A static and a traced index, and the matrix alone."""
    stack = weight(kind, 2, 3, N, K)
    one = jax.tree.map(lambda a: a[1, 2], stack)
    alone = np.asarray(linear(jnp.asarray(X), one))
    static = jax.jit(lambda x, w: fp8_linear.linear(x, w, (1, 2)))(jnp.asarray(X), stack)
    traced = linear(jnp.asarray(X), stack, (jnp.asarray(1, jnp.int32), jnp.asarray(2, jnp.int32)))
    np.testing.assert_array_equal(np.asarray(static), alone)
    np.testing.assert_array_equal(np.asarray(traced), alone)
    assert_close(alone, wide(X) @ dequantize(stack)[1, 2].T)


def test_one_vector_and_many_axes() -> None:
    w, x = weight("fp8", N, K), normal(3, 2, 3, K)
    assert_close(linear(jnp.asarray(x), w), wide(x) @ dequantize(w).T)
    assert_close(linear(jnp.asarray(x[0, 0]), w), wide(x[0, 0]) @ dequantize(w).T)


@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_swiglu(kind: str, arithmetic: str) -> None:
    stack = jax.tree.map(lambda a: a if a.dtype != jnp.float32 else a / 30, weight(kind, 3, 2, N, K))
    got = swiglu(jnp.asarray(X), stack, (jnp.asarray(1, jnp.int32),), arithmetic=arithmetic)
    assert got.shape == (5, N) and got.dtype == jnp.float32
    x = quantized(X) if (kind, arithmetic) == ("fp8", "w8a8") else wide(X)
    gate, up = (x @ dequantize(stack)[1, i].T for i in (0, 1))
    assert_close(got, silu(gate) * up)


def test_swiglu_in_bfloat16_rounds_once() -> None:
    x, w = to_jnp(X, jnp.bfloat16), to_jnp(normal(4, 2, N, K, scale=0.1), jnp.bfloat16)
    gate, up = (wide(x) @ wide(w)[i].T for i in (0, 1))
    assert_bf16(swiglu(x, w), silu(gate) * up)


def test_swiglu_of_large_inputs_is_finite() -> None:
    """silu(-1e4) is 0 and not NaN."""
    w = jnp.stack([jnp.full((1, 2), -1e4), jnp.ones((1, 2))])
    assert np.asarray(fp8_linear.swiglu(jnp.ones((1, 2)), w)).tolist() == [[0.0]]


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_refuses_what_does_not_fit(kind: str) -> None:
    x, w = jnp.asarray(X), weight(kind, 2, N, K)
    with pytest.raises(ValueError, match=r"arithmetic='w4a16' must be one of \('w8a16', 'w8a8'\)"):
        fp8_linear.linear(x, w, (0,), arithmetic="w4a16")
    with pytest.raises(ValueError, match=r"\(2, 200, 300\) needs 1 stack indices, got 0"):
        fp8_linear.linear(x, w)
    with pytest.raises(ValueError, match=r"needs 0 stack indices, got 1"):
        fp8_linear.swiglu(x, w, (0,))
    with pytest.raises(ValueError, match=r"\(5, 299\).*\(2, 200, 300\): k=300"):
        fp8_linear.linear(x[:, :-1], w, (0,))
    with pytest.raises(ValueError, match=r"\(5, 299\).*k=300"):
        fp8_linear.swiglu(x[:, :-1], w)
    with pytest.raises(ValueError, match=r"w8a17"):
        fp8_linear.swiglu(x, w, arithmetic="w8a17")


@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_linears(residual: bool, dtype: str, arithmetic: str) -> None:
    """total and normed against numpy; the projections are those of the normed rows it gives, bit for bit."""
    x, delta = to_jnp(X, dtype), to_jnp(normal(7, 5, K), dtype) if residual else None
    weights, norm = (weight("fp8", 2, N, K), random_blocks(6, 2, 64, K)), to_jnp(1 + normal(5, 2, K, scale=0.2), dtype)
    run = jax.jit(lambda *a: fp8_linear.norm_linears(*a, eps=1e-5, delta=delta, arithmetic=arithmetic))
    total, normed, outs = run(x, norm, weights, (jnp.asarray(1, jnp.int32),))
    assert total.dtype == normed.dtype == x.dtype and [o.shape for o in outs] == [(5, N), (5, 64)]
    want = wide(x) + (wide(delta) if delta is not None else 0)
    (assert_bf16 if dtype == "bfloat16" else assert_close)(total, want)
    (assert_bf16 if dtype == "bfloat16" else assert_close)(normed, rms(total, norm[1], 1e-5))
    for w, got in zip(weights, outs, strict=True):
        np.testing.assert_array_equal(wide(got), wide(linear(normed, w, (jnp.asarray(1),), arithmetic=arithmetic)))


def test_norm_linears_without_a_stack() -> None:
    x, w = jnp.asarray(X), weight("bfloat16", N, K)
    total, normed, (y,) = fp8_linear.norm_linears(x.reshape(1, 5, K), jnp.ones(K), (w,), eps=1e-5)
    np.testing.assert_array_equal(total[0], x)
    assert_close(normed[0], rms(x, np.ones(K), 1e-5))
    assert_close(y[0], wide(normed[0]) @ dequantize(w).T)


def test_weights_of_one_call_share_their_stack() -> None:
    x, a, b = jnp.asarray(X), weight("fp8", 2, 3, N, K), weight("fp8", 2, 4, N, K)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\)"):
        fp8_linear.linears(x, (a, b), (1, 0))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\)"):
        fp8_linear.norm_linears(x, jnp.ones((2, 3, K)), (a, b), (1, 0), eps=1e-5)


def test_norm_linears_refuses_other_shapes() -> None:
    x, w = jnp.asarray(X), weight("fp8", 2, N, K)
    with pytest.raises(ValueError, match=r"norm of shape \(300,\).*\(2, 200, 300\)"):
        fp8_linear.norm_linears(x, jnp.ones(K), (w,), (0,), eps=1e-5)
    with pytest.raises(ValueError, match=r"delta \(4, 300\)"):
        fp8_linear.norm_linears(x, jnp.ones((2, K)), (w,), (0,), eps=1e-5, delta=x[:4])
