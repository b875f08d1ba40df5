"""Geometry of rows over the paged caches, the plan, and the exact re-layout of kv_b."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax.cache import contiguous_table, make_cache, make_rows, slots_of
from glm52_jax.config import Config
from glm52_jax.layout import merge_kv_b, split_kv_b
from glm52_jax.plan import Plan
from tests.configs import GLM52, changed

REAL = Config.from_hf(GLM52)
SMALL = Config.from_hf(changed(num_hidden_layers=11, indexer_types=None, mlp_layer_types=None))


def test_bytes_of_the_real_caches() -> None:
    """Spec section 7: 53,940 bytes a token, 54,728 with the MTP layer."""
    for mtp, total in ((False, 53940), (True, 54728)):
        cache = make_cache(REAL, Plan(cache="fp8"), pages=1, mtp=mtp)
        assert cache.latent.shape == (78 + mtp, 1, 64, 656) and cache.index_keys.shape == (21 + mtp, 1, 8448)
        assert cache.latent.nbytes + cache.index_keys.nbytes == 64 * total


@pytest.mark.parametrize(
    ("kind", "width", "index"),
    [("float32", 576, (5, 2, 64, 128)), ("bfloat16", 576, (5, 2, 8448)), ("fp8", 656, (5, 2, 8448))],
)
def test_cache_formats(kind: str, width: int, index: tuple[int, ...]) -> None:
    cache = make_cache(SMALL, Plan(cache=kind), pages=2)
    assert cache.latent.shape == (11, 2, 64, width)
    assert cache.latent.dtype == (jnp.uint8 if kind == "fp8" else jnp.dtype(kind))
    assert cache.index_keys.shape == index
    assert cache.index_keys.dtype == (jnp.float32 if kind == "float32" else jnp.uint8)
    assert not np.asarray(cache.latent, np.float32).any()


def test_slots_beyond_int32_are_refused() -> None:
    with pytest.raises(ValueError, match="pages=33554433"):
        make_cache(SMALL, Plan(), pages=2**25 + 1)


@pytest.mark.parametrize("field", ["dtype", "cache", "linear"])
def test_plan_refuses_and_names(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='float16' must be one of"):
        Plan(**{field: "float16"})


def test_plan_is_static() -> None:
    assert hash(Plan()) == hash(Plan()) and Plan() != Plan(linear="w8a8")
    assert Plan(dtype="float32").activation == jnp.float32


def test_slots_go_through_the_table() -> None:
    table = np.array([[7, 2], [0, 5]], np.int32)
    positions = np.array([[[0, 63], [64, 127]], [[-1, 128], [65, 2**31 - 1]]], np.int32)
    got = slots_of(jnp.asarray(table), jnp.asarray(positions))
    assert got.tolist() == [[[448, 511], [128, 191]], [[-1, -1], [321, -1]]]
    assert slots_of(jnp.asarray(table), jnp.asarray(positions[:, 0, 0])).tolist() == [448, -1]


def test_contiguous_table() -> None:
    assert contiguous_table(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rows_of_ragged_sequences() -> None:
    """One long chunk across a page, one decode step, one sequence with nothing, one past its table."""
    table = contiguous_table(4, 2)
    starts, counts = jnp.asarray([62, 5, 9, 127], jnp.int32), jnp.asarray([3, 1, 0, 2], jnp.int32)
    rows = make_rows(SMALL, table, starts, counts, 3)
    assert rows.positions.tolist() == [[62, 63, 64], [5, 6, 7], [9, 10, 11], [127, 128, 129]]
    assert rows.lengths.tolist() == [[63, 64, 65], [6, 0, 0], [0, 0, 0], [128, 129, 0]]
    assert rows.slots.tolist() == [62, 63, 64, 133, -1, -1, -1, -1, -1, 511, -1, -1]
    assert rows.cos.shape == rows.sin.shape == (12, 32)
    angle = np.float32(64) * np.float64(8e6) ** -(np.arange(32) / 32)
    np.testing.assert_allclose(np.asarray(rows.cos)[2], np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(np.asarray(rows.sin)[2], np.sin(angle), atol=1e-5)


def test_kv_b_splits_by_head_key_rows_first() -> None:
    heads, nope, v, latent = 3, 4, 5, 2
    kv_b = np.arange(heads * (nope + v) * latent, dtype=np.float32).reshape(-1, latent)
    w_uk, w_uv = split_kv_b(jnp.asarray(kv_b), heads, nope, v)
    assert w_uk.shape == (heads, nope, latent) and w_uv.shape == (heads, v, latent)
    for h in range(heads):
        np.testing.assert_array_equal(np.asarray(w_uk)[h], kv_b[9 * h : 9 * h + 4])
        np.testing.assert_array_equal(np.asarray(w_uv)[h], kv_b[9 * h + 4 : 9 * h + 9])
    np.testing.assert_array_equal(np.asarray(merge_kv_b(w_uk, w_uv)), kv_b)
