"""What surrounds MLA's attention, against numpy: absorbed query, latent row, output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import latent_write, mla_front, mla_out, paged
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
    rotate,
    to_bf16,
    to_jnp,
    wide,
)

LAYERS, ROWS, HEADS, Q_RANK, NOPE, ROPE, RANK, V, HIDDEN = 2, 7, 3, 140, 20, 8, 144, 24, 136
EPS = 1e-5
query = jax.jit(mla_front.query, static_argnames=("eps", "arithmetic"))
write_latent = jax.jit(latent_write.write, static_argnames=("eps",))
output = jax.jit(mla_out.output, static_argnames=("arithmetic",))
ANGLE = np.random.default_rng(0).uniform(-9, 9, (ROWS, ROPE // 2))
COS, SIN = jnp.asarray(np.cos(ANGLE), jnp.float32), jnp.asarray(np.sin(ANGLE), jnp.float32)
# Small enough for the epsilon to matter (trap 1).
Q_A = normal(1, ROWS, Q_RANK, scale=5e-3)
Q_NORM = normal(2, LAYERS, Q_RANK)
W_UK = normal(3, LAYERS, HEADS, NOPE, RANK)


def q_b(kind: str) -> Weight:
    shape = (LAYERS, HEADS * (NOPE + ROPE), Q_RANK)
    return random_blocks(4, *shape) if kind == "fp8" else to_jnp(normal(4, *shape), kind)


def split_heads(ql: np.ndarray, weight: Weight, layer: int) -> tuple[np.ndarray, np.ndarray]:
    q = (ql @ dequantize(weight)[layer].T).reshape(ROWS, HEADS, NOPE + ROPE)
    return q[..., :NOPE], q[..., NOPE:]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "arithmetic"), [("float32", "w8a16"), ("fp8", "w8a16"), ("fp8", "w8a8")])
def test_query(kind: str, arithmetic: str, layer: int) -> None:
    w = q_b(kind)
    at = jnp.asarray(layer, jnp.int32)
    args = (jnp.asarray(Q_A), jnp.asarray(Q_NORM), w, jnp.asarray(W_UK))
    latent, q = query(*args, at, COS, SIN, eps=EPS, arithmetic=arithmetic)
    want = rms(Q_A, Q_NORM[layer], EPS)
    assert_close(latent, want)
    used = regroup(*quantize(np.asarray(latent), 128, 1e-10), 128) if arithmetic == "w8a8" else want
    nope, rope = split_heads(used, w, layer)
    assert q.shape == (ROWS, HEADS, RANK + ROPE) and q.dtype == jnp.float32
    assert_close(q[..., :RANK], np.einsum("rhd,hdc->rhc", nope, wide(W_UK)[layer]), 2e-6)
    assert_close(q[..., RANK:], rotate(rope, ANGLE), 2e-6)
    static = mla_front.query(*args, layer, COS, SIN, eps=EPS, arithmetic=arithmetic)
    assert_close(static[1], q)


def test_query_rounding_points_in_bfloat16() -> None:
    q_a, norm, w_uk = (to_jnp(x, jnp.bfloat16) for x in (Q_A, Q_NORM, W_UK))
    w = q_b("bfloat16")
    latent, q = query(q_a, norm, w, w_uk, 1, COS, SIN, eps=EPS)
    assert_bf16(latent, rms(q_a, norm[1], EPS))
    nope, rope = (to_bf16(part) for part in split_heads(wide(latent), w, 1))
    # A few elements of q_b's output lie in the middle between two bfloat16 and pull their successors along.
    assert_bf16(q[..., :RANK], np.einsum("rhd,hdc->rhc", nope, wide(w_uk)[1]), share=0.03)
    assert_bf16(q[..., RANK:], rotate(rope, ANGLE), share=0.03)


def test_absorbed_scores_are_the_naive_ones() -> None:
    """(q_n W_UK).c + q_r.kr = q_n.(W_UK c) + q_r.kr: one key head serves all query heads."""
    w = q_b("float32")
    _, q = query(jnp.asarray(Q_A), jnp.asarray(Q_NORM), w, jnp.asarray(W_UK), 0, COS, SIN, eps=EPS)
    c, kr = wide(normal(5, 11, RANK)), wide(normal(6, 11, ROPE))
    nope, rope = split_heads(rms(Q_A, Q_NORM[0], EPS), w, 0)
    keys = np.einsum("hdc,jc->jhd", wide(W_UK)[0], c)
    naive = np.einsum("rhd,jhd->rhj", nope, keys) + np.einsum("rhd,jd->rhj", rotate(rope, ANGLE), kr)
    assert_close(np.einsum("rhd,jd->rhj", wide(q), np.concatenate([c, kr], -1)), naive, 2e-6)


KV_A = normal(7, ROWS, RANK + ROPE, scale=5e-3)
KV_NORM = normal(8, LAYERS, RANK)
SLOTS = np.array([5, 64, -1, 127, 0, -1, 63], np.int32)


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_latent(dtype: str, cache_dtype: str) -> None:
    kv_a, norm = to_jnp(KV_A, dtype), to_jnp(KV_NORM, dtype)
    width = paged.latent_width(RANK, ROPE, cache_dtype == "uint8")
    before = jnp.full((LAYERS, 2, 64, width), 77, cache_dtype)
    layer = jnp.asarray(1, jnp.int32)
    got = write_latent(kv_a, norm, before, layer, jnp.asarray(SLOTS), COS, SIN, eps=EPS)
    assert got.dtype == before.dtype and got.shape == before.shape
    # The latent is normed, the key is rotated; neither gets the other's treatment.
    c, kr = rms(kv_a[:, :RANK], norm[1], EPS), rotate(kv_a[:, RANK:], ANGLE)
    if dtype == "bfloat16":
        c, kr = to_bf16(c), to_bf16(kr)
    real = np.flatnonzero(SLOTS >= 0)
    flat = np.asarray(got).reshape(LAYERS, 128, width)
    rows = np.asarray(paged.unpack_latent(jnp.asarray(flat[1, SLOTS[real]]), RANK, ROPE, jnp.float32))
    if cache_dtype == "uint8":
        c = regroup(*quantize(c, 128, 1e-10), 128)
        kr = to_bf16(kr)
    elif cache_dtype == "bfloat16":
        c, kr = to_bf16(c), to_bf16(kr)
    exact = (dtype, cache_dtype) == ("float32", "float32")
    for part, want in ((rows[:, :RANK], c[real]), (rows[:, RANK:], kr[real])):
        if exact:
            assert_close(part, want)
        else:  # a value in the middle between two representable ones may go either way
            assert (np.abs(part - want) > 1e-6 * np.abs(want)).mean() < 0.01
            assert_close(part, want, 2e-2)
    untouched = np.ones((LAYERS, 128), bool)
    untouched[1, SLOTS[real]] = False
    assert (wide(flat[untouched]) == 77).all()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "arithmetic"), [("float32", "w8a16"), ("fp8", "w8a16"), ("fp8", "w8a8")])
def test_output(kind: str, arithmetic: str, layer: int) -> None:
    context, w_uv = normal(9, ROWS, HEADS, RANK), normal(10, LAYERS, HEADS, V, RANK)
    shape = (LAYERS, HIDDEN, HEADS * V)
    o_proj = random_blocks(11, *shape) if kind == "fp8" else jnp.asarray(normal(11, *shape))
    at = jnp.asarray(layer, jnp.int32)
    got = output(jnp.asarray(context), jnp.asarray(w_uv), o_proj, at, arithmetic=arithmetic)
    values = np.einsum("rhc,hvc->rhv", wide(context), wide(w_uv)[layer]).reshape(ROWS, HEADS * V)
    if arithmetic == "w8a8":
        values = regroup(*quantize(values, 128, 1e-10), 128)
    assert got.shape == (ROWS, HIDDEN) and got.dtype == jnp.float32
    assert_close(got, values @ dequantize(o_proj)[layer].T, 2e-6)


def test_output_of_head_shards_adds_up() -> None:
    context, w_uv = normal(9, ROWS, HEADS, RANK), normal(10, 1, HEADS, V, RANK)
    o_proj = normal(12, 1, HIDDEN, HEADS, V)
    whole = output(jnp.asarray(context), jnp.asarray(w_uv), jnp.asarray(o_proj.reshape(1, HIDDEN, -1)), 0)
    parts = [
        output(*(jnp.asarray(a) for a in (context[:, s], w_uv[:, s], o_proj[:, :, s].reshape(1, HIDDEN, -1))), 0)
        for s in (slice(0, 1), slice(1, 3))
    ]
    assert_close(wide(parts[0]) + wide(parts[1]), whole)


def test_output_rounding_points_in_bfloat16() -> None:
    context, w_uv, o_proj = (
        to_jnp(x, jnp.bfloat16)
        for x in (normal(9, ROWS, HEADS, RANK), normal(10, 1, HEADS, V, RANK), normal(11, 1, HIDDEN, HEADS * V))
    )
    values = to_bf16(np.einsum("rhc,hvc->rhv", wide(context), wide(w_uv)[0]).reshape(ROWS, -1))
    assert_bf16(output(context, w_uv, o_proj, 0), values @ wide(o_proj)[0].T, share=0.03)
