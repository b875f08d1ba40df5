"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.sample_logits import sample_logits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 takes the most likely token; else logits are divided by it first. top_k: keep the k most likely (0: all).
    top_p: of what is left, renormalized, keep the smallest set with at least this probability. min_p: of what is left, drop
    tokens less likely than min_p times the most likely. seed: the draw for a token depends on seed, sequence and position only,
    not on the batch around it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be finite and >= 0")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be an integer >= 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be an integer in [0, 2**32)")


@struct.dataclass
class SamplingState:
    """A batch's sampling parameters on the device, one entry a sequence: a change of values is not a new program.

    temperature, top_p, min_p float32 [batch]; top_k int32 [batch]; key: PRNG keys [batch].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array


def sampling_state(sampling: Sampling, batch: int) -> SamplingState:
    """The same parameters for each of ``batch`` sequences; sequence i draws from key fold_in(seed, i)."""
    base = jax.random.key(sampling.seed)
    return SamplingState(
        temperature=jnp.full((batch,), sampling.temperature, jnp.float32),
        top_k=jnp.full((batch,), min(sampling.top_k, 2**31 - 1), jnp.int32),
        top_p=jnp.full((batch,), sampling.top_p, jnp.float32),
        min_p=jnp.full((batch,), sampling.min_p, jnp.float32),
        key=jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(batch, dtype=jnp.uint32)),
    )


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array) -> jax.Array:
    """Next tokens int32 [batch] from logits [batch, vocab]; positions int32 [batch] number the draws."""
    return sample_flagged(logits, state, positions)[0]


def sample_flagged(logits: jax.Array, state: SamplingState, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``sample`` and int32 [batch] that says which rows hold NaN, infinity or nothing to draw from (see ``sample_logits``)."""
    if logits.dtype != jnp.bfloat16:
        logits = logits.astype(jnp.float32)
    parameters = (state.temperature, state.top_k, state.top_p, state.min_p, jax.random.key_data(state.key))
    return sample_logits(logits, *parameters, positions)
