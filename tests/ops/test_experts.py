"""The mixture of experts against numpy loops, with hostile choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import Weight
from pallas_kernels.experts import mix
from tests.ops.numpy_ops import (
    assert_bf16,
    assert_close,
    dequantize,
    normal,
    quantize,
    random_blocks,
    regroup,
    silu,
    to_bf16,
    to_jnp,
    wide,
)

LAYERS, EXPERTS, HIDDEN, WIDTH, ROWS, K = 2, 5, 132, 136, 6, 3
run = jax.jit(mix, static_argnames=("arithmetic",))
LAYER = jnp.asarray(1, jnp.int32)
X = normal(0, ROWS, HIDDEN)
WEIGHTS = normal(1, ROWS, K)
# Expert 4 is nobody's; row 1 chooses nothing, row 2 one expert, rows 3 and 5 have a hole.
IDS = np.array([[0, 1, 2], [-1, -1, -1], [3, -1, -1], [1, -7, 0], [2, 3, 1], [-1, 0, 3]], np.int32)
SHAPES = (
    *((LAYERS, EXPERTS, 2, WIDTH, HIDDEN), (LAYERS, EXPERTS, HIDDEN, WIDTH)),
    *((LAYERS, 2, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH)),
)
type Stacks = tuple[Weight, ...]


def stacks(kind: str) -> Stacks:
    """gate_up, down, shared_gate_up, shared_down."""
    if kind == "fp8":
        return tuple(random_blocks(i, *shape) for i, shape in enumerate(SHAPES))
    return tuple(to_jnp(normal(i + 2, *shape, scale=0.1), kind) for i, shape in enumerate(SHAPES))


def expected(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, w: Stacks, rounding: str) -> np.ndarray:
    """``rounding``: "none", "bfloat16" (the SwiGLU product) or "w8a8" (the inputs of both projections)."""
    gate_up, down, shared_gate_up, shared_down = (dequantize(a)[1] for a in w)

    def seen(x: np.ndarray) -> np.ndarray:
        return regroup(*quantize(x[None], 128, 1e-10), 128)[0] if rounding == "w8a8" else x

    def ffn(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
        hidden = silu(gate_up[0] @ seen(x)) * (gate_up[1] @ seen(x))
        return down @ seen(to_bf16(hidden) if rounding == "bfloat16" else hidden)

    out = np.zeros(x.shape)
    for r in range(len(x)):
        out[r] = ffn(wide(x)[r], shared_gate_up, shared_down)
        for e, weight in zip(ids[r], weights[r], strict=True):
            if e >= 0:
                out[r] += float(weight) * ffn(wide(x)[r], gate_up[e], down[e])
    return out


def mixed(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, w: Stacks, **options: str) -> np.ndarray:
    return np.asarray(run(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights), *w, LAYER, **options))


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_mix(kind: str) -> None:
    got = mixed(X, IDS, WEIGHTS, stacks(kind))
    assert got.dtype == np.float32 and got.shape == (ROWS, HIDDEN)
    assert_close(got, expected(X, IDS, WEIGHTS, stacks(kind), "none"), 2e-6)


def test_static_layer_gives_the_same() -> None:
    w = stacks("float32")
    got = mix(jnp.asarray(X), jnp.asarray(IDS), jnp.asarray(WEIGHTS), *w, layer=1)
    assert_close(got, mixed(X, IDS, WEIGHTS, w))


def test_w8a8_quantises_the_unweighted_product() -> None:
    """Weighting before the second quantisation would be another result; a code in the middle may go either way."""
    got = mixed(X, IDS, WEIGHTS, stacks("fp8"), arithmetic="w8a8")
    want = expected(X, IDS, WEIGHTS, stacks("fp8"), "w8a8")
    assert_close(got, want, 1e-3)
    far = np.linalg.norm(expected(X, IDS, WEIGHTS, stacks("fp8"), "none") - want)
    assert far > 5e-3 * np.linalg.norm(want)


def test_rounding_points_in_bfloat16() -> None:
    x = to_jnp(X, jnp.bfloat16)
    w = stacks("bfloat16")
    got = run(x, jnp.asarray(IDS), jnp.asarray(WEIGHTS), *w, LAYER)
    assert_bf16(got, expected(np.asarray(x), IDS, WEIGHTS, w, "bfloat16"), share=0.03)


@pytest.mark.parametrize("expert", [0, EXPERTS - 1, -1])
def test_all_rows_to_one_expert_or_none(expert: int) -> None:
    ids = np.full((ROWS, K), -1, np.int32)
    ids[:, 1] = expert
    w = stacks("float32")
    assert_close(mixed(X, ids, WEIGHTS, w), expected(X, ids, WEIGHTS, w, "none"), 2e-6)


def test_negative_ids_ignore_their_weight() -> None:
    w, weights = stacks("float32"), WEIGHTS.copy()
    weights[IDS < 0] = np.nan
    np.testing.assert_array_equal(mixed(X, IDS, weights, w), mixed(X, IDS, WEIGHTS, w))


def test_the_shared_expert_is_added_once_and_unweighted() -> None:
    w = stacks("float32")
    none, half = (mixed(X, IDS, WEIGHTS * np.float32(f), w) for f in (0, 0.5))
    assert_close(none, expected(X, np.full_like(IDS, -1), WEIGHTS, w, "none"), 2e-6)
    assert_close(2 * half - none, mixed(X, IDS, WEIGHTS, w), 2e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_does_not_leak_into_others(poison: float) -> None:
    x, w = X.copy(), stacks("float32")
    x[0, 3] = poison
    got = mixed(x, IDS, WEIGHTS, w)
    assert np.isnan(got[0]).any()
    np.testing.assert_array_equal(got[1:], mixed(X, IDS, WEIGHTS, w)[1:])


def test_an_expert_reaches_only_the_rows_that_chose_it() -> None:
    """Expert 2 (rows 0 and 4) and expert 4 (nobody) are NaN."""
    gate_up, *rest = stacks("float32")
    assert isinstance(gate_up, jax.Array)
    got = mixed(X, IDS, WEIGHTS, (gate_up.at[:, jnp.asarray([2, 4])].set(jnp.nan), *rest))
    clean = mixed(X, IDS, WEIGHTS, (gate_up, *rest))
    assert np.isnan(got[[0, 4]]).all()
    np.testing.assert_array_equal(got[[1, 2, 3, 5]], clean[[1, 2, 3, 5]])


def test_a_row_does_not_depend_on_the_batch() -> None:
    w = stacks("float32")
    whole = mixed(X, IDS, WEIGHTS, w)
    for r in (0, 4):
        assert_close(mixed(X[r : r + 1], IDS[r : r + 1], WEIGHTS[r : r + 1], w), whole[r : r + 1])
