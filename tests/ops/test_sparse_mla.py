"""Sparse MLA attention against a numpy softmax, on caches whose unselected slots are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged
from pallas_kernels.sparse_mla import attend
from tests.ops.numpy_ops import assert_bf16, assert_close, normal, to_bf16, to_jnp, wide

LAYERS, PAGES, RANK, ROPE, HEADS, ROWS, K = 2, 3, 144, 8, 3, 6, 20
CAPACITY = 64 * PAGES
SCALE = 0.11
run = jax.jit(attend, static_argnames=("kv_lora_rank", "scale"))
SELECTED = np.random.default_rng(0).permutation(CAPACITY)[: ROWS * 3 * K // 2].reshape(ROWS, -1)[:, :K].astype(np.int32)


def make_cache(dtype: str, used: np.ndarray) -> jax.Array:
    """Layer 1 holds numbers at the slots used; everything else is NaN (bytes 0xff: e4m3, float32 and bfloat16 NaN)."""
    c, kr = jnp.asarray(normal(1, used.size, RANK)), jnp.asarray(normal(2, used.size, ROPE))
    width = paged.latent_width(RANK, ROPE, dtype == "uint8")
    empty = jnp.full((LAYERS, PAGES, 64, width), 0xFF if dtype == "uint8" else jnp.nan, dtype)
    return paged.write_rows(empty, 1, jnp.asarray(used), paged.pack_latent(c, kr, jnp.dtype(dtype)))


def want_attention(q: jax.Array, cache: jax.Array, slots: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the valid slots of each row, in float64."""
    keys = wide(paged.unpack_latent(cache[1].reshape(CAPACITY, -1), RANK, ROPE, q.dtype))
    context, lse = np.zeros((*q.shape[:2], RANK)), np.full(q.shape[:2], -np.inf)
    for r, row in enumerate(slots):
        chosen = keys[row[(row >= 0) & (row < CAPACITY)]]
        if len(chosen):
            logits = scale * wide(q)[r] @ chosen.T
            peak = logits.max(-1, keepdims=True)
            p = np.exp(logits - peak)
            context[r] = p @ chosen[:, :RANK] / p.sum(-1, keepdims=True)
            lse[r] = (np.log(p.sum(-1, keepdims=True)) + peak)[:, 0]
    return context, lse


Q = normal(3, ROWS, HEADS, RANK + ROPE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_attends_to_the_selected_slots_only(dtype: str) -> None:
    slots = SELECTED.copy()
    used = slots.ravel().copy()
    # Hostile rows: padding anywhere, nothing at all, one slot, outside the cache.
    slots[1, ::3], slots[2], slots[3, 1:], slots[4, :5] = -1, -1, -1, [CAPACITY, CAPACITY + 63, 2**31 - 1, -2, -(2**31)]
    cache = make_cache(dtype, used)
    layer = jnp.asarray(1, jnp.int32)
    context, lse = run(jnp.asarray(Q), cache, layer, jnp.asarray(slots), kv_lora_rank=RANK, scale=SCALE)
    want, want_lse = want_attention(jnp.asarray(Q), cache, slots, SCALE)
    assert context.shape == (ROWS, HEADS, RANK) and context.dtype == jnp.float32 and lse.dtype == jnp.float32
    assert_close(context, want)
    assert_close(lse, want_lse)
    assert not np.asarray(context)[2].any() and (np.asarray(lse)[2] == -np.inf).all()


def test_unselected_slots_that_hold_numbers_do_not_matter() -> None:
    """NaN in the slots of other rows, in the other layer and in slot 0 (where a clamped padding would read)."""
    slots = np.where(SELECTED == 0, 190, SELECTED)
    slots[:, 7:] = -1
    cache = make_cache("float32", slots[:, :7].ravel())
    assert np.isnan(np.asarray(cache[1, 0, 0])).all()
    got = run(jnp.asarray(Q), cache, 1, jnp.asarray(slots), kv_lora_rank=RANK, scale=SCALE)
    clean = run(jnp.asarray(Q), jnp.nan_to_num(cache), 1, jnp.asarray(slots), kv_lora_rank=RANK, scale=SCALE)
    for a, b in zip(got, clean, strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_order_and_padding_do_not_matter() -> None:
    cache = make_cache("float32", SELECTED.ravel())
    slots = SELECTED.copy()
    slots[:, 15:] = -1
    shuffled = np.random.default_rng(4).permuted(slots, axis=1)
    a = run(jnp.asarray(Q), cache, 1, jnp.asarray(slots), kv_lora_rank=RANK, scale=SCALE)
    b = run(jnp.asarray(Q), cache, 1, jnp.asarray(shuffled), kv_lora_rank=RANK, scale=SCALE)
    assert_close(a[0], b[0])
    assert_close(a[1], b[1])


@pytest.mark.parametrize("at", [0, 1, 13, K])
def test_shards_merge_by_lse(at: int) -> None:
    """Two parts of a set, either of which may be empty, weighted by exp(lse), give the whole."""
    cache, q = make_cache("float32", SELECTED.ravel()), jnp.asarray(Q)
    first = np.where(np.arange(K) < at, SELECTED, -1)
    second = np.where(np.arange(K) < at, -1, SELECTED)
    halves = [run(q, cache, 1, jnp.asarray(s), kv_lora_rank=RANK, scale=SCALE) for s in (first, second)]
    whole, whole_lse = run(q, cache, 1, jnp.asarray(SELECTED), kv_lora_rank=RANK, scale=SCALE)
    lse = np.logaddexp(wide(halves[0][1]), wide(halves[1][1]))
    merged = sum(wide(c) * np.exp(wide(part) - lse)[..., None] for c, part in halves)
    assert_close(lse, whole_lse)
    assert_close(merged, whole)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_bfloat16_query_reads_bfloat16_keys_and_rounds_once(dtype: str) -> None:
    q, cache = to_jnp(Q, jnp.bfloat16), make_cache(dtype, SELECTED.ravel())
    context, lse = run(q, cache, 1, jnp.asarray(SELECTED), kv_lora_rank=RANK, scale=SCALE)
    want, want_lse = want_attention(q, cache, SELECTED, SCALE)
    assert_bf16(context, want)
    assert_close(lse, want_lse)
    # The keys are rounded to q's dtype before the products.
    keys = paged.unpack_latent(cache[1].reshape(CAPACITY, -1)[SELECTED[0]], RANK, ROPE, jnp.bfloat16)
    full = paged.unpack_latent(cache[1].reshape(CAPACITY, -1)[SELECTED[0]], RANK, ROPE, jnp.float32)
    np.testing.assert_array_equal(wide(keys), to_bf16(full))


def test_huge_scores_do_not_overflow() -> None:
    """Scores of 1e4: one key takes all, and the log-sum-exp is the score."""
    cache = make_cache("float32", SELECTED.ravel())
    context, lse = run(jnp.asarray(Q * 1e3), cache, 1, jnp.asarray(SELECTED), kv_lora_rank=RANK, scale=1.0)
    want, want_lse = want_attention(jnp.asarray(Q * np.float32(1e3)), cache, SELECTED, 1.0)
    assert_close(lse, want_lse)
    assert_close(context, want, 1e-3)


def test_scale_is_the_one_given() -> None:
    """Neither the absorbed width nor the key width sets it (trap 10)."""
    cache, q = make_cache("float32", SELECTED.ravel()), jnp.asarray(Q)
    flat, lse = run(q, cache, 1, jnp.asarray(SELECTED), kv_lora_rank=RANK, scale=0.0)
    keys = np.asarray(cache[1]).reshape(CAPACITY, -1)[SELECTED][..., :RANK]
    assert_close(flat, np.broadcast_to(wide(keys).mean(1)[:, None], flat.shape))
    assert_close(lse, np.full(lse.shape, np.log(K)))


@pytest.mark.parametrize("wrong", ["rows", "dtype", "page"])
def test_shapes_that_do_not_fit_are_refused_with_the_numbers(wrong: str) -> None:
    cache, slots = make_cache("float32", SELECTED.ravel()), jnp.asarray(SELECTED)
    if wrong == "page":
        cache = cache.reshape(LAYERS, 2 * PAGES, 32, -1)
    else:
        slots = slots[1:] if wrong == "rows" else slots.astype(jnp.int16)
    with pytest.raises(ValueError, match=r"pages of 64 slots, slots .* \[6, k\]"):
        attend(jnp.asarray(Q), cache, 1, slots, kv_lora_rank=RANK, scale=SCALE)
