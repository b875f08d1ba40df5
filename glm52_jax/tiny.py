"""Small random checkpoints in the official GLM-5.2 format (Hugging Face `glm_moe_dsa` safetensors).

No jax in here: numpy, ml_dtypes and the standard library, so that the oracle's environment can import this file alone.
Every value comes from an integer hash of (seed, tensor name, element index) and IEEE-exact operations: the same call
writes the same bytes on every machine. The scales are chosen so that a random model is sensitive where the real one is:
small embeddings and latents (the norms' epsilons show), a router bias as wide as the scores, index keys with a mean.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

BLOCK = 128  # rows and columns of an FP8 block that share one scale
E4M3_MAX = 448.0
Weights = Literal["bfloat16", "float32", "fp8"]
Specs = dict[str, tuple[tuple[int, ...], str]]
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}

# The GPU kernels' static shapes (latent, rope, nope, v, index) are GLM-5.2's own; meant for weights="fp8".
KERNEL_TINY: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 256,
    "n_routed_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "intermediate_size": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a kind of tensor is stored and scaled: mean + gain * normal, the gain over sqrt(columns) if `fan_in`."""

    gain: float
    mean: float = 0.0
    fan_in: bool = False
    fp8: bool = False  # stored as F8_E4M3 with block scales in an FP8 checkpoint
    float32: bool = False  # stored as F32 in every checkpoint


KINDS: dict[str, Kind] = {
    "embed": Kind(0.0071),  # rows of mean square 5e-5, as in the real model: epsilon 1e-5 is visible
    "head": Kind(2.5, fan_in=True),
    "norm": Kind(0.2, mean=1.0),
    "q_a": Kind(0.02, fan_in=True, fp8=True),  # latent mean square 3e-4: its epsilon (1e-6 or 1e-5) is visible
    "kv_a": Kind(0.02, fan_in=True, fp8=True),  # the rope rows, which no norm follows, are KV_A_ROPE_GAIN times larger
    "q_b": Kind(1.6, fan_in=True, fp8=True),
    "kv_b": Kind(1.2, fan_in=True, fp8=True),
    "o": Kind(0.03, fan_in=True, fp8=True),
    "index_q": Kind(1.0, fan_in=True, fp8=True),
    "index_k": Kind(0.02, fan_in=True, fp8=True),  # plus a part common to all rows: a LayerNorm is not an RMSNorm
    "index_bias": Kind(0.5),
    "index_weights": Kind(1.0, fan_in=True),
    "router": Kind(1.0, fan_in=True),
    "router_bias": Kind(0.2, mean=0.3, float32=True),  # sigmoid scores spread by about 0.2
    "mlp_in": Kind(1.0, fan_in=True, fp8=True),
    "mlp_out": Kind(0.02, fan_in=True, fp8=True),
    "mtp_in": Kind(0.01, fan_in=True),
}
KV_A_ROPE_GAIN = 60.0
INDEX_K_COMMON = 0.7


def tiny_config(drop: Iterable[str] = (), **overrides: Any) -> dict[str, Any]:
    """Returns a Hugging Face config.json dict of a small GLM-5.2: every key the real config has, in small sizes.

    overrides: any key of the config; keys that follow from others (num_key_value_heads, qk_head_dim, head_dim,
    rope_parameters, indexer_types, mlp_layer_types, eos_token_id, pad_token_id) are derived unless given themselves.
    drop: keys to leave out, e.g. those GLM-5 does not have.
    """
    config: dict[str, Any] = {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16",
        "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 7, "num_attention_heads": 4,
        "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "intermediate_size": 192, "moe_intermediate_size": 64, "first_k_dense_replace": 2, "moe_layer_freq": 1,
        "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "moe_router_dtype": "float32", "index_topk": 64, "index_n_heads": 4, "index_head_dim": 64,
        "index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None,
        "indexer_rope_interleave": True, "index_share_for_mtp_iteration": True, "num_nextn_predict_layers": 1,
        "rope_interleave": True, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "use_cache": True, "ep_size": 1, "pretraining_tp": 1, "transformers_version": "5.12.0",
    }  # fmt: skip
    config.update(overrides)
    vocab = config["vocab_size"]
    derived = {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "head_dim": config["qk_nope_head_dim"],  # misleading in the real config too
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
        "eos_token_id": [max(vocab - back, 0) for back in (60, 53, 51)],  # as far from the end as the real ones
        "pad_token_id": max(vocab - 60, 0),
    }
    config = {**config, **derived, **overrides}
    config.setdefault("indexer_types", indexer_types(config))
    config.setdefault("mlp_layer_types", mlp_layer_types(config))
    return {key: value for key, value in config.items() if key not in set(drop)}


def indexer_types(config: dict[str, Any]) -> list[str]:
    """Returns "full" or "shared" for each layer: the explicit list, else the freq/offset rule, else all full."""
    layers = config["num_hidden_layers"]
    if config.get("indexer_types"):
        return list(config["indexer_types"])
    if config.get("index_topk_pattern"):
        return [{"F": "full", "S": "shared"}[letter] for letter in config["index_topk_pattern"]]
    freq, offset = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset", 2)
    return ["full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(layers)]


def mlp_layer_types(config: dict[str, Any]) -> list[str]:
    """Returns "dense" or "sparse" for each layer: the explicit list, else by first_k_dense_replace."""
    dense = config["first_k_dense_replace"]
    explicit = config.get("mlp_layer_types")
    return list(explicit or ["dense" if i < dense else "sparse" for i in range(config["num_hidden_layers"])])


def tensor_specs(config: dict[str, Any], mtp: bool = False) -> Specs:
    """Returns {tensor name: (shape, kind)} of the unquantised checkpoint; `kind` is a key of KINDS.

    mtp adds the multi-token-prediction layer under index num_hidden_layers. An FP8 checkpoint has in addition a
    `<name>_scale_inv` of shape `scale_shape(shape)` for each tensor whose kind has fp8=True.
    Source: the headers of GLM-5.2-FP8.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    vocab = (config["vocab_size"], hidden)
    specs: Specs = {"model.embed_tokens.weight": (vocab, "embed")}
    indexers, mlps = indexer_types(config), mlp_layer_types(config)
    for layer in range(layers):
        specs |= _layer_specs(config, f"model.layers.{layer}.", mlps[layer] == "sparse", indexers[layer] == "full")
    specs["model.norm.weight"] = ((hidden,), "norm")
    specs["lm_head.weight"] = (vocab, "head")
    if mtp:
        prefix = f"model.layers.{layers}."
        specs |= _layer_specs(config, prefix, sparse=True, full=True)
        specs |= {f"{prefix}{name}.weight": ((hidden,), "norm") for name in ("enorm", "hnorm", "shared_head.norm")}
        specs[prefix + "eh_proj.weight"] = ((hidden, 2 * hidden), "mtp_in")
    return specs


def _layer_specs(config: dict[str, Any], prefix: str, sparse: bool, full: bool) -> Specs:
    c, hidden, heads = config, config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, nope, rope = (
        c[k] for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    specs: Specs = {
        "input_layernorm.weight": ((hidden,), "norm"),
        "post_attention_layernorm.weight": ((hidden,), "norm"),
        "self_attn.q_a_proj.weight": ((q_rank, hidden), "q_a"),
        "self_attn.q_a_layernorm.weight": ((q_rank,), "norm"),
        "self_attn.q_b_proj.weight": ((heads * (nope + rope), q_rank), "q_b"),
        "self_attn.kv_a_proj_with_mqa.weight": ((kv_rank + rope, hidden), "kv_a"),
        "self_attn.kv_a_layernorm.weight": ((kv_rank,), "norm"),
        "self_attn.kv_b_proj.weight": ((heads * (nope + c["v_head_dim"]), kv_rank), "kv_b"),
        "self_attn.o_proj.weight": ((hidden, heads * c["v_head_dim"]), "o"),
    }
    if full:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        specs |= {
            "self_attn.indexer.wq_b.weight": ((index_heads * index_dim, q_rank), "index_q"),
            "self_attn.indexer.wk.weight": ((index_dim, hidden), "index_k"),
            "self_attn.indexer.weights_proj.weight": ((index_heads, hidden), "index_weights"),
            "self_attn.indexer.k_norm.weight": ((index_dim,), "norm"),
            "self_attn.indexer.k_norm.bias": ((index_dim,), "index_bias"),
        }
    if sparse:
        experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
        specs["mlp.gate.weight"] = ((experts, hidden), "router")
        specs["mlp.gate.e_score_correction_bias"] = ((experts,), "router_bias")
        for expert in range(experts):
            specs |= _mlp_specs(f"mlp.experts.{expert}.", hidden, width)
        specs |= _mlp_specs("mlp.shared_experts.", hidden, width * c["n_shared_experts"])
    else:
        specs |= _mlp_specs("mlp.", hidden, c["intermediate_size"])
    return {prefix + name: spec for name, spec in specs.items()}


def _mlp_specs(prefix: str, hidden: int, width: int) -> Specs:
    return {
        prefix + "gate_proj.weight": ((width, hidden), "mlp_in"),
        prefix + "up_proj.weight": ((width, hidden), "mlp_in"),
        prefix + "down_proj.weight": ((hidden, width), "mlp_out"),
    }


def hash_bits(key: str, count: int) -> np.ndarray:
    """Returns uint64 [count] of hash bits: a splitmix64 sequence whose start is the SHA-256 of `key`."""
    start = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def hash_normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 [shape], about standard normal: the sum of four 16-bit uniforms (bounded by 3.47), bit-exact."""
    count = int(np.prod(shape))
    parts = hash_bits(key, count).view(np.uint16).reshape(count, 4)
    total = parts[:, 0].astype(np.int32)
    for column in range(1, 4):
        total += parts[:, column]
    # the variance of the sum is 4 * 2^32 / 12
    return ((total - np.int32(131070)).astype(np.float32) * np.float32(3.0**0.5 / 65536)).reshape(shape)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the block scales of a [rows, columns] weight; partial blocks count."""
    return tuple(-(-size // BLOCK) for size in shape)


def expand_scales(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 [shape]: each block's scale repeated over its elements (last blocks may be partial)."""
    return scales.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns float8_e4m3fn [rows, columns] and float32 scales [ceil(rows/128), ceil(columns/128)].

    A scale is its block's amax / 448, amax bounded below by 1e-10.
    """
    blocks = scale_shape(values.shape)
    padded = np.zeros([n * BLOCK for n in blocks], np.float32)
    padded[: values.shape[0], : values.shape[1]] = values
    amax = np.abs(padded).reshape(blocks[0], BLOCK, blocks[1], BLOCK).max((1, 3))
    scales = np.maximum(amax, np.float32(1e-10)) / np.float32(E4M3_MAX)
    scaled = np.clip(values / expand_scales(scales, values.shape), -E4M3_MAX, E4M3_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn), scales


def dequantise(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns float32 [rows, columns] = data * its block's scale. data: float8_e4m3fn; scales as from `quantise`."""
    return data.astype(np.float32) * expand_scales(scales.astype(np.float32), data.shape)


def tensor_values(name: str, shape: tuple[int, ...], kind: str, config: dict[str, Any], seed: int = 0) -> np.ndarray:
    """Returns float32 [shape]: the unquantised values of one tensor."""
    how, key = KINDS[kind], f"{seed}/{name}"
    values = hash_normal(key, shape)
    if kind == "index_k":
        values += np.float32(INDEX_K_COMMON) * hash_normal(key + "/common", shape[1:])
    if kind == "kv_a":
        values[-config["qk_rope_head_dim"] :] *= np.float32(KV_A_ROPE_GAIN)
    gain = how.gain / shape[-1] ** 0.5 if how.fan_in else how.gain
    return values * np.float32(gain) + np.float32(how.mean)


def _block_factors(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 factors in [0.17, 1.7], one a block: neighbouring FP8 blocks get very different scales."""
    blocks = scale_shape(shape)
    uniform = (hash_bits(key, blocks[0] * blocks[1]) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return (np.float32(0.17) + np.float32(1.53) * uniform).reshape(blocks)


Plan = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> safetensors dtype, shape


def _plan(specs: Specs, weights: Weights) -> Plan:
    plain = "F32" if weights == "float32" else "BF16"
    plan: Plan = {}
    for name, (shape, kind) in specs.items():
        if weights == "fp8" and KINDS[kind].fp8:
            plan[name] = ("F8_E4M3", shape)
            plan[name + "_scale_inv"] = ("F32", scale_shape(shape))
        else:
            plan[name] = ("F32" if KINDS[kind].float32 else plain, shape)
    return plan


def _tensors(config: dict[str, Any], specs: Specs, plan: Plan, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, (shape, kind) in specs.items():
        values = tensor_values(name, shape, kind, config, seed)
        if plan[name][0] == "F8_E4M3":
            factors = _block_factors(f"{seed}/{name}/blocks", shape)
            values, scales = quantise(values * expand_scales(factors, shape))
            yield name + "_scale_inv", scales
        yield name, values


def _write_safetensors(directory: Path, plan: Plan, tensors: Iterable[tuple[str, np.ndarray]], shards: int) -> None:
    """Writes the planned tensors, dealt out one by one to the shards, so that a layer and even a weight and its scale
    lie in different files; within a file wide elements come first, so that every tensor is aligned to its element."""
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    place: dict[str, tuple[str, int]] = {}
    total = 0
    for i, file in enumerate(files):
        names = sorted(list(plan)[i::shards], key=lambda name: (-DTYPES[plan[name][0]].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            dtype, shape = plan[name]
            begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        place |= {name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in names}
        total += end
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: place[name][0] for name in sorted(place)}}
        _write_json(directory / "model.safetensors.index.json", index)
    with ExitStack() as stack:
        handles = {file: stack.enter_context((directory / file).open("r+b")) for file in files}
        for name, array in tensors:
            file, offset = place.pop(name)
            handles[file].seek(offset)
            handles[file].write(np.ascontiguousarray(array.astype(DTYPES[plan[name][0]], copy=False)).tobytes())
    if place:
        raise ValueError(f"tensors planned but never written: {sorted(place)[:5]}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def quantization_config(specs: Specs) -> dict[str, Any]:
    """Returns the quantization_config of an FP8 checkpoint, with the real one's misnamed `indexers_proj` entries."""
    kept = [name.removesuffix(".weight") for name, (_, kind) in specs.items() if not KINDS[kind].fp8]
    kept = [name.replace("indexer.weights_proj", "indexers_proj") for name in kept]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def write_checkpoint(
    directory: str | Path,
    config: dict[str, Any],
    *,
    weights: Weights = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    mtp: bool = False,
) -> None:
    """Writes config.json and model.safetensors (or `shards` files and their index) into `directory`, made if absent.

    config: as from `tiny_config`; its dtype and quantization_config are set to match `weights`.
    weights: "bfloat16" (BF16, the router bias F32), "float32" (all F32) or "fp8" (the official block-scaled build).
    mtp: also write the multi-token-prediction layer, under index num_hidden_layers.
    Raises ValueError for another `weights` or `shards` < 1. Files of an earlier checkpoint in `directory` are
    overwritten only where the names agree: use a fresh directory.
    """
    if weights not in ("bfloat16", "float32", "fp8") or shards < 1:
        raise ValueError(f"{weights=} must be 'bfloat16', 'float32' or 'fp8' and {shards=} at least 1")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    specs = tensor_specs(config, mtp)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config["dtype"] = "float32" if weights == "float32" else "bfloat16"
    if weights == "fp8":
        config["quantization_config"] = quantization_config(specs)
    _write_json(directory / "config.json", config)
    plan = _plan(specs, weights)
    _write_safetensors(directory, plan, _tensors(config, specs, plan, seed), shards)


def read_checkpoint(directory: str | Path) -> dict[str, np.ndarray]:
    """Returns {name: read-only memory-mapped array} of a directory that `write_checkpoint` wrote.

    Trusts the files: no validation. To load a checkpoint of unknown origin use `glm52_jax.checkpoint`.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(raw[:8].tobytes(), "little")
        for name, info in json.loads(raw[8 : 8 + size].tobytes()).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in info["data_offsets"])
                tensors[name] = raw[begin:end].view(DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


def write_dequantised_twin(source: str | Path, destination: str | Path) -> None:
    """Writes the float32 twin of a checkpoint made by `write_checkpoint`: one F32 file, scales applied and dropped.

    float32(weight) * scale is one rounding: the twin holds exactly what a float32 dequantisation of the source gives.
    """
    source, destination = Path(source), Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    tensors = read_checkpoint(source)
    plan: Plan = {name: ("F32", x.shape) for name, x in tensors.items() if not name.endswith("_scale_inv")}

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for name in plan:
            scales = tensors.get(name + "_scale_inv")
            yield name, tensors[name] if scales is None else dequantise(tensors[name], scales)

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    _write_json(destination / "config.json", {**config, "dtype": "float32"})
    _write_safetensors(destination, plan, values(), shards=1)
