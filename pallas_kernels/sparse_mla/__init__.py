"""MLA attention over a selected set of cached latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paged, registry
from pallas_kernels.arch import Arch
from pallas_kernels.layer_index import layer_index
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80, needs_sm90
from pallas_kernels.sparse_mla.plan import one_tile_each
from pallas_kernels.sparse_mla.spec import Spec

_MOST_ROWS = 65535


def attend(
    q: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    *,
    kv_lora_rank: int,
    scale: float,
    splits: int = 0,
    apart: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Absorbed multi-query attention of each row over its own slots.

    Computes: p = softmax_j(scale * q[h] . key_j) over the selected slots; context[h] = sum_j p_j * key_j[:kv_lora_rank].
    Inputs: q [rows, heads, kv_lora_rank + rope]; cache [layers, pages, 64, width] (formats in ``paged``); layer: static or
      traced scalar, in range; slots int32 [rows, k], negative or out of the cache = not selected, any order (padding is how
      a row's length is given); scale: (nope + rope)^-1/2; splits: programs that share the keys of one row, 0 = by size; apart: the
      caller merges what the splits made (``mla_out.output`` does, with W_UV, in the launch that this would need).
    Outputs: context [rows, heads, kv_lora_rank] in q's dtype; lse float32 [rows, heads], the natural log of the sum of
      exponentials, for merging shards of a context (-inf and a zero context where nothing is selected). With ``apart`` [rows,
      parts, heads, ...]: float32 contexts, each over a share of the keys; one part, in q's dtype, where the backend merges.
    Rounding points: FP8 latents are dequantized to q's dtype; scores, softmax and sums in float32; one rounding at the end.
      The GPU backends also round the softmax weights to bfloat16 for the second product. Of an e4m3 NaN byte in a selected
      slot (no writer of ``paged`` makes one) the Triton backend makes 480 times the scale, Gluon a NaN context. Gluon's
      scores of FP8 latents are sums of e4m3 products, which the tensor cores add up with about 14 bits, a group of 128 at a time.
      Gluon's kernel for few heads and rows is as Triton's here; it rounds weight times scale instead of latent times scale,
      and takes queries below 2^27. Gluon's eight splits of 32 heads a program (8 rows of 64 heads) are rounded to q's dtype before
      they are merged.
    Refuses: the GPU backends take bfloat16 queries, kv_lora_rank 512, rope 64; everything else is the reference's.
    In place: nothing. Graph-safe: yes; a fixed number of splits gives the same bits in every call. What is not selected is
      not read, NaN included.
    Bound: rows * k * row bytes of the cache (656 for FP8); flops 2 * rows * heads * k * (2 * kv_lora_rank + rope).
    Source: spec sections 5.2, 5.4 and 7.
    """
    spec = Spec(
        *(
            q.shape[0],
            q.shape[1],
            slots.shape[1],
            kv_lora_rank,
            q.shape[2] - kv_lora_rank,
            cache.shape[0],
            cache.shape[1],
        ),
        *(q.dtype.name, cache.dtype.name, float(scale), splits, apart),
    )
    if cache.shape[-1] != spec.width:
        raise ValueError(f"cache rows hold {cache.shape[-1]} elements of {cache.dtype}, {spec} needs {spec.width}")
    if cache.shape[2] != paged.PAGE or slots.shape[0] != spec.rows or slots.dtype != jnp.int32:
        raise ValueError(
            f"cache {cache.shape} must have pages of {paged.PAGE} slots, slots {slots.dtype}{slots.shape} be int32 "
            f"[{spec.rows}, k]"
        )
    args = (q, cache, layer_index(layer), slots)
    context, lse = registry.call("sparse_mla", BACKENDS, spec, args, forced=backend)
    return (context[:, None], lse[:, None]) if apart and context.ndim == 3 else (context, lse)


def _sizes(spec: Spec) -> Refusal | None:
    """What the GPU kernels are written for."""
    if (spec.kv_lora_rank, spec.rope) != (512, 64):
        return Refusal(f"kv_lora_rank {spec.kv_lora_rank} and rope {spec.rope} must be 512 and 64")
    if spec.q_dtype != "bfloat16":
        return Refusal(f"queries are {spec.q_dtype}, the kernel computes in bfloat16")
    if spec.cache_dtype not in ("uint8", "bfloat16", "float32"):
        return Refusal(f"the cache is {spec.cache_dtype}, not uint8, bfloat16 or float32")
    if min(spec.rows, spec.heads, spec.k) < 1:
        return Refusal(f"{spec.rows} rows, {spec.heads} heads and {spec.k} slots must all be at least 1")
    if spec.rows > _MOST_ROWS:
        return Refusal(f"{spec.rows} rows are more than {_MOST_ROWS}, the third axis of a grid")
    return None


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    return _sizes(spec)


def _gluon_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm90(arch):
        return refusal
    if spec.cache_dtype != "uint8":
        return Refusal(f"the cache is {spec.cache_dtype}, the kernel reads FP8 latents (uint8)")
    few = 0 if one_tile_each(spec) else 8 if spec.heads <= 16 else 2
    if spec.rows <= few:
        return Refusal(f"{spec.rows} rows of {spec.heads} heads: the Triton backend is faster up to {few}")
    return _sizes(spec)


def _load_reference() -> Callable[..., Any]:
    from pallas_kernels.sparse_mla import reference

    def run(spec: Spec, q: jax.Array, cache: jax.Array, layer: int | jax.Array, slots: jax.Array) -> Any:
        return reference.attend(q, cache, layer, slots, spec.kv_lora_rank, spec.scale)

    return run


BACKENDS = (
    Backend("gluon", _gluon_supports, Module("pallas_kernels.sparse_mla.gluon_sm90")),
    Backend("triton", _triton_supports, Module("pallas_kernels.sparse_mla.triton")),
    Backend("reference", always, _load_reference),
)
