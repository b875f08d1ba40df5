"""After MLA's attention: value up-projection and output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BlockScaled, Weight
from pallas_kernels.mla_out.spec import Spec
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80


def output(
    context: jax.Array,
    w_uv: jax.Array,
    o_proj: Weight,
    layer: int | jax.Array,
    *,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> jax.Array:
    """Attention output of the heads present, back in the residual width.

    Computes: concat_h(W_UV[layer, h] @ context[h]) @ o_proj[layer].T.
    Inputs: context [rows, heads, kv_lora_rank]; w_uv [layers, heads, v, kv_lora_rank]; o_proj [layers, hidden, heads * v], head
      major; layer: static or traced scalar. With a shard of the heads the result is that shard's summand.
    Outputs: [rows, hidden] in context's dtype.
    Rounding points: the values and the output, each once to context's dtype.
    Refuses: the Triton backend takes bfloat16, v a multiple of 32 and kv_lora_rank of 128; everything else is the reference's.
    Graph-safe: yes; two launches.
    Bound: bytes of W_UV[layer] (16.8 MB in bfloat16 at GLM's shape) and of o_proj[layer] (100.7 MB in FP8).
    Source: spec section 5.2.
    """
    heads, v, latent = w_uv.shape[1:]
    spec = Spec(
        *(context.shape[0], heads, v, latent, o_proj.shape[-2], w_uv.shape[0]),
        *(context.dtype.name, w_uv.dtype.name, isinstance(o_proj, BlockScaled), arithmetic),
    )
    args = (context, w_uv, o_proj, jnp.asarray(layer, jnp.int32))
    return registry.call("mla_out", BACKENDS, spec, args, forced=backend)


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if (spec.dtype, spec.weight_dtype) != ("bfloat16", "bfloat16"):
        return Refusal(f"{spec.dtype} rows and {spec.weight_dtype} W_UV: the kernel takes bfloat16")
    if spec.v % 32 or spec.kv_lora_rank % 128:
        return Refusal(f"v {spec.v} must be a multiple of 32 and kv_lora_rank {spec.kv_lora_rank} of 128")
    return None


def _load_reference() -> Callable[..., Any]:
    from pallas_kernels.mla_out import reference

    return lambda spec, *args: reference.output(*args, arithmetic=spec.arithmetic)


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.mla_out.triton")),
    Backend("reference", always, _load_reference),
)
