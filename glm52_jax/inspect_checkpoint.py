"""What a checkpoint holds and which GPUs it fits on, from config.json and the files' headers alone. No JAX.

No tensor is read: a 753 GB checkpoint takes as long as parsing its headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm52_jax.checkpoint import Checkpoint, TensorInfo
from glm52_jax.config import SHARED, Config
from pallas_kernels.arch import ARCHS, Arch

KINDS = (
    *(
        "attention",
        "indexer",
        "experts",
        "shared experts",
        "dense mlp",
        "router",
        "embeddings",
        "norms",
        "mtp",
        "other",
    ),
)
GPU_COUNTS = (1, 2, 4, 8)
USABLE_MEMORY = 0.95  # the rest is the driver's, the graphs' and the activations'
PAGE_TOKENS = 64
SCALE_SUFFIX = "_scale_inv"
BLOCK = 128

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Whole path components, in this order: mlp.gate (router) and mlp.gate_proj (dense) share a prefix.
_KIND_OF = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"self_attn\.indexer\.", "indexer"),
        (r"self_attn\.\w+_layernorm\.|(input|post_attention)_layernorm\.", "norms"),
        (r"self_attn\.", "attention"),
        (r"mlp\.experts\.", "experts"),
        (r"mlp\.shared_experts\.", "shared experts"),
        (r"mlp\.gate\.", "router"),
        (r"mlp\.(gate|up|down)_proj\.", "dense mlp"),
    )
)
# Sliced over the GPUs under tensor parallelism; every other tensor is on each of them: q_a and kv_a (their outputs feed
# every head), router, index keys (wk, weights_proj, k_norm), norms, embed_tokens.
_SLICED = re.compile(
    r"lm_head\.|.*\.(q_b_proj|kv_b_proj|o_proj|wq_b|eh_proj)\."
    r"|.*\.mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj\."
)


@dataclass
class Group:
    """Totals of some tensors; ``parameters`` leaves out FP8 block scales, the other two count everything."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, info: TensorInfo) -> None:
        self.tensors += 1
        self.nbytes += info.nbytes
        if not info.name.endswith(SCALE_SUFFIX):
            self.parameters += math.prod(info.shape)


@dataclass
class Summary:
    """What a checkpoint holds.

    Attributes:
      total, by_kind, by_dtype: totals; kinds are those of ``KINDS``, the MTP layer's tensors all count as "mtp".
      elements: stored elements by dtype, scales included.
      sliced_bytes, replicated_bytes: bytes of GPU memory that tensor parallelism divides, and that every GPU holds.
      cache_bytes_per_token: of one token in all layers' FP8 caches, latent and index keys.
      has_mtp, notes: whether the MTP layer is there; remarks for the reader, one line each.
    """

    total: Group = field(default_factory=Group)
    by_kind: dict[str, Group] = field(default_factory=dict)
    by_dtype: dict[str, Group] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    sliced_bytes: int = 0
    replicated_bytes: int = 0
    cache_bytes_per_token: int = 0
    has_mtp: bool = False
    notes: list[str] = field(default_factory=list)

    def weights_per_gpu(self, gpus: int) -> int:
        return self.replicated_bytes + -(-self.sliced_bytes // gpus)


@dataclass(frozen=True)
class Fit:
    """Whether the weights fit on ``gpus`` GPUs of one kind, tensor parallel.

    ``weights`` and ``free`` are bytes a GPU; ``free`` is what is left for the cache of the usable memory, negative if
    short. ``tokens`` is the context that fits in it, all requests together (under tensor parallelism every GPU holds
    the whole latent cache). ``refusal`` says why the sizes do not split, or is None.
    """

    gpu: str
    gpus: int
    weights: int
    free: int
    tokens: int
    refusal: str | None = None


def inspect_directory(path: str | Path) -> tuple[Config, Checkpoint, Summary]:
    """Opens a checkpoint and sums it up. Raises CheckpointError or ConfigError."""
    with Checkpoint.open(path) as checkpoint:
        config = Config.from_hf(checkpoint.config)
        return config, checkpoint, summarise(config, checkpoint.tensors.values())


def kind_of(name: str, num_layers: int) -> str:
    """The kind (one of ``KINDS``) of a tensor of a model with num_layers decoder layers; later layers are MTP."""
    match = _LAYER.fullmatch(name)
    if match is None:
        head = name.split(".")[0]
        if name.startswith("model.embed_tokens.") or head == "lm_head":
            return "embeddings"
        return "norms" if name.startswith("model.norm.") else "other"
    layer, rest = int(match[1]), match[2]
    if layer >= num_layers:
        return "mtp"
    return next((kind for pattern, kind in _KIND_OF if pattern.match(rest)), "other")


def summarise(config: Config, tensors: Iterable[TensorInfo]) -> Summary:
    """Sums up the tensors of a checkpoint of this config."""
    summary = Summary()
    unused: set[int] = set()
    for info in tensors:
        kind = kind_of(info.name, config.num_hidden_layers)
        for group in (
            summary.total,
            summary.by_kind.setdefault(kind, Group()),
            summary.by_dtype.setdefault(info.dtype, Group()),
        ):
            group.add(info)
        summary.elements[info.dtype] = summary.elements.get(info.dtype, 0) + math.prod(info.shape)
        layer = _shared_indexer_layer(info.name, kind, config)
        if layer is not None:
            unused.add(layer)
        elif _SLICED.match(info.name):
            summary.sliced_bytes += _resident_bytes(info)
        else:
            summary.replicated_bytes += _resident_bytes(info)
    summary.by_kind = {kind: summary.by_kind[kind] for kind in KINDS if kind in summary.by_kind}
    summary.has_mtp = "mtp" in summary.by_kind
    summary.cache_bytes_per_token = cache_bytes_per_token(config, summary.has_mtp)
    summary.notes = _notes(config, summary, unused)
    return summary


def cache_bytes_per_token(config: Config, mtp: bool) -> int:
    """Bytes of one token in the FP8 caches of all layers: spec section 7, 53,940 for GLM-5.2 and 54,728 with MTP.

    A layer's latent entry is kv_lora_rank e4m3, an f32 scale for every 128 of them, and the bf16 roped key; an index
    key is index_head_dim e4m3 and one f32 scale, on layers that run an indexer.
    """
    latent = config.kv_lora_rank + 4 * -(-config.kv_lora_rank // BLOCK) + 2 * config.qk_rope_head_dim
    index_key = config.index_head_dim + 4
    return (config.num_hidden_layers + mtp) * latent + (len(config.full_layers) + mtp) * index_key


def fit(config: Config, summary: Summary, gpu: Arch, gpus: int) -> Fit:
    """How a checkpoint fits on ``gpus`` GPUs."""
    weights = summary.weights_per_gpu(gpus)
    free = int(gpu.memory_bytes * USABLE_MEMORY) - weights
    tokens = max(free, 0) // summary.cache_bytes_per_token // PAGE_TOKENS * PAGE_TOKENS
    refusal = split_refusal(config, gpus, BLOCK if "F8_E4M3" in summary.by_dtype else 1)
    return Fit(gpu.name, gpus, weights, free, 0 if refusal else tokens, refusal)


def fits(config: Config, summary: Summary, archs: Iterable[Arch] = ARCHS) -> list[Fit]:
    """``fit`` for every GPU and every count of ``GPU_COUNTS``."""
    return [fit(config, summary, gpu, gpus) for gpu in archs for gpus in GPU_COUNTS]


def split_refusal(config: Config, gpus: int, block: int) -> str | None:
    """Why these sizes do not split over ``gpus`` GPUs, or None; ``block`` rows stay together (128 if FP8)."""
    if gpus == 1:
        return None
    heads = config.num_attention_heads
    if heads % gpus or config.index_n_heads % gpus:
        return f"num_attention_heads={heads}, index_n_heads={config.index_n_heads} do not split over {gpus} GPUs"
    rows = {
        "num_attention_heads * qk_head_dim": heads * config.qk_head_dim,
        "num_attention_heads * v_head_dim": heads * config.v_head_dim,
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "index_n_heads * index_head_dim": config.index_n_heads * config.index_head_dim,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
    }
    for name, size in rows.items():
        if size % (gpus * block):
            return f"{name}={size} is not a multiple of {gpus} GPUs x {block} rows"
    return None


def report(config: Config, checkpoint: Checkpoint, summary: Summary, rows: Iterable[Fit]) -> dict[str, object]:
    """Everything as one JSON-able object, sizes in bytes."""

    def groups(by: Mapping[str, Group]) -> dict[str, dict[str, int]]:
        return {name: vars(group) for name, group in by.items()}

    return {
        "path": str(checkpoint.path),
        "files": len(checkpoint.files),
        "layers": config.num_hidden_layers,
        "full_layers": len(config.full_layers),
        "total": vars(summary.total),
        "by_kind": groups(summary.by_kind),
        "by_dtype": groups(summary.by_dtype),
        "elements_by_dtype": summary.elements,
        "mtp": {"announced": config.num_nextn_predict_layers, "present": summary.has_mtp},
        "cache_bytes_per_token": summary.cache_bytes_per_token,
        "notes": summary.notes,
        "fits": [vars(row) for row in rows],
    }


def _resident_bytes(info: TensorInfo) -> int:
    """Bytes on the GPUs: as stored, except FP8 kv_b, whose two halves are kept dequantised, in bf16."""
    if ".kv_b_proj.weight" in info.name:
        if info.name.endswith(SCALE_SUFFIX):
            return 0
        if info.dtype == "F8_E4M3":
            return 2 * info.nbytes
    return info.nbytes


def _shared_indexer_layer(name: str, kind: str, config: Config) -> int | None:
    """The layer, if this is an indexer tensor of a layer that reuses another's selection: the loader skips those."""
    match = _LAYER.fullmatch(name)
    if kind != "indexer" or match is None or config.indexer_types[int(match[1])] != SHARED:
        return None
    return int(match[1])


def _notes(config: Config, summary: Summary, unused: set[int]) -> list[str]:
    notes = []
    if config.num_nextn_predict_layers and not summary.has_mtp:
        notes.append(
            f"num_nextn_predict_layers={config.num_nextn_predict_layers} announces an MTP layer, but the files have no "
            f"model.layers.{config.num_hidden_layers}.*: it loads and decodes, without speculation"
        )
    if unused:
        notes.append(f"indexer tensors on {len(unused)} shared layers ({_listed(unused)}) are not used")
    if "other" in summary.by_kind:
        notes.append(f"{summary.by_kind['other'].tensors} tensors have unknown names: the loader will refuse them")
    return notes


def _listed(layers: set[int], most: int = 6) -> str:
    names = [str(layer) for layer in sorted(layers)]
    return ", ".join(names[:most] + (["..."] if len(names) > most else []))
