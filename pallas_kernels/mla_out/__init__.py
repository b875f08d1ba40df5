"""After MLA's attention: value up-projection and output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BlockScaled, Weight
from pallas_kernels.layer_index import layer_index
from pallas_kernels.mla_out.spec import Spec
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80, needs_sm90


def output(
    context: jax.Array,
    w_uv: jax.Array,
    o_proj: Weight,
    layer: int | jax.Array,
    *,
    lse: jax.Array | None = None,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> jax.Array:
    """Attention output of the heads present, back in the residual width.

    Computes: concat_h(W_UV[layer, h] @ context[h]) @ o_proj[layer].T.
    Inputs: context [rows, heads, kv_lora_rank]; w_uv [layers, heads, v, kv_lora_rank]; o_proj [layers, hidden, heads * v], head
      major; layer: static or traced scalar. With a shard of the heads the result is that shard's summand.
      With lse, float32 [rows, parts, heads], the context comes in parts, float32 [rows, parts, heads, kv_lora_rank], which are
      averaged with the weights exp(lse) (``sparse_mla.attend(..., apart=True)``); one part is taken as it is.
    Outputs: [rows, hidden] in context's dtype, of parts in w_uv's.
    Rounding points: the context of several parts, the values and the output, each once to the output's dtype.
    Refuses: the GPU backends take bfloat16; Gluon's 2 to 8 rows in up to 64 parts, v 256 and kv_lora_rank 512; Triton's v a
      multiple of 32 and kv_lora_rank of 128 (it merges up to 16 parts of one row itself); everything else is the reference's.
    Graph-safe: yes; two launches.
    Bound: bytes of W_UV[layer] (16.8 MB in bfloat16 at GLM's shape) and of o_proj[layer] (100.7 MB in FP8).
    Source: spec section 5.2.
    """
    if lse is not None and context.shape[1] == 1:
        context, lse = context[:, 0], None
    heads, v, latent = w_uv.shape[1:]
    spec = Spec(
        *(context.shape[0], heads, v, latent, o_proj.shape[-2], w_uv.shape[0]),
        *((context if lse is None else w_uv).dtype.name, w_uv.dtype.name, isinstance(o_proj, BlockScaled), arithmetic),
        parts=0 if lse is None else context.shape[1],
    )
    lead = (spec.rows, spec.parts, heads) if spec.parts else (spec.rows, heads)
    if context.shape != (*lead, latent) or (lse is not None and lse.shape != lead):
        raise ValueError(
            f"context {context.shape}, lse {None if lse is None else lse.shape}: {spec} needs {lead} and {latent}"
        )
    args = (context, w_uv, o_proj, layer_index(layer), *(() if lse is None else (lse,)))
    return registry.call("mla_out", BACKENDS, spec, args, forced=backend)


def _gluon_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm90(arch):
        return refusal
    if (spec.dtype, spec.weight_dtype) != ("bfloat16", "bfloat16"):
        return Refusal(f"{spec.dtype} rows and {spec.weight_dtype} W_UV: the kernel takes bfloat16")
    if (spec.v, spec.kv_lora_rank) != (256, 512):
        return Refusal(f"v {spec.v} and kv_lora_rank {spec.kv_lora_rank} must be 256 and 512")
    if not 0 < spec.parts <= 64 or not 1 < spec.rows <= 8:
        return Refusal(f"{spec.parts} parts of {spec.rows} rows: the kernel merges 1 to 64 parts of 2 to 8 rows")
    return None


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
    Backend("gluon", _gluon_supports, Module("pallas_kernels.mla_out.gluon_parts")),
    Backend("triton", _triton_supports, Module("pallas_kernels.mla_out.triton")),
    Backend("reference", always, _load_reference),
)
