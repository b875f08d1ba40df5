"""The router against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router import add_norm_route, mailbox_words, route
from tests.ops.numpy_ops import assert_close, normal, to_jnp, wide

LAYERS, ROWS, HIDDEN, EXPERTS, K, SCALE = 2, 16, 48, 24, 6, 2.5
run = jax.jit(route, static_argnames=("k", "scale"))
X, GATE = normal(0, ROWS, HIDDEN), normal(1, LAYERS, EXPERTS, HIDDEN, scale=0.3)
BIAS = normal(2, LAYERS, EXPERTS, scale=0.5)
LAYER = jnp.asarray(1, jnp.int32)
MAILBOX = jnp.zeros(mailbox_words(ROWS, HIDDEN, EXPERTS), jnp.int32)


def expected(x: np.ndarray, gate: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = 1 / (1 + np.exp(-wide(x) @ wide(gate).T))
    biased = scores + wide(bias)
    ids = np.array([sorted(range(len(bias)), key=lambda e: (-row[e], e))[:K] for row in biased])
    chosen = np.take_along_axis(scores, ids, -1)
    return ids, chosen / (chosen.sum(-1, keepdims=True) + 1e-20) * SCALE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_route(dtype: str) -> None:
    x, gate = to_jnp(X, dtype), to_jnp(GATE, dtype)
    ids, weights = run(x, gate, jnp.asarray(BIAS), LAYER, k=K, scale=SCALE)
    want_ids, want_weights = expected(wide(x), wide(gate)[1], BIAS[1])
    assert (ids.dtype, weights.dtype, ids.shape) == (jnp.int32, jnp.float32, (ROWS, K))
    np.testing.assert_array_equal(np.asarray(ids), want_ids)
    assert_close(weights, want_weights)
    np.testing.assert_allclose(wide(weights).sum(-1), SCALE, rtol=1e-6)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    bias = np.zeros((LAYERS, EXPERTS), np.float32)
    bias[1, [3, 20]], bias[1, 7] = 100.0, -100.0
    ids, weights = run(jnp.asarray(X), jnp.asarray(GATE), jnp.asarray(bias), LAYER, k=K, scale=SCALE)
    want_ids, want_weights = expected(X, GATE[1], bias[1])
    assert all({3, 20} <= set(row) and 7 not in row for row in np.asarray(ids).tolist())
    np.testing.assert_array_equal(np.sort(np.asarray(ids)), np.sort(want_ids))
    got = np.take_along_axis(np.asarray(weights), np.argsort(np.asarray(ids)), -1)
    assert_close(got, np.take_along_axis(want_weights, np.argsort(want_ids), -1))
    # Without the bias other experts are chosen: both facts carry weight.
    free, _ = run(jnp.asarray(X), jnp.asarray(GATE), jnp.zeros_like(bias), LAYER, k=K, scale=SCALE)
    assert (np.sort(np.asarray(free)) != np.sort(np.asarray(ids))).any()


def test_ties_go_to_the_lower_id() -> None:
    ids, weights = run(
        jnp.zeros((ROWS, HIDDEN)), jnp.asarray(GATE), jnp.zeros((LAYERS, EXPERTS)), LAYER, k=K, scale=SCALE
    )
    np.testing.assert_array_equal(np.asarray(ids), np.tile(np.arange(K), (ROWS, 1)))
    np.testing.assert_allclose(np.asarray(weights), SCALE / K, rtol=1e-6)


def test_equal_biased_scores_tie_too() -> None:
    bias = np.zeros((LAYERS, EXPERTS), np.float32)
    bias[1, [22, 5, 11]], bias[1, :3] = 1.0, -1.0
    ids, _ = run(jnp.zeros((ROWS, HIDDEN)), jnp.asarray(GATE), jnp.asarray(bias), LAYER, k=K, scale=SCALE)
    assert np.asarray(ids)[0].tolist() == [5, 11, 22, 3, 4, 6]


def test_vanishing_scores_give_finite_weights() -> None:
    """sigmoid(-200) is 0 in float32: the 1e-20 in the sum keeps 0 / 0 away."""
    gate = np.full((LAYERS, EXPERTS, HIDDEN), -200 / HIDDEN, np.float32)
    _, weights = run(jnp.ones((ROWS, HIDDEN)), jnp.asarray(gate), jnp.asarray(BIAS), LAYER, k=K, scale=SCALE)
    assert not np.asarray(weights).any()


def test_bfloat16_inputs_are_multiplied_in_float32() -> None:
    """Two experts 1e-4 apart, which bfloat16 logits would merge (trap 9)."""
    gate = np.zeros((LAYERS, EXPERTS, HIDDEN), np.float32)
    gate[1, :, 0], gate[1, 9, 1] = 1.0, 2.0**-12
    ids, _ = run(
        jnp.ones((ROWS, HIDDEN), jnp.bfloat16),
        to_jnp(gate, jnp.bfloat16),
        jnp.zeros((LAYERS, EXPERTS)),
        1,
        k=K,
        scale=1.0,
    )
    assert np.asarray(ids)[0].tolist() == [9, 0, 1, 2, 3, 4]


def test_sum_and_norm_before_the_router() -> None:
    """Against float64 numpy: the sum is rounded, its norm is rounded, and the router sees that."""
    x, delta = to_jnp(X, jnp.bfloat16), to_jnp(normal(3, ROWS, HIDDEN), jnp.bfloat16)
    norm, gate = to_jnp(1 + normal(4, LAYERS, HIDDEN, scale=0.1), jnp.bfloat16), to_jnp(GATE, jnp.bfloat16)
    given = (norm, gate, jnp.asarray(BIAS), LAYER, MAILBOX)
    total, normed, ids, weights, lists, left = jax.jit(add_norm_route, static_argnames=("eps", "k", "scale"))(
        x, delta, *given, eps=1e-5, k=K, scale=SCALE
    )
    want = to_jnp(wide(x) + wide(delta), jnp.bfloat16)
    np.testing.assert_array_equal(wide(total), wide(want))
    rms = wide(want) / np.sqrt((wide(want) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(wide(normed), rms * wide(norm)[1], rtol=2**-8, atol=1e-6)
    want_ids, want_weights = expected(wide(normed), wide(gate)[1], BIAS[1])
    np.testing.assert_array_equal(np.asarray(ids), want_ids)
    assert_close(weights, want_weights)
    assert lists is None and not np.asarray(left).any()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_norm_in_two_terms(rows: int) -> None:
    """scale * (high + low / 16) is the norm, to 2^-13 of its group; scales are powers of two, the largest over it 224 to 448."""
    hidden = 384
    x, gate = to_jnp(normal(5, rows, hidden), jnp.bfloat16), to_jnp(normal(6, 1, EXPERTS, hidden), jnp.bfloat16)
    x = x.at[rows - 1, :128].set(0.0)  # a group of zeros has a scale too
    mailbox = jnp.zeros(mailbox_words(rows, hidden, EXPERTS), jnp.int32)
    given = (x, None, jnp.ones((1, hidden), jnp.bfloat16), gate, jnp.zeros((1, EXPERTS)), 0, mailbox)
    *alone, left = add_norm_route(*given, eps=1e-5, k=K, scale=SCALE)
    *with_terms, terms, _ = add_norm_route(*given, eps=1e-5, k=K, scale=SCALE, split=True)
    for got, want in zip(with_terms[:4], alone[:4], strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert len(alone) == len(with_terms) == 5 and left.shape == mailbox.shape
    values, scales = terms
    assert (values.dtype, values.shape) == (jnp.float8_e4m3fn, (3, 16, 128))
    assert (scales.dtype, scales.shape) == (jnp.float32, (3, 8))
    high, low, scale = wide(values)[:, :rows], wide(values)[:, 8 : 8 + rows], wide(scales)[:, :rows, None]
    groups = wide(alone[1]).reshape(rows, 3, 128).swapaxes(0, 1)
    largest = np.abs(groups).max(-1, keepdims=True)
    assert (np.abs(scale * (high + low / 16) - groups) <= largest * 2.0**-13).all()
    assert (np.frexp(scale)[0] == 0.5).all()
    some = largest > 0
    assert (largest[some] / scale[some] > 224).all() and (largest[some] / scale[some] <= 448).all()


def test_no_terms_where_there_is_no_norm_or_too_many_rows() -> None:
    x, gate, bias = jnp.asarray(X), jnp.asarray(GATE), jnp.asarray(BIAS)
    for norm in (None, jnp.ones((LAYERS, HIDDEN))):
        *_, terms, _ = add_norm_route(x, None, norm, gate, bias, 1, MAILBOX, eps=0.0, k=K, scale=SCALE, split=True)
        assert terms is None


def test_without_a_sum_or_a_norm_it_is_the_router() -> None:
    x, gate, bias = jnp.asarray(X), jnp.asarray(GATE), jnp.asarray(BIAS)
    total, normed, *routed, _, _ = add_norm_route(x, None, None, gate, bias, 1, MAILBOX, eps=0.0, k=K, scale=SCALE)
    np.testing.assert_array_equal(np.asarray(total), X)
    np.testing.assert_array_equal(np.asarray(normed), X)
    for got, want in zip(routed, run(x, gate, bias, LAYER, k=K, scale=SCALE), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": jnp.ones((LAYERS, 3))}, r"norm \(2, 3\)"),
        ({"mailbox": jnp.zeros(MAILBOX.size + 1, jnp.int32)}, rf"int32\({MAILBOX.size + 1},\) must be int32"),
        ({"mailbox": jnp.zeros(MAILBOX.size)}, "float32"),
        ({"delta": jnp.zeros((ROWS, HIDDEN), jnp.bfloat16)}, "delta .* bfloat16 must match"),
    ],
)
def test_shapes_of_sum_norm_and_mailbox(change: dict[str, jax.Array], words: str) -> None:
    given = {"x": jnp.asarray(X), "delta": None, "norm": jnp.ones((LAYERS, HIDDEN)), "gate": jnp.asarray(GATE)}
    given |= {"bias": jnp.asarray(BIAS), "layer": 1, "mailbox": MAILBOX, **change}
    with pytest.raises(ValueError, match=words):
        add_norm_route(**given, eps=1e-5, k=K, scale=SCALE)
