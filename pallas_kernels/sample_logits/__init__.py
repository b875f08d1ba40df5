"""The next token from logits: greedy, temperature, top-k, top-p, min-p, drawn by a counter-based generator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80
from pallas_kernels.sample_logits.constants import EMPTY, HAS_INF, HAS_NAN, MOST_VOCAB
from pallas_kernels.sample_logits.spec import Spec

__all__ = ["BACKENDS", "EMPTY", "HAS_INF", "HAS_NAN", "greedy_tokens", "sample_logits"]


def sample_logits(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each row; every parameter is a row's own.

    Computes: rank tokens by logit, equal ones by id. Keep the top_k first (0: all); of their mass, softmax(logits / temperature),
      the shortest prefix that holds top_p of it, the token that crosses included, at least one; of those the ones at least min_p
      times as likely as the first. The token is argmax over the kept of logits / temperature + Gumbel(key, position, token), equal
      scores to the lower id; temperature 0 takes the largest logit. The draw depends on (logits, parameters, key, position) of
      the row alone, and an argmax shards over a split vocabulary: a maximum over devices, once the thresholds are known.
    Inputs: logits float32 or bfloat16 [rows, vocab]; temperature >= 0, top_p and min_p (clipped to 0..1) float32 [rows]; top_k
      int32 [rows]; key uint32 [rows, 2], any two words for each request (``jax.random.key_data``); positions int32 [rows].
    Outputs: tokens int32 [rows]; flags int32 [rows], a sum of HAS_NAN (such logits count as minus infinity and are never drawn),
      HAS_INF (tokens at plus infinity share all probability) and EMPTY (nothing to draw from: the token is 0).
    Rounding points: float32 y = (best - logit) * (log2(e) / temperature). From there on integers, the same on every backend
      and in every order: y in steps of 2^-25 log2 units for weights (2^-28 of the best's) and noise (31 random bits by
      Threefry-2x32-20), top_p in steps of 2^-24. Tokens 2^-29 times as likely as the best or less are never drawn. Where 1 /
      temperature is not exact, XLA's division on GPUs may differ from the kernel's in the last bit.
    Refuses: a vocabulary of 2^18 or more.
    In place: nothing. Graph-safe: yes, also the reference: no sort, no scan, no loop, nothing seeded.
    Bound: 4 * vocab bytes a row, 0.6 MB and 0.15 us at GLM's; launches are what counts.
    Source: spec section 1 (generation defaults: temperature 1, top_p 0.95); logits are sampled in float32.
    """
    rows, vocab = _checked(logits)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "positions": positions}
    for name, array in given.items():
        dtype = jnp.int32 if name in ("top_k", "positions") else jnp.float32
        if array.shape != (rows,) or array.dtype != dtype:
            raise ValueError(f"{name} {array.dtype}{array.shape} must be {dtype.__name__} [{rows}]")
    if key.shape != (rows, 2) or key.dtype != jnp.uint32:
        raise ValueError(f"key {key.dtype}{key.shape} must be uint32 [{rows}, 2]: jax.random.key_data of a key a row")
    args = (logits, temperature, top_k, top_p, min_p, key, positions)
    return registry.call("sample_logits", BACKENDS, Spec(rows, vocab, logits.dtype.name), args, forced=backend)


def greedy_tokens(logits: jax.Array, *, backend: str | None = None) -> tuple[jax.Array, jax.Array]:
    """``sample_logits`` at temperature 0 for every row, in two launches: (tokens, flags), equal logits to the lower id."""
    rows, vocab = _checked(logits)
    spec = Spec(rows, vocab, logits.dtype.name, greedy=True)
    return registry.call("sample_logits", BACKENDS, spec, (logits, *[None] * 6), forced=backend)


def _checked(logits: jax.Array) -> tuple[int, int]:
    if logits.ndim != 2 or logits.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"logits {logits.dtype}{logits.shape} must be float32 or bfloat16 [rows, vocab]")
    rows, vocab = logits.shape
    if not 1 <= vocab <= MOST_VOCAB:
        raise ValueError(f"{vocab=} must be in 1..{MOST_VOCAB}: sums of its weights have 46 bits")
    return rows, vocab


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if not 1 <= spec.rows <= 65535:
        return Refusal(f"rows {spec.rows} must be in 1..65535, the grid's second dimension")
    return None


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.sample_logits.triton")),
    Backend("reference", always, Module("pallas_kernels.sample_logits.reference")),
)
