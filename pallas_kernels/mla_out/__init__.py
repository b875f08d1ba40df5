"""After MLA's attention: value up-projection and output projection."""

from __future__ import annotations

import jax

from pallas_kernels.blocks import Weight
from pallas_kernels.mla_out import reference


def output(
    context: jax.Array, w_uv: jax.Array, o_proj: Weight, layer: int | jax.Array, *, arithmetic: str = "w8a16"
) -> jax.Array:
    """Attention output of the heads present, back in the residual width.

    Computes: concat_h(W_UV[layer, h] @ context[h]) @ o_proj[layer].T.
    Inputs: context [rows, heads, kv_lora_rank]; w_uv [layers, heads, v, kv_lora_rank]; o_proj [layers, hidden, heads * v], head
      major; layer: static or traced scalar. With a shard of the heads the result is that shard's summand.
    Outputs: [rows, hidden] in context's dtype.
    Rounding points: the values and the output, each once to context's dtype.
    Source: spec section 5.2.
    """
    return reference.output(context, w_uv, o_proj, layer, arithmetic)
