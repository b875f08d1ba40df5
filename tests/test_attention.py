"""Layers with a pending residual sum, and the latent write that shares a launch with the query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import layer
from glm52_jax.cache import Cache
from glm52_jax.layers.attention import add_attention, attention
from glm52_jax.layers.mlp import add_dense_mlp
from glm52_jax.weights import DenseWeights, IndexerWeights
from pallas_kernels import latent_write, mla_front
from pallas_kernels.blocks import random_blocks
from pallas_kernels.compare import compare
from pallas_kernels.parts import Parts

SMALL = layer.LayerSpec(rows=3, layers=2, tokens=256, hidden=256, heads=4, q_lora_rank=128, kv_lora_rank=128, topk=64)


@pytest.fixture(scope="module")
def given() -> tuple[layer.State, layer.Fixed, jax.Array]:
    state, fixed = layer.inputs(SMALL, jax.random.key(1))
    return state, fixed, jax.random.normal(jax.random.key(2), state[0].shape, jnp.float32).astype(jnp.bfloat16)


def run(function, x, extra, state, fixed):
    weights, rows, selection = fixed
    cache = Cache(latent=state[1], index_keys=jnp.zeros((0,), jnp.uint8))
    none = IndexerWeights(*(None,) * 5)
    return function(weights, 1, none, None, x, *extra, cache, rows, selection, SMALL.config(), SMALL.plan())


def test_pending_sum_is_added_before_the_norm(given) -> None:
    (x, latent), fixed, delta = given
    total, out, cache, _ = run(add_attention, x, (delta,), (x, latent), fixed)
    summed = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(summed))
    want, want_cache, _ = run(attention, summed, (), (x, latent), fixed)
    assert compare(out.astype(jnp.float32), want.astype(jnp.float32)).rel_l2 < 1e-6
    np.testing.assert_array_equal(np.asarray(cache.latent), np.asarray(want_cache.latent))
    unadded, _, _ = run(attention, x, (), (x, latent), fixed)
    assert compare(out.astype(jnp.float32), unadded.astype(jnp.float32)).rel_l2 > 0.1


def test_parts_of_a_pending_sum_are_added_as_their_sum(given) -> None:
    (x, latent), fixed, _ = given
    ids, weights = jnp.asarray([[0, 3], [4, 1], [2, 2]], jnp.int32), jnp.asarray([[0.5, 2], [1, 0.25], [1, 1]])
    parts = jax.random.normal(jax.random.key(9), (9, x.shape[1]), jnp.float32)
    delta = Parts(parts.at[2].set(jnp.nan), ids, weights, 4)
    got = run(add_attention, x, (delta,), (x, latent), fixed)
    want = run(add_attention, x, (delta.summed(x.dtype),), (x, latent), fixed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_without_a_sum_the_stream_is_passed_on(given) -> None:
    (x, latent), fixed, _ = given
    total, out, _, _ = run(add_attention, x, (None,), (x, latent), fixed)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(run(attention, x, (), (x, latent), fixed)[0]))


@pytest.mark.parametrize("cache_dtype", ["uint8", "bfloat16"])
def test_query_and_write_is_both(given, cache_dtype: str) -> None:
    (_, latent), (weights, rows, _), _ = given
    key = jax.random.key(3)
    q_a = jax.random.normal(key, (3, 128), jnp.float32).astype(jnp.bfloat16)
    kv_a = jax.random.normal(key, (3, 128 + 64), jnp.float32).astype(jnp.bfloat16)
    cache = latent if cache_dtype == "uint8" else jnp.zeros((*latent.shape[:3], 128 + 64), cache_dtype)
    rotation = (rows.cos, rows.sin)
    front = (q_a, weights.q_a_norm, weights.q_b, weights.w_uk)
    slots = jnp.array([5, -1, 64], jnp.int32)
    got = mla_front.query_and_write(*front, kv_a, weights.kv_a_norm, cache, 1, slots, *rotation, eps=1e-5)
    want = (
        *mla_front.query(*front, 1, *rotation, eps=1e-5),
        latent_write.write(kv_a, weights.kv_a_norm, cache, 1, slots, *rotation, eps=1e-5),
    )
    assert not np.array_equal(np.asarray(got[2]), np.asarray(cache))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_mlp_adds_a_pending_sum_before_the_norm(given) -> None:
    (x, _), _, delta = given
    gate_up, down = random_blocks(jax.random.key(4), 4, 128, 256), random_blocks(jax.random.key(5), 2, 256, 128)
    pairs = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), gate_up)
    weights = DenseWeights(post_norm=jnp.ones((2, 256), x.dtype), gate_up=pairs, down=down)
    total, out = add_dense_mlp(weights, 1, x, delta, SMALL.config(), SMALL.plan())
    summed = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(summed))
    _, want = add_dense_mlp(weights, 1, summed, None, SMALL.config(), SMALL.plan())
    assert compare(out.astype(jnp.float32), want.astype(jnp.float32)).rel_l2 < 1e-6
    _, without = add_dense_mlp(weights, 1, x, None, SMALL.config(), SMALL.plan())
    assert compare(out.astype(jnp.float32), without.astype(jnp.float32)).rel_l2 > 0.1
