"""The reference of sample_logits: against exact integers and sorts in numpy, its noise against its distribution, hostile rows."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import lowering
from pallas_kernels.arch import by_name
from pallas_kernels.sample_logits import EMPTY, HAS_INF, HAS_NAN, greedy_tokens, noise, reference, sample_logits, spec

VOCAB = 61
prefix = jax.jit(reference.prefix)
sample = jax.jit(functools.partial(sample_logits, backend="reference"))


def parameters(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> tuple[jax.Array, ...]:
    floats = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows,)) for x in (temperature, top_p, min_p)]
    words = jnp.broadcast_to(jax.random.key_data(jax.random.key(seed)), (rows, 2))
    return floats[0], jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), (rows,)), floats[1], floats[2], words


def draw(logits: np.ndarray, positions: np.ndarray | None = None, **chosen) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(len(logits)) if positions is None else positions
    tokens, flags = sample(jnp.asarray(logits), *parameters(len(logits), **chosen), jnp.asarray(at, jnp.int32))
    return np.asarray(tokens), np.asarray(flags)


def test_threefry_known_answers() -> None:
    """Vectors of the Random123 distribution."""
    for words, want in (
        ((0, 0, 0, 0), 0x6B200159),
        ((2**32 - 1,) * 4, 0x1CB996FC),
        ((0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3), 0xC4923A9C),
    ):
        k0, k1, c0, c1 = (jnp.uint32(w) for w in words)
        assert int(noise.threefry((k0, k1), (c0, c1))) == want


def test_fixed_point_functions_against_float64() -> None:
    q = np.arange(0, 29 << 25, 9973, dtype=np.int32)
    want = 2.0 ** (28 - q / 2.0**25)
    assert (np.abs(np.asarray(noise.weight(jnp.asarray(q))) - want) <= 0.51 + 2.3e-7 * want).all()
    assert int(noise.weight(jnp.int32(0))) == 2**28
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    bits = np.concatenate([np.random.default_rng(0).integers(0, 2**32, 200000), edges]).astype(np.uint32)
    want = -np.log2(-np.log1p(-((bits | 1) / 2.0**32)) / np.log(2))
    np.testing.assert_allclose(np.asarray(noise.gumbel(jnp.asarray(bits))) / 2.0**25, want, rtol=0, atol=2e-7)


@given(st.integers(0, 2**32 - 1), st.integers(0, VOCAB + 3), st.floats(2.0**-20, 1.0, width=32))
def test_kept_prefix_is_exact(seed: int, top_k: int, top_p: float) -> None:
    """Against a sort and Python's integers, with many equal keys and weights of every size."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.integers(0, 2**28 + 1, rng.integers(1, 12)))[::-1]
    steps[0] = 2**28
    level = rng.integers(0, len(steps), VOCAB)
    level[rng.integers(VOCAB)] = 0
    weights, key = steps[level].astype(np.uint32), (level * 7919).astype(np.int32)
    got = prefix(
        jnp.asarray(key[None]), jnp.asarray(weights[None]), jnp.array([top_k]), jnp.array([top_p], jnp.float32)
    )
    ranked = sorted(range(VOCAB), key=lambda token: (key[token], token))[: top_k or VOCAB]
    wanted = max(1, -(-sum(int(weights[t]) for t in ranked) * math.floor(top_p * 2**24) // 2**24))
    kept, total = set(), 0
    for token in ranked:
        if total < wanted:
            kept.add(token)
        total += int(weights[token])
    assert set(np.flatnonzero(np.asarray(got)[0])) == kept


def test_sums_of_the_largest_vocabulary_do_not_overflow() -> None:
    vocab = 2**18 - 1
    key, weights = jnp.zeros((2, vocab), jnp.int32), jnp.full((2, vocab), 2**28 - jnp.arange(2)[:, None], jnp.uint32)
    kept = np.asarray(prefix(key, weights, jnp.array([0, 200001]), jnp.array([0.75, 0.5], jnp.float32)))
    assert kept.sum(1).tolist() == [math.ceil(0.75 * vocab), 100001]
    assert kept[0, :196607].all()


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.25, 5.0, width=32),
    st.integers(0, 20),
    st.floats(2.0**-6, 1.0, width=32),
    st.floats(0, 1, width=32),
)
def test_draws_are_of_the_kept_set(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """The definition by a sort in float64; what rounding decides, at a cut's edge, may go either way."""
    logits = (3 * np.random.default_rng(seed).normal(size=VOCAB)).astype(np.float32)
    tokens, flags = draw(
        np.tile(logits, (64, 1)), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    order = np.argsort(-logits, kind="stable")[: top_k or VOCAB]
    p = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    before = (np.cumsum(p) - p) / p.sum()
    kept = ((before < top_p + 1e-5) | (np.arange(len(order)) == 0)) & (p >= min_p - 1e-5)
    assert set(tokens) <= set(order[kept].tolist())
    assert not flags.any()


def test_draws_follow_the_probabilities() -> None:
    count = 60000
    logits = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32)
    chosen = dict(temperature=np.float32(0.7), top_k=40, top_p=0.97, min_p=0.01)
    tokens, _ = draw(np.tile(logits, (count, 1)), **chosen, seed=9)
    order = np.argsort(-logits, kind="stable")[:40]
    p = np.exp(logits[order].astype(np.float64) / 0.7)
    p /= p.sum()
    p = np.where((np.cumsum(p) - p < 0.97) & (p >= 0.01 * p[0]), p, 0)
    p /= p.sum()
    seen = np.bincount(tokens, minlength=VOCAB)[order]
    assert seen.sum() == count and not seen[p == 0].any()
    kept = p > 0
    chi2 = float(((seen - count * p) ** 2 / np.where(kept, count * p, 1))[kept].sum())
    freedom = kept.sum() - 1
    assert abs(chi2 - freedom) <= 5 * math.sqrt(2 * freedom)


def test_a_row_depends_on_itself_alone() -> None:
    rng = np.random.default_rng(1)
    logits, at = rng.normal(size=(6, VOCAB)).astype(np.float32), rng.integers(0, 2**20, 6)
    tokens, _ = draw(logits, at, top_p=0.9)
    poisoned = logits.copy()
    poisoned[[0, 3]] = np.nan
    others, flags = draw(poisoned, at, top_p=0.9)
    assert others[[1, 2, 4, 5]].tolist() == tokens[[1, 2, 4, 5]].tolist()
    assert flags.tolist() == [HAS_NAN | EMPTY, 0, 0, HAS_NAN | EMPTY, 0, 0]
    for row in range(6):
        assert draw(logits[[row]], at[[row]], top_p=0.9)[0][0] == tokens[row]
    again = draw(logits[::-1], at[::-1], top_p=0.9)[0]
    assert again[::-1].tolist() == tokens.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1e-30, 1e4])
def test_hostile_rows(temperature: float) -> None:
    nan, inf = math.nan, math.inf
    rows = [[nan, 1, nan, 1], [inf, 0, inf, nan], [-inf] * 4, [nan] * 4, [-inf, -inf, -1e38, nan], [-nan, 7, 7, -inf]]
    allowed = [{1, 3}, {0, 2}, {0}, {0}, {2}, {1, 2}]
    want = [HAS_NAN, HAS_INF | HAS_NAN, EMPTY, HAS_NAN | EMPTY, HAS_NAN, HAS_NAN]
    logits = np.array(rows, np.float32)
    seen: list[set[int]] = [set() for _ in rows]
    for seed in range(12):
        tokens, flags = draw(logits, temperature=temperature, seed=seed)
        assert flags.tolist() == want
        for row, token in enumerate(tokens):
            seen[row].add(int(token))
    assert seen == ([{min(a)} for a in allowed] if temperature == 0 else allowed)
    tokens, flags = greedy_tokens(jnp.asarray(logits), backend="reference")
    assert (tokens.tolist(), flags.tolist()) == ([1, 0, 0, 0, 2, 1], want)


def test_graph_safe() -> None:
    """No sort, top_k, loop, scan or generator on the device: nothing that splits a graph."""
    args = jax.eval_shape(lambda: spec.inputs(spec.Spec(2, 4096), jax.random.key(0)))[:-1]
    text = lowering.lower_for_cuda(
        functools.partial(sample_logits, backend="reference"), *args, arch=by_name("H200-141")
    )
    for banned in ("sort", "top_k", "TopK", "while", "scan", "rng", "custom_call"):
        assert banned not in text, banned


def test_refusals_name_the_values() -> None:
    logits = jnp.zeros((2, 8))
    good = (*parameters(2), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"float16.*float32 or bfloat16"):
        sample_logits(logits.astype(jnp.float16), *good)
    with pytest.raises(ValueError, match="vocab=262144"):
        greedy_tokens(jnp.zeros((1, 2**18)))
    with pytest.raises(ValueError, match=r"top_k float32\(2,\) must be int32 \[2\]"):
        sample_logits(logits, good[0], good[0], *good[2:])
    with pytest.raises(ValueError, match=r"key uint32\(2,\) must be uint32 \[2, 2\]"):
        sample_logits(logits, *good[:4], good[4][0], good[5])
