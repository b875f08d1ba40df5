"""The row of the latent cache: norm, rotation, quantization and paged write in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.latent_write.spec import Spec
from pallas_kernels.layer_index import layer_index
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80


def write(
    kv_a: jax.Array,
    norm: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    backend: str | None = None,
) -> jax.Array:
    """Norms, rotates and stores the shared key of each row.

    Computes: c = RMS(kv_a[:, :kv_lora_rank]; norm[layer], eps); kr = rotated kv_a[:, kv_lora_rank:] (not normed);
      cache[layer, slot] = pack(c, kr).
    Inputs: kv_a [rows, kv_lora_rank + rope]; norm [layers, kv_lora_rank]; cache [layers, pages, 64, width] (see ``paged``);
      slots int32 [rows], distinct; negative or beyond the cache writes nothing; cos, sin float32 [rows, rope / 2].
    Outputs: the cache, same shape.
    Rounding points: c and kr once to kv_a's dtype, then the cache's format.
    In place: under jit with the cache donated (the kernel aliases it). Graph-safe: yes.
    Bound: the rows read and written, about 2 KB each: a launch, not bytes.
    Source: spec sections 5.2 and 7.
    """
    spec = Spec(
        *(kv_a.shape[0], norm.shape[-1], kv_a.shape[1] - norm.shape[-1], cache.shape[0], cache.shape[1]),
        *(kv_a.dtype.name, cache.dtype.name, float(eps)),
    )
    args = (kv_a, norm, cache, layer_index(layer), slots, cos, sin)
    return registry.call("latent_write", BACKENDS, spec, args, forced=backend)


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if (spec.kv_lora_rank, spec.rope) != (512, 64):
        return Refusal(f"kv_lora_rank {spec.kv_lora_rank} and rope {spec.rope} must be 512 and 64")
    if spec.dtype != "bfloat16" or spec.cache_dtype not in ("uint8", "bfloat16"):
        return Refusal(
            f"{spec.dtype} rows into a {spec.cache_dtype} cache: the kernel takes bfloat16 into uint8 or bfloat16"
        )
    return None


def _load_reference() -> Callable[..., Any]:
    from pallas_kernels.latent_write import reference

    return lambda spec, *args: reference.write(*args, eps=spec.eps)


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.latent_write.triton")),
    Backend("reference", always, _load_reference),
)
