"""The model's configuration, read from a Hugging Face ``config.json`` of type ``glm_moe_dsa``.

Every key of the file falls in one of four classes: *sizes* that this code uses, *fixed* keys whose value must be the one this
code computes, *structured* keys that get a function each (an explicit list of layer kinds wins over the rule it follows from), and
*harmless* keys that do not change inference. A key in none of them is refused unless it is null, because a switch nobody read may
change the arithmetic silently.

Source of the keys: the configs of GLM-5, 5.1 and 5.2 and transformers' ``GlmMoeDsaConfig``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"


class ConfigError(ValueError):
    """A config.json that this code cannot run; the message names the field and its value."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static sizes and constants of one model; hashable, so it can be a static argument of a jitted function.

    Fields carry the names of the Hugging Face config. ``latent_norm_eps`` is the epsilon of q_a_layernorm and kv_a_layernorm
    (``rms_norm_eps`` unless set; transformers uses 1e-6 there). ``indexer_types[l]`` is "full" or "shared", ``mlp_layer_types[l]``
    "dense" or "sparse". ``fp8`` tells whether the checkpoint announces FP8 block quantisation (the tensors' own dtypes decide).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    latent_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    indexer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    num_nextn_predict_layers: int
    eos_token_ids: tuple[int, ...]
    fp8: bool

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers a token and layer in the latent cache: normed latent, then the roped shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-1/2; never latent_dim^-1/2, although the absorbed query has that width."""
        return self.qk_head_dim**-0.5

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.indexer_types) if kind == FULL)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.mlp_layer_types) if kind == DENSE)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.mlp_layer_types) if kind == SPARSE)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], latent_norm_eps: float | None = None) -> Config:
        """Builds the config from a parsed ``config.json``.

        Args:
          hf: the JSON object.
          latent_norm_eps: epsilon of the two latent norms; None takes ``rms_norm_eps``. Pass 1e-6 to reproduce transformers.

        Raises:
          ConfigError: a missing, unknown or unsupported field, or fields that contradict each other.
        """
        if hf.get("model_type") != "glm_moe_dsa":
            raise ConfigError(f"model_type={hf.get('model_type')!r} is not supported: must be 'glm_moe_dsa'")
        _refuse_unknown(hf)
        _check_fixed(hf)
        sizes: dict[str, Any] = {name: _positive_int(hf, name) for name in _SIZES}
        layers = sizes["num_hidden_layers"]
        eps = _positive_float(hf, "rms_norm_eps")
        config = cls(
            **sizes,
            routed_scaling_factor=_positive_float(hf, "routed_scaling_factor"),
            rms_norm_eps=eps,
            latent_norm_eps=eps if latent_norm_eps is None else float(latent_norm_eps),
            rope_theta=_rope_theta(hf),
            indexer_types=_indexer_types(hf, layers),
            mlp_layer_types=_mlp_layer_types(hf, layers),
            num_nextn_predict_layers=_count(hf, "num_nextn_predict_layers", 0),
            eos_token_ids=_eos(hf),
            fp8=_quantised(hf),
        )
        _check_consistent(hf, config)
        return config


_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings"),
    *("index_topk", "index_n_heads", "index_head_dim"),
)

# Key -> the one value this code computes. The official class hard-codes those that a config may leave out (all of these).
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_router_dtype": "float32",
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "index_share_for_mtp_iteration": True,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
}

_STRUCTURED = (
    *("model_type", "rms_norm_eps", "routed_scaling_factor", "rope_parameters", "rope_theta", "indexer_types"),
    *("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "mlp_layer_types", "first_k_dense_replace"),
    *("num_nextn_predict_layers", "eos_token_id", "quantization_config", "num_key_value_heads", "qk_head_dim"),
    *("layer_types", "num_experts", "num_local_experts"),
)

# head_dim is a decoy: 192 in the published config, the rope width in transformers' own; nothing here reads it.
_HARMLESS = frozenset(
    (
        *("architectures", "head_dim", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("initializer_range", "pad_token_id", "bos_token_id", "sep_token_id", "decoder_start_token_id"),
        *("attention_dropout", "ep_size", "pretraining_tp", "output_router_logits", "router_aux_loss_coef"),
        *("aux_loss_alpha", "seq_aux", "name_or_path", "_name_or_path", "auto_map", "output_hidden_states"),
        *("output_attentions", "return_dict", "id2label", "label2id", "num_labels", "problem_type"),
        *("is_decoder", "tokenizer_class", "prefix", "task_specific_params", "torchscript", "use_bfloat16"),
        *("tf_legacy_loss", "pruned_heads", "attn_implementation", "_attn_implementation", "finetuning_task"),
        *("_commit_hash", "tie_last_hidden_states", "gradient_checkpointing", "cross_attention_hidden_size"),
        *("tie_encoder_decoder", "temperature", "top_p", "top_k", "do_sample", "num_beams", "max_length"),
        *("min_length", "repetition_penalty"),
    )
)
# Which tensors are FP8 is read off the tensors; dequantize is a wish of transformers' loader.
_QUANT_HARMLESS = ("modules_to_not_convert", "ignored_layers", "dequantize")
_KNOWN = frozenset(_SIZES) | frozenset(_FIXED) | frozenset(_STRUCTURED) | _HARMLESS
# A size beyond these is a broken file; counting up to it would hang or fill the memory before any tensor is compared.
_LARGEST = {"num_hidden_layers": 1024, "n_routed_experts": 4096}
# Cache classes of transformers, one per layer: they name a storage, not an arithmetic.
_LAYER_TYPES = ("deepseek_sparse_attention", "full_attention", "indexed_attention")


def _refuse_unknown(hf: Mapping[str, Any]) -> None:
    unknown = {key: value for key, value in hf.items() if key not in _KNOWN and value is not None}
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise ConfigError(
            f"unknown field(s) in config.json: {listed}. They may change the arithmetic; if they do not, remove them or add "
            "them to glm52_jax/config.py's harmless list"
        )


def _check_fixed(hf: Mapping[str, Any]) -> None:
    for key, value in _FIXED.items():
        found = hf.get(key, value)
        # A null means "not set" in these files; for a switch that must be on it would mean off.
        unset = found is None and value is not True
        if unset or (found == value and isinstance(found, bool) == isinstance(value, bool)):
            continue
        raise ConfigError(f"{key}={found!r} is not supported: must be {value!r}")


def _required(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ConfigError(f"config.json has no {key}")
    return hf[key]


def _positive_int(hf: Mapping[str, Any], key: str) -> int:
    value = _required(hf, key)
    largest = _LARGEST.get(key, 2**31 - 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ConfigError(f"{key}={value!r} must be a positive integer, at most {largest}")
    return value


def _count(hf: Mapping[str, Any], key: str, default: int) -> int:
    value = default if hf.get(key) is None else hf[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{key}={value!r} must be an integer >= 0")
    return value


def _positive_float(hf: Mapping[str, Any], key: str) -> float:
    value = _required(hf, key)
    # The comparison with the largest float comes first: float() of a longer integer overflows.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{key}={value!r} must be a finite positive number")
    return float(value)


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """rope_theta, nested in rope_parameters (GLM-5.x) or at top level (older files); never a default."""
    rope = hf.get("rope_parameters")
    if rope is None:
        if hf.get("rope_theta") is None:
            raise ConfigError("config.json has no rope_parameters.rope_theta (nor rope_theta)")
        return _positive_float(hf, "rope_theta")
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters={rope!r} must be an object with rope_theta and rope_type")
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters.rope_type={rope['rope_type']!r} is not supported: must be 'default'")
    extra = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type") and v is not None}
    if extra.pop("partial_rotary_factor", 1.0) != 1.0 or extra:
        raise ConfigError(f"rope_parameters={dict(rope)!r}: only rope_theta and rope_type are supported")
    if rope.get("rope_theta") is None:
        raise ConfigError("config.json has no rope_parameters.rope_theta")
    theta = _positive_float(rope, "rope_theta")
    if hf.get("rope_theta") not in (None, rope["rope_theta"]):
        raise ConfigError(
            f"rope_theta={hf['rope_theta']!r} contradicts rope_parameters.rope_theta={rope['rope_theta']!r}"
        )
    return theta


def _layer_list(hf: Mapping[str, Any], key: str, layers: int, allowed: tuple[str, ...]) -> tuple[str, ...]:
    value = hf[key]
    if not isinstance(value, list | tuple) or not all(v in allowed for v in value):
        raise ConfigError(f"{key}={value!r} must be a list of {' / '.join(allowed)}")
    # Files that count the MTP layer list one entry more; its indexer is always its own.
    if len(value) not in (layers, layers + _count(hf, "num_nextn_predict_layers", 0)):
        raise ConfigError(f"{key} has {len(value)} entries for num_hidden_layers={layers}")
    return tuple(value[:layers])


def _indexer_types(hf: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The explicit list, else the F/S pattern, else frequency and offset, else all full (GLM-5, 5.1)."""
    if hf.get("indexer_types") is not None:
        types = _layer_list(hf, "indexer_types", layers, (FULL, SHARED))
    elif hf.get("index_topk_pattern") is not None:
        pattern = hf["index_topk_pattern"]
        if not isinstance(pattern, str | list) or len(pattern) != layers or any(c not in ("F", "S") for c in pattern):
            raise ConfigError(f"index_topk_pattern={pattern!r} must hold one F or S for each of {layers} layers")
        types = tuple(FULL if c == "F" else SHARED for c in pattern)
    else:
        freq = _count(hf, "index_topk_freq", 1)
        if freq < 1:
            raise ConfigError(f"index_topk_freq={freq} must be at least 1")
        # transformers' own default offset; it has no effect at freq 1.
        offset = _count(hf, "index_skip_topk_offset", 2)
        types = tuple(FULL if max(i - offset + 1, 0) % freq == 0 else SHARED for i in range(layers))
    if types[0] != FULL:
        raise ConfigError(f"indexer_types[0]={types[0]!r}: the first layer has no earlier selection to share")
    return types


def _mlp_layer_types(hf: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    if hf.get("mlp_layer_types") is not None:
        return _layer_list(hf, "mlp_layer_types", layers, (DENSE, SPARSE))
    dense = _count(hf, "first_k_dense_replace", 3)
    return tuple(DENSE if i < dense else SPARSE for i in range(layers))


def _eos(hf: Mapping[str, Any]) -> tuple[int, ...]:
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id={value!r} must be an integer or a list of integers")
    return tuple(ids)


def _quantised(hf: Mapping[str, Any]) -> bool:
    quant = hf.get("quantization_config")
    if quant is None:
        return False
    if not isinstance(quant, Mapping):
        raise ConfigError(f"quantization_config={quant!r} must be an object")
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for key, value in wanted.items():
        found = quant.get(key, value if key == "fmt" else None)
        if found != value:
            raise ConfigError(f"quantization_config.{key}={found!r} is not supported: must be {value!r}")
    for key, value in quant.items():
        # transformers writes scale_fmt="float"; "ue8m0" would mean activation scales that are powers of two.
        plain = key == "scale_fmt" and value == "float"
        if not (key in wanted or key in _QUANT_HARMLESS or plain or value is None):
            raise ConfigError(f"quantization_config.{key}={value!r} is not supported: it may change the arithmetic")
    return True


def _check_consistent(hf: Mapping[str, Any], config: Config) -> None:
    agree = {
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "num_experts": config.n_routed_experts,
        "num_local_experts": config.n_routed_experts,
    }
    for key, value in agree.items():
        if hf.get(key) not in (None, value):
            raise ConfigError(f"{key}={hf[key]!r} contradicts the other fields, which give {value}")
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r} is not supported: known are {list(_LAYER_TYPES)}")
    if config.qk_rope_head_dim % 2 or config.qk_rope_head_dim > config.index_head_dim:
        raise ConfigError(
            f"qk_rope_head_dim={config.qk_rope_head_dim} must be even and at most index_head_dim={config.index_head_dim}"
        )
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ConfigError(
            f"num_experts_per_tok={config.num_experts_per_tok} exceeds n_routed_experts={config.n_routed_experts}"
        )
    if config.num_nextn_predict_layers > 1:
        raise ConfigError(f"num_nextn_predict_layers={config.num_nextn_predict_layers} is not supported: at most 1")
    if not (math.isfinite(config.latent_norm_eps) and config.latent_norm_eps > 0):
        raise ConfigError(f"latent_norm_eps={config.latent_norm_eps!r} must be a finite positive number")
