"""Between MLA's query down-projection and its attention: normed latent and absorbed query."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BlockScaled, Weight
from pallas_kernels.layer_index import layer_index
from pallas_kernels.mla_front.spec import Spec
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80


def query(
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Normed query latent and absorbed query.

    Computes: ql = RMS(q_a; norm[layer], eps); q = ql @ q_b[layer].T split by head into nope | rope;
      query = [q_nope @ W_UK[layer] | rotated q_rope].
    Inputs: q_a [rows, q_lora_rank]; norm [layers, q_lora_rank]; q_b [layers, heads * (nope + rope), q_lora_rank], head major;
      w_uk [layers, heads, nope, kv_lora_rank]; cos, sin float32 [rows, rope / 2]; layer: static or traced scalar.
    Outputs: ql [rows, q_lora_rank] (the indexer reads it too); query [rows, heads, kv_lora_rank + rope], both in q_a's dtype.
    Rounding points: ql, the output of q_b, the rotated part and the absorbed part, each once to q_a's dtype.
    Refuses: the Triton backend takes bfloat16 and sizes that are multiples of 64; everything else is the reference's.
    Graph-safe: yes; two launches (norm with q_b, absorption with rotation) on Hopper, three elsewhere.
    Bound: bytes of q_b[layer] (33.6 MB in FP8 at GLM's shape) and of W_UK[layer] (12.6 MB in bfloat16).
    Source: spec section 5.2.
    """
    spec = _spec(q_a, q_b, w_uk, cos, eps, arithmetic)
    args = (q_a, norm, q_b, w_uk, layer_index(layer), cos, sin)
    return registry.call("mla_front", BACKENDS, spec, args, forced=backend)


def query_and_write(
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    kv_a: jax.Array,
    kv_norm: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``query`` and ``latent_write.write`` together: what stands between the projections of x and the attention.

    Computes: (ql, query) as ``query``; cache[layer, slots] as ``latent_write.write(kv_a, kv_norm, cache, ...)``.
    Inputs: as for the two; eps is that of both norms.
    Outputs: ql [rows, q_lora_rank]; query [rows, heads, kv_lora_rank + rope]; the cache, same shape.
    Rounding points: those of the two. In place: the cache, under jit where it is donated. Graph-safe: yes; two launches.
    Refuses: as the two; a latent that the absorbing kernel cannot write (not 512 + 64, or a float32 cache) is written by
      ``latent_write`` in a launch of its own.
    Bound: as ``query``. Source: spec sections 5.2 and 7.
    """
    spec = _spec(q_a, q_b, w_uk, cos, eps, arithmetic)
    spec = dataclasses.replace(spec, cache_dtype=cache.dtype.name, pages=cache.shape[1])
    args = (q_a, norm, q_b, w_uk, layer_index(layer), cos, sin, cache, (kv_a, kv_norm, slots))
    return registry.call("mla_front", BACKENDS, spec, args, forced=backend)


def _spec(q_a: jax.Array, q_b: Weight, w_uk: jax.Array, cos: jax.Array, eps: float, arithmetic: str) -> Spec:
    heads, nope, latent = w_uk.shape[1:]
    return Spec(
        *(q_a.shape[0], heads, nope, 2 * cos.shape[-1], latent, q_a.shape[-1], w_uk.shape[0]),
        *(q_a.dtype.name, w_uk.dtype.name, isinstance(q_b, BlockScaled), float(eps), arithmetic),
    )


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if (spec.dtype, spec.weight_dtype) != ("bfloat16", "bfloat16"):
        return Refusal(f"{spec.dtype} rows and {spec.weight_dtype} W_UK: the kernel takes bfloat16")
    if spec.nope % 64 or spec.kv_lora_rank % 64 or spec.rope not in (32, 64, 128):
        return Refusal(
            f"nope {spec.nope} and kv_lora_rank {spec.kv_lora_rank} must be multiples of 64, rope {spec.rope} 32, 64 or 128"
        )
    return None


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.mla_front.triton")),
    Backend("reference", always, Module("pallas_kernels.mla_front.reference")),
)
