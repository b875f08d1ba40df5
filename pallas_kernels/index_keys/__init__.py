"""The two sides of the DSA indexer's dot products: cached index keys, and queries with their head weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BlockScaled, Weight
from pallas_kernels.index_keys.spec import BOTH, QUERY, WRITE, Spec
from pallas_kernels.layer_index import layer_index
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80


def write(
    x: jax.Array,
    wk: Weight,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Computes and stores the index key of each row.

    Computes: k = LayerNorm(x @ wk[layer].T; weight, bias, eps 1e-6), its first rope dims rotated; cache[layer, slot] = pack(k).
    Inputs: x [rows, hidden], the normed hidden state; wk [full layers, head_dim, hidden]; norm_weight, norm_bias
      [full layers, head_dim]; cache: index-key cache (formats in ``paged``); slots int32 [rows], distinct; negative or
      beyond the cache writes nothing; cos, sin float32 [rows, rope / 2]; layer: position among the full layers, static
      or traced.
    Outputs: the cache, same shape.
    Rounding points: float32 until the cache's format; FP8: scale = max(amax, 1e-4) / 448, one a key.
    Refuses: the Triton backend takes bfloat16 rows, head_dim 128, a hidden size of whole blocks of 128 and a uint8 cache;
      everything else is the reference's.
    In place: under jit with the cache donated (the kernel aliases it). Graph-safe: yes; two launches.
    Bound: bytes of wk[layer] (0.8 MB in FP8); 132 bytes written a row.
    Source: spec sections 5.3 and 7.
    """
    spec = _spec(WRITE, x, cos, wk=wk, cache=cache)
    unused = (None, None)
    args = (cache, None, x, wk, norm_weight, norm_bias, *unused, layer_index(layer), slots, cos, sin)
    return registry.call("index_keys", BACKENDS, spec, args, forced=backend)


def query(
    latent: jax.Array,
    x: jax.Array,
    wq_b: Weight,
    weights_proj: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    quantized: bool,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Index queries and head weights, all scales folded into the weights.

    Computes: q = latent @ wq_b[layer].T by head, first rope dims rotated; w = (x @ weights_proj[layer].T) * heads^-1/2 *
      head_dim^-1/2; quantized: q -> e4m3 with one scale a head, which is folded into w.
    Inputs: latent [rows, q_lora_rank], the *normed* query latent; x [rows, hidden]; wq_b [full layers, heads * head_dim,
      q_lora_rank]; weights_proj [full layers, heads, hidden]; cos, sin float32 [rows, rope / 2].
    Outputs: q [rows, heads, head_dim], float32 or float8_e4m3fn; w float32 [rows, heads], signed.
    Rounding points: float32 until the quantization; "w8a8" quantizes the latent first (``fp8_linear``).
    Refuses: the Triton backend quantizes, and takes bfloat16 rows and weights_proj, head_dim 128 and a power of two of heads;
      everything else is the reference's.
    Graph-safe: yes; three launches.
    Bound: bytes of wq_b[layer] (8.4 MB in FP8) and weights_proj[layer] (0.4 MB).
    Source: spec sections 5.3 and 7.
    """
    spec = _spec(QUERY, x, cos, latent, wq_b=wq_b, proj=weights_proj, quantized=quantized, arithmetic=arithmetic)
    unused = (None, None, None)
    layer = layer_index(layer)
    args = (None, latent, x, *unused, wq_b, weights_proj, layer, None, cos, sin)
    return registry.call("index_keys", BACKENDS, spec, args, forced=backend)


def write_and_query(
    latent: jax.Array,
    x: jax.Array,
    wk: Weight,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    wq_b: Weight,
    weights_proj: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    quantized: bool,
    arithmetic: str = "w8a16",
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``write`` and ``query`` of one layer together: three launches, not five.

    Computes, inputs, rounding points, in place, graph-safe and source: as these two.
    Outputs: (cache, q, w).
    """
    spec = _spec(
        BOTH, x, cos, latent, wk=wk, wq_b=wq_b, proj=weights_proj, cache=cache, quantized=quantized, arithmetic=arithmetic
    )  # fmt: skip
    layer = layer_index(layer)
    args = (cache, latent, x, wk, norm_weight, norm_bias, wq_b, weights_proj, layer, slots, cos, sin)
    return registry.call("index_keys", BACKENDS, spec, args, forced=backend)


def _spec(
    form: str,
    x: jax.Array,
    cos: jax.Array,
    latent: jax.Array | None = None,
    wk: Weight | None = None,
    wq_b: Weight | None = None,
    proj: jax.Array | None = None,
    cache: jax.Array | None = None,
    quantized: bool = False,
    arithmetic: str = "w8a16",
) -> Spec:
    heads = 0 if proj is None else proj.shape[1]
    first = wk if wk is not None else wq_b
    assert first is not None
    return Spec(
        form=form,
        rows=x.shape[0],
        hidden=x.shape[1],
        q_lora_rank=0 if latent is None else latent.shape[1],
        heads=heads,
        head_dim=first.shape[1] if wk is not None else first.shape[1] // heads,
        rope=2 * cos.shape[1],
        layers=first.shape[0],
        pages=0 if cache is None else cache.shape[1],
        dtype=x.dtype.name,
        wk=_kind(wk),
        wq_b=_kind(wq_b),
        proj=_kind(proj),
        cache_dtype="" if cache is None else cache.dtype.name,
        quantized=quantized,
        arithmetic=arithmetic,
    )


def _kind(w: Weight | None) -> str:
    """ "float8_e4m3fn" for blocks, else the dtype's name; float8 without scales has a name of its own."""
    if w is None or isinstance(w, BlockScaled):
        return "" if w is None else "float8_e4m3fn"
    name = jnp.dtype(w.dtype).name
    return f"{name} without scales" if name.startswith("float8") else name


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if spec.dtype != "bfloat16":
        return Refusal(f"rows are {spec.dtype}, the kernel takes bfloat16")
    if spec.head_dim != 128 or spec.hidden % 128 or spec.rope not in (2, 4, 8, 16, 32, 64, 128):
        return Refusal(
            f"head_dim {spec.head_dim} must be 128, hidden {spec.hidden} a multiple of it, rope {spec.rope} a power of two"
        )
    if spec.form != QUERY and (spec.cache_dtype != "uint8" or spec.wk not in ("float8_e4m3fn", "bfloat16")):
        return Refusal(
            f"a {spec.cache_dtype} cache and wk of {spec.wk}: the kernel takes uint8, and FP8 blocks or bfloat16"
        )
    if spec.form == WRITE:
        return None
    if not spec.quantized or spec.proj != "bfloat16":
        return Refusal(f"quantized={spec.quantized}, weights_proj {spec.proj}: the kernel quantizes and takes bfloat16")
    if spec.heads not in (16, 32, 64, 128):
        return Refusal(f"{spec.heads} heads: the kernel takes 16, 32, 64 or 128")
    return None


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.index_keys.triton")),
    Backend("reference", always, Module("pallas_kernels.index_keys.reference")),
)
