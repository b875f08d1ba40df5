"""Sampling: the kept set and its probabilities, ties, determinism, and independence of the batch."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax.sampling import Sampling, SamplingState, sample, sampling_state

VOCAB = 7
DRAWS = 20000
LOGITS = np.array([0.3, 2.0, -1.0, 1.4, 2.6, -3.0, 0.9], np.float32)
run = jax.jit(sample)


def draws(sampling: Sampling, logits: np.ndarray = LOGITS, count: int = DRAWS) -> np.ndarray:
    """Tokens of sequence 0 at positions 0..count-1, always from the same logits."""
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (count,)), sampling_state(sampling, 1))
    return np.asarray(run(jnp.asarray(np.broadcast_to(logits, (count, logits.size))), state, positions(count)))


def positions(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def one(sampling: Sampling, logits: np.ndarray) -> int:
    return int(run(jnp.asarray(logits[None]), sampling_state(sampling, 1), positions(1))[0])


def greedy(logits: np.ndarray) -> np.ndarray:
    """Greedy tokens of [batch, vocab]."""
    state = sampling_state(Sampling(temperature=0.0), logits.shape[0])
    return np.asarray(run(jnp.asarray(logits), state, positions(logits.shape[0])))


def smallest_set(p: np.ndarray, mass: float) -> tuple[int, ...]:
    """Of all subsets with at least ``mass``: the fewest tokens, then the most probable, then the lowest ids."""
    subsets = (s for size in range(1, VOCAB + 1) for s in itertools.combinations(range(VOCAB), size))
    enough = [s for s in subsets if math.fsum(p[list(s)]) >= mass - 1e-12]
    return min(enough, key=lambda s: (len(s), -round(math.fsum(p[list(s)]), 9), s))


def expected(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Probability of each token in float64, from the definitions."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        best = sorted(range(VOCAB), key=lambda token: (-logits[token], token))[: sampling.top_k]
        p = np.where(np.isin(np.arange(VOCAB), best), p, 0.0)
    p /= p.sum()
    kept = np.isin(np.arange(VOCAB), smallest_set(p, sampling.top_p)) & (p >= sampling.min_p * p.max())
    return np.where(kept, p, 0.0) / p[kept].sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5, seed=1),
        Sampling(temperature=3.0, seed=2),
        Sampling(top_k=3, seed=3),
        Sampling(top_k=100, seed=4),
        Sampling(top_p=0.5, seed=5),
        Sampling(top_p=0.95, seed=6),
        Sampling(top_p=1e-6, seed=7),
        Sampling(min_p=0.2, seed=8),
        Sampling(min_p=1.0, seed=9),
        Sampling(temperature=2.0, top_k=5, top_p=0.8, seed=10),
        Sampling(top_k=4, top_p=0.9, min_p=0.3, temperature=1.5, seed=2**32 - 1),
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items() if v != getattr(Sampling(), k)),
)
def test_draws_follow_the_kept_set(sampling: Sampling) -> None:
    p = expected(sampling)
    counts = np.bincount(draws(sampling), minlength=VOCAB)
    assert counts.shape == (VOCAB,)
    kept = p > 0
    assert not counts[~kept].any()
    assert counts[DRAWS * p > 20].all()
    chi2 = float((((counts - DRAWS * p) ** 2)[kept] / (DRAWS * p[kept])).sum())
    freedom = int(kept.sum()) - 1
    # Five standard deviations of the chi-square distribution; the seeds are fixed.
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 1e-6, f"{chi2=} {freedom=} {counts=} {p=}"


def test_top_p_counts_what_top_k_left() -> None:
    """Half of all mass is token 4 alone; half of the two best needs only one as well, 0.7 of them both."""
    assert set(draws(Sampling(top_k=2, top_p=0.7))) == {1, 4}
    assert set(draws(Sampling(top_k=2, top_p=0.6))) == {4}
    assert set(draws(Sampling(top_p=0.6))) == {1, 4}


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.random.default_rng(0).normal(size=(8, VOCAB)).astype(np.float32)
    logits[3] = 1.0
    logits[4, [2, 5]] = 9.0
    tokens = greedy(logits)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))
    assert (tokens[3], tokens[4]) == (0, 2)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=1), Sampling(top_k=1, temperature=50.0), Sampling(temperature=1e-3), Sampling(top_p=1e-9)],
    ids=str,
)
def test_limits_equal_greedy(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).permuted(np.tile(np.arange(VOCAB, dtype=np.float32), (8, 1)), axis=1)
    tokens = np.asarray(run(jnp.asarray(logits), sampling_state(sampling, 8), positions(8)))
    np.testing.assert_array_equal(tokens, greedy(logits))


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = np.array([0.0, 40.0, 50.0, 45.0, -9.0, 0.0, 1.0], np.float32)
    assert [one(Sampling(temperature=t), logits) for t in (1e-2, 1e-20, 1e-36, 1e-37, 1e-45, 0.0)] == [2] * 6


def test_top_k_beyond_int32_keeps_all() -> None:
    assert set(draws(Sampling(top_k=2**31))) == set(range(VOCAB))


def test_ties_go_to_the_lower_token() -> None:
    logits = np.array([-1.0, 3.0, 0.0, 3.0, 3.0, 3.0, -1.0], np.float32)
    assert one(Sampling(top_k=1), logits) == 1
    assert set(draws(Sampling(top_k=2), logits)) == {1, 3}
    assert set(draws(Sampling(top_p=0.3), logits)) == {1, 3}
    assert set(draws(Sampling(min_p=1.0), logits)) == {1, 3, 4, 5}


def test_negative_zero_ties_with_zero() -> None:
    logits = np.array([-1.0, -0.0, 0.0, -1.0, -1.0, -1.0, -1.0], np.float32)
    assert one(Sampling(temperature=0.0), logits) == 1
    assert one(Sampling(top_k=1), logits) == 1


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = LOGITS.copy()
    logits[[0, 4]] = -np.inf
    for sampling in (Sampling(temperature=100.0), Sampling(top_k=6), Sampling(top_p=0.999), Sampling(min_p=0.0)):
        assert set(draws(sampling, logits)) <= {1, 2, 3, 5, 6}
    assert set(draws(Sampling(temperature=100.0), logits)) == {1, 2, 3, 5, 6}
    only = np.full(VOCAB, -np.inf, np.float32)
    only[5] = -1e30
    assert {
        one(s, only) for s in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.1), Sampling(min_p=1.0))
    } == {5}


def rows_of(state: SamplingState, rows: list[int]) -> SamplingState:
    return jax.tree.map(lambda a: a[jnp.asarray(rows)], state)


FLAT = np.zeros((8, 4096), np.float32)
AT = np.array([5, 5, 5, 9, 0, 1, 2**20 - 1, 5], np.int32)


def flat_draws(sampling: Sampling, at: np.ndarray = AT) -> np.ndarray:
    return np.asarray(run(jnp.asarray(FLAT), sampling_state(sampling, 8), jnp.asarray(at)))


def test_a_draw_is_fixed_by_seed_sequence_and_position() -> None:
    base = flat_draws(Sampling(seed=3))
    np.testing.assert_array_equal(base, flat_draws(Sampling(seed=3)))
    # Of 4096 equal tokens, eight independent draws agree in any row with a probability of 0.2 %.
    assert (base != flat_draws(Sampling(seed=4))).all()
    assert (base != flat_draws(Sampling(seed=3 + 2**31))).all()
    assert (base != flat_draws(Sampling(seed=3), AT + 1)).all()
    assert len({int(base[i]) for i in (0, 1, 2, 7)}) == 4  # sequences that share a position


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = np.random.default_rng(2).normal(size=FLAT.shape).astype(np.float32)
    state = sampling_state(Sampling(seed=11, top_p=0.95), 8)
    batch = np.asarray(run(jnp.asarray(logits), state, jnp.asarray(AT)))
    for row in (0, 3, 7):
        alone = run(jnp.asarray(logits[row : row + 1]), rows_of(state, [row]), jnp.asarray(AT[row : row + 1]))
        assert int(alone[0]) == batch[row]
    backwards = list(range(7, -1, -1))
    again = run(jnp.asarray(logits[::-1]), rows_of(state, backwards), jnp.asarray(AT[::-1]))
    np.testing.assert_array_equal(np.asarray(again)[::-1], batch)
    # A longer batch gives its first sequences the same keys.
    np.testing.assert_array_equal(
        jax.random.key_data(sampling_state(Sampling(seed=11), 3).key),
        jax.random.key_data(sampling_state(Sampling(seed=11), 8).key)[:3],
    )


def test_each_row_has_its_own_parameters() -> None:
    """One program serves any mix of parameters."""
    mixed = [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(seed=5), Sampling(temperature=0.0, seed=9)]
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *[sampling_state(s, 1) for s in mixed])
    logits = np.tile(LOGITS, (4, 1))
    tokens = np.asarray(run(jnp.asarray(logits), state, positions(4)))
    assert tokens[[0, 1, 3]].tolist() == [4, 4, 4]
    assert tokens[2] == np.asarray(run(jnp.asarray(logits[2:3]), rows_of(state, [2]), positions(3)[2:]))[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0)],
        *[("top_p", 1.5), ("top_p", -1.0), ("top_p", math.nan), ("min_p", -0.01), ("min_p", 1.01), ("min_p", math.nan)],
        *[("seed", -1), ("seed", 2**32), ("seed", 1.5)],
    ],
)
def test_refuses_parameters_and_prints_them(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampling(**{name: value})
