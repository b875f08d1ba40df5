"""Scores of the DSA indexer: many query heads over one shared key a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paged, registry
from pallas_kernels.arch import Arch
from pallas_kernels.mqa_logits.spec import Spec
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80, needs_sm90

# Of the GPU kernels: columns of one product are heads times up to four queries.
_HEADS = (8, 16, 32, 64)
_MOST_SEQUENCES = 65535


def paged_logits(
    q: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    *,
    starts: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Index scores of query rows over their sequence's cached keys: decode (few rows) and prefill (a chunk of rows) alike.

    Computes: score[b, t, s] = sum_h weights[b, t, h] * relu(q[b, t, h] . key[b, s]) for starts[b, t] <= s < lengths[b, t].
    Inputs: q [batch, rows, heads, head_dim] float32 or e4m3 (its scale already in weights); weights float32 [batch, rows,
      heads], signed; cache: index-key cache (formats in ``paged``); layer: static or traced scalar, in range; table int32
      [batch, pages], page ids; lengths int32 [batch, rows], the number of keys a row may see (its own position + 1), 0 to
      pages * 64; starts int32 [batch, rows], the first one, 0 unless given. A contiguous run of keys is a table that counts up.
    Outputs: float32 [batch, rows, pages * 64]. Outside of starts <= s < lengths it is undefined: the reference fills -inf, the GPU
      backends write nothing there, so that a short sequence in a long table costs what it reads. Consumers mask by length.
      The scores are all that a call allocates, 4 * rows * pages * 64 bytes: a long prefill is scored in chunks of rows that
      the caller sizes (1024 rows over 128K positions are 512 MiB), and each program handles eight rows of a chunk.
    Rounding points: dequantized keys, dot products, relu and the sum over heads in float32. GPU backends multiply e4m3 values and
      apply the key's scale, which must not be negative, after the sum over heads. Hopper's FP8 units truncate within one
      product of 128 (see README); NaN and infinities propagate as in the reference, except on GPUs older than SM89, where a
      NaN byte in a key (no writer makes one) counts as 480.
    Refuses: the GPU backends take e4m3 queries, uint8 caches, head_dim 128 and 8, 16, 32 or 64 heads; else the reference's.
    In place: nothing. Graph-safe: yes; pages past a row's length are neither read nor looked up. The same bits in every call.
    Bound: bytes of the keys of each sequence once (132 a position for FP8) and of the scores, or the products' flops.
    Source: spec sections 5.3 and 7.
    """
    batch, rows, heads, head_dim = q.shape
    spec = Spec(
        rows=batch,
        queries=rows,
        heads=heads,
        head_dim=head_dim,
        table=table.shape[1],
        layers=cache.shape[0],
        pool=cache.shape[1],
        q_dtype=q.dtype.name,
        cache_dtype=cache.dtype.name,
        starts=starts is not None,
    )
    _check(spec, weights, cache, table, lengths, starts)
    args = (q, weights, cache, jnp.asarray(layer, jnp.int32), table, lengths, starts)
    return registry.call("mqa_logits", BACKENDS, spec, args, forced=backend)


def _check(
    spec: Spec, weights: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array, starts: jax.Array | None
) -> None:
    rows = (spec.rows, spec.queries)
    if weights.shape != (*rows, spec.heads) or table.shape[0] != spec.rows:
        raise ValueError(f"{weights.shape=} must be {(*rows, spec.heads)} and {table.shape=} start with {spec.rows}")
    if lengths.shape != rows or (starts is not None and starts.shape != rows):
        raise ValueError(f"{lengths.shape=} and {starts if starts is None else starts.shape} must be {rows}")
    page = (paged.index_page_width(spec.head_dim),) if spec.cache_dtype == "uint8" else (paged.PAGE, spec.head_dim)
    if cache.shape[2:] != page:
        raise ValueError(f"pages of shape {cache.shape[2:]} and {cache.dtype} must be {page} for {spec.head_dim=}")


def _sizes(spec: Spec) -> Refusal | None:
    """What the GPU kernels are written for."""
    if spec.q_dtype != "float8_e4m3fn" or spec.cache_dtype != "uint8":
        return Refusal(f"queries are {spec.q_dtype} and the cache {spec.cache_dtype}, not float8_e4m3fn and uint8")
    if spec.head_dim != 128 or spec.heads not in _HEADS:
        return Refusal(f"head_dim {spec.head_dim} must be 128 and heads {spec.heads} one of {_HEADS}")
    if min(spec.rows, spec.width, spec.table, spec.pages) < 1:
        return Refusal(f"{spec.rows} sequences, {spec.width} rows and {spec.table} pages must all be at least 1")
    if spec.rows > _MOST_SEQUENCES:
        return Refusal(f"{spec.rows} sequences are more than {_MOST_SEQUENCES}, the third axis of a grid")
    return None


def _gluon_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm90(arch):
        return refusal
    if spec.rows > 1024:
        return Refusal(f"{spec.rows} sequences are more than 1024, whose shares one block of threads can add up")
    if spec.heads > 32:
        return Refusal(f"{spec.heads} heads: four queries' accumulators and weights would not fit in registers")
    if spec.rows * spec.width * spec.heads * spec.head_dim >= 1 << 31:
        return Refusal(f"{spec.rows} x {spec.width} queries of {spec.heads} heads: offsets of queries are 32-bit")
    return _sizes(spec)


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    return _sizes(spec)


def _load_reference() -> Callable[..., Any]:
    from pallas_kernels.mqa_logits import reference

    def run(spec: Spec, *args: Any) -> jax.Array:
        return reference.paged_logits(*args)

    return run


BACKENDS = (
    Backend("gluon", _gluon_supports, Module("pallas_kernels.mqa_logits.gluon_sm90")),
    Backend("triton", _triton_supports, Module("pallas_kernels.mqa_logits.triton")),
    Backend("reference", always, _load_reference),
)
