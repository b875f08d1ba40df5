"""The model's weights as pytrees, stacked by layer kind, and where each number of them comes from in a checkpoint.

``weight_leaves(config, mtp)`` gives a ``Weights`` tree whose leaves are ``Leaf`` descriptions; the loader turns it into a tree
of arrays of the same structure. Weights are stacked by kind into a few dozen arrays, because every argument of a compiled
program costs host time: kernels get a whole stack and an index.

Names and shapes: spec section 3. Logical axes name what a dimension is, so that a sharding can be stated by name
(``parallel.RULES``): dimensions of one size that are split differently, as the vocabulary of embedding and head, have two names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

from flax import struct

from glm52_jax.config import Config

# linear: as stored, FP8 blocks stay FP8. w_uk, w_uv: halves of kv_b, dequantized. exact: never narrowed. float32: router bias.
Kind = Literal["linear", "vector", "w_uk", "w_uv", "exact", "float32"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint tensor [shape] that fills ``leaf[index]``."""

    tensor: str
    shape: Shape
    index: Shape


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the model: its full shape, the logical name of each axis, how it is stored and its sources."""

    shape: Shape
    axes: tuple[str, ...]
    kind: Kind
    sources: tuple[Source, ...]


# Fields are Any: arrays or BlockScaled in a model, ``Leaf`` descriptions while loading, shardings where one maps over them.
@struct.dataclass
class AttentionWeights:
    """MLA, stacked over all layers [layers, ...], the MTP layer last where there is one.

    input_norm [hidden]; q_a [q_lora_rank, hidden]; q_a_norm [q_lora_rank]; q_b [heads * (nope + rope), q_lora_rank];
    kv_a [kv_lora_rank + rope, hidden]; kv_a_norm [kv_lora_rank]; w_uk [heads, nope, kv_lora_rank] and
    w_uv [heads, v, kv_lora_rank], the two halves of kv_b; o_proj [hidden, heads * v].
    """

    input_norm: Any
    q_a: Any
    q_a_norm: Any
    q_b: Any
    kv_a: Any
    kv_a_norm: Any
    w_uk: Any
    w_uv: Any
    o_proj: Any


@struct.dataclass
class IndexerWeights:
    """DSA indexer, stacked over the full layers (and the MTP layer).

    wq_b [index heads * head_dim, q_lora_rank]; wk [head_dim, hidden]; k_norm, k_norm_bias [head_dim];
    weights_proj [index heads, hidden].
    """

    wq_b: Any
    wk: Any
    k_norm: Any
    k_norm_bias: Any
    weights_proj: Any


@struct.dataclass
class DenseWeights:
    """Dense MLP, stacked over the dense layers: post_norm [hidden]; gate_up [2, width, hidden]; down [hidden, width]."""

    post_norm: Any
    gate_up: Any
    down: Any


@struct.dataclass
class MoeWeights:
    """Mixture of experts, stacked over the sparse layers (and the MTP layer).

    post_norm [hidden]; router [experts, hidden]; router_bias float32 [experts]; gate_up [experts, 2, width, hidden];
    down [experts, hidden, width]; shared_gate_up [2, shared width, hidden]; shared_down [hidden, shared width].
    """

    post_norm: Any
    router: Any
    router_bias: Any
    gate_up: Any
    down: Any
    shared_gate_up: Any
    shared_down: Any


@struct.dataclass
class MtpWeights:
    """What the multi-token-prediction layer adds to a decoder layer: enorm, hnorm, norm [hidden]; eh_proj [hidden, 2 * hidden].

    The decoder layer itself is the last entry of the attention, indexer and moe stacks.
    """

    enorm: Any
    hnorm: Any
    eh_proj: Any
    norm: Any


@struct.dataclass
class Weights:
    """Everything: embed, head [vocab, hidden]; norm [hidden]; dense or moe is None where the model has no such layer."""

    embed: Any
    attention: AttentionWeights
    indexer: IndexerWeights
    dense: DenseWeights | None
    moe: MoeWeights | None
    norm: Any
    head: Any
    mtp: MtpWeights | None


def weight_leaves(config: Config, mtp: bool) -> Weights:
    """Description of every array of the model; ``mtp`` tells whether the checkpoint holds the MTP layer."""
    vocab = (config.vocab_size, config.hidden_size)
    extra = (config.num_hidden_layers,) if mtp else ()
    sparse = config.sparse_layers + extra
    return Weights(
        embed=_single("model.embed_tokens.weight", vocab, ("tokens", "hidden")),
        attention=_attention(config, (*range(config.num_hidden_layers), *extra)),
        indexer=_indexer(config, config.full_layers + extra),
        dense=_dense(config, config.dense_layers) if config.dense_layers else None,
        moe=_moe(config, sparse) if sparse else None,
        norm=_single("model.norm.weight", vocab[1:], ("hidden",)),
        head=_single("lm_head.weight", vocab, ("vocab", "hidden"), "linear"),
        mtp=_mtp(config) if mtp else None,
    )


def mtp_prefix(config: Config) -> str:
    """Prefix of the MTP layer's tensors: it follows the last decoder layer."""
    return f"model.layers.{config.num_hidden_layers}."


def _single(tensor: str, shape: Shape, axes: tuple[str, ...], kind: Kind = "vector") -> Leaf:
    return Leaf(shape, axes, kind, (Source(tensor, shape, ()),))


Stacker = Callable[..., Leaf]


def _stacker(layers: Iterable[int]) -> Stacker:
    """Returns stack(name, shape, axes, kind): one tensor ``model.layers.L.<name>`` a layer, stacked in the given order."""
    order = tuple(layers)

    def stack(name: str, shape: Shape, axes: tuple[str, ...], kind: Kind = "linear") -> Leaf:
        sources = tuple(Source(f"model.layers.{layer}.{name}.weight", shape, (i,)) for i, layer in enumerate(order))
        return Leaf((len(order), *shape), ("layers", *axes), kind, sources)

    return stack


def _attention(c: Config, layers: Iterable[int]) -> AttentionWeights:
    stack = _stacker(layers)
    heads, nope, v, latent = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    kv_b = stack("self_attn.kv_b_proj", (heads * (nope + v), latent), ())

    def half(width: int, kind: Kind) -> Leaf:
        shape = (kv_b.shape[0], heads, width, latent)
        return Leaf(shape, ("layers", "heads", "head_dim", "latent"), kind, kv_b.sources)

    return AttentionWeights(
        input_norm=stack("input_layernorm", (c.hidden_size,), ("hidden",), "vector"),
        q_a=stack("self_attn.q_a_proj", (c.q_lora_rank, c.hidden_size), ("q_lora", "hidden")),
        q_a_norm=stack("self_attn.q_a_layernorm", (c.q_lora_rank,), ("q_lora",), "vector"),
        q_b=stack("self_attn.q_b_proj", (heads * c.qk_head_dim, c.q_lora_rank), ("heads", "q_lora")),
        kv_a=stack("self_attn.kv_a_proj_with_mqa", (c.latent_dim, c.hidden_size), ("latent", "hidden")),
        kv_a_norm=stack("self_attn.kv_a_layernorm", (latent,), ("latent",), "vector"),
        w_uk=half(nope, "w_uk"),
        w_uv=half(v, "w_uv"),
        o_proj=stack("self_attn.o_proj", (c.hidden_size, heads * v), ("hidden", "heads")),
    )


def _indexer(c: Config, layers: Iterable[int]) -> IndexerWeights:
    stack = _stacker(layers)
    norm = stack("self_attn.indexer.k_norm", (c.index_head_dim,), ("index_dim",), "vector")
    bias = tuple(dataclasses.replace(s, tensor=s.tensor.removesuffix("weight") + "bias") for s in norm.sources)
    return IndexerWeights(
        wq_b=stack(
            "self_attn.indexer.wq_b", (c.index_n_heads * c.index_head_dim, c.q_lora_rank), ("index_heads", "q_lora")
        ),
        wk=stack("self_attn.indexer.wk", (c.index_head_dim, c.hidden_size), ("index_dim", "hidden")),
        k_norm=norm,
        k_norm_bias=dataclasses.replace(norm, sources=bias),
        weights_proj=stack(
            "self_attn.indexer.weights_proj", (c.index_n_heads, c.hidden_size), ("index_heads", "hidden"), "exact"
        ),
    )


def _gate_up(prefix: str, layers: Iterable[int], width: int, hidden: int) -> Leaf:
    order = tuple(layers)
    sources = tuple(
        Source(f"model.layers.{layer}.{prefix}.{name}.weight", (width, hidden), (i, j))
        for i, layer in enumerate(order)
        for j, name in enumerate(("gate_proj", "up_proj"))
    )
    return Leaf((len(order), 2, width, hidden), ("layers", "gate_up", "width", "hidden"), "linear", sources)


def _dense(c: Config, layers: Iterable[int]) -> DenseWeights:
    stack = _stacker(layers)
    return DenseWeights(
        post_norm=stack("post_attention_layernorm", (c.hidden_size,), ("hidden",), "vector"),
        gate_up=_gate_up("mlp", layers, c.intermediate_size, c.hidden_size),
        down=stack("mlp.down_proj", (c.hidden_size, c.intermediate_size), ("hidden", "width")),
    )


def _moe(c: Config, layers: Iterable[int]) -> MoeWeights:
    stack, order = _stacker(layers), tuple(layers)
    experts, width, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
    shared = width * c.n_shared_experts

    def expert(name: str, shape: Shape, *at: int) -> tuple[Source, ...]:
        return tuple(
            Source(f"model.layers.{layer}.mlp.experts.{e}.{name}.weight", shape, (i, e, *at))
            for i, layer in enumerate(order)
            for e in range(experts)
        )

    bias = stack("mlp.gate", (experts,), ("choices",), "float32")
    bias_names = tuple(
        dataclasses.replace(s, tensor=s.tensor.removesuffix("weight") + "e_score_correction_bias") for s in bias.sources
    )
    return MoeWeights(
        post_norm=stack("post_attention_layernorm", (hidden,), ("hidden",), "vector"),
        router=stack("mlp.gate", (experts, hidden), ("choices", "hidden"), "exact"),
        router_bias=dataclasses.replace(bias, sources=bias_names),
        gate_up=Leaf(
            (len(order), experts, 2, width, hidden),
            ("layers", "experts", "gate_up", "expert_width", "hidden"),
            "linear",
            expert("gate_proj", (width, hidden), 0) + expert("up_proj", (width, hidden), 1),
        ),
        down=Leaf(
            (len(order), experts, hidden, width),
            ("layers", "experts", "hidden", "expert_width"),
            "linear",
            expert("down_proj", (hidden, width)),
        ),
        shared_gate_up=_gate_up("mlp.shared_experts", order, shared, hidden),
        shared_down=stack("mlp.shared_experts.down_proj", (hidden, shared), ("hidden", "width")),
    )


def _mtp(c: Config) -> MtpWeights:
    prefix, hidden = mtp_prefix(c), (c.hidden_size,)
    eh_shape = (c.hidden_size, 2 * c.hidden_size)
    return MtpWeights(
        enorm=_single(prefix + "enorm.weight", hidden, ("hidden",)),
        hnorm=_single(prefix + "hnorm.weight", hidden, ("hidden",)),
        eh_proj=_single(prefix + "eh_proj.weight", eh_shape, ("mtp_hidden", "two_hidden"), "linear"),
        norm=_single(prefix + "shared_head.norm.weight", hidden, ("hidden",)),
    )
