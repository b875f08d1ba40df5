"""What Config.from_hf refuses: every message names the field and its value."""

import math
from typing import Any

import pytest

from glm52_jax.config import Config, ConfigError
from tests.configs import DROP, FP8, GLM52, INDEXER_TYPES, changed

SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings", "index_topk"),
    *("index_n_heads", "index_head_dim", "rms_norm_eps", "routed_scaling_factor"),
)


@pytest.mark.parametrize("name", SIZES)
def test_refuses_a_missing_or_bad_size(name: str) -> None:
    for absent in (DROP, None):
        with pytest.raises(ConfigError, match=rf"no {name}\b"):
            Config.from_hf(changed(**{name: absent}))
    for bad in (0, -1, True, "128", math.nan, 10**400):  # the last is beyond a float
        with pytest.raises(ConfigError, match=rf"^{name}={bad!r}"):
            Config.from_hf(changed(**{name: bad}))


def test_sizes_are_integers_and_scales_finite() -> None:
    with pytest.raises(ConfigError, match=r"^hidden_size=6144\.0"):
        Config.from_hf(changed(hidden_size=6144.0))
    with pytest.raises(ConfigError, match=r"^routed_scaling_factor=inf"):
        Config.from_hf(changed(routed_scaling_factor=math.inf))


WRONG: list[tuple[str, Any]] = [
    ("model_type", "deepseek_v32"),
    ("attention_bias", True),
    ("attention_bias", 0),  # an int where a switch belongs
    ("mlp_bias", True),
    ("hidden_act", "gelu"),
    ("tie_word_embeddings", True),
    ("n_group", 8),
    ("n_group", True),  # a switch where an int belongs
    ("topk_group", 4),
    ("moe_layer_freq", 2),
    ("scoring_func", "softmax"),
    ("topk_method", "group_limited_greedy"),
    ("norm_topk_prob", False),
    ("norm_topk_prob", 1),
    ("moe_router_dtype", "bfloat16"),
    ("rope_interleave", False),
    ("indexer_rope_interleave", False),
    ("index_share_for_mtp_iteration", False),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("partial_rotary_factor", 0.5),
    ("is_encoder_decoder", True),
    ("add_cross_attention", True),
    ("chunk_size_feed_forward", 64),
    ("rope_parameters", [8000000]),
    ("rope_parameters", {"rope_theta": 8000000, "rope_type": "default", "factor": 4.0}),
    ("rope_parameters", {"rope_theta": 8000000, "partial_rotary_factor": 0.5}),
    ("rope_theta", 10000.0),
    ("num_key_value_heads", 8),
    ("qk_head_dim", 192),
    ("num_experts", 128),
    ("num_local_experts", 128),
    ("layer_types", ["sliding_attention"] * 78),
    ("num_experts_per_tok", 257),
    ("num_nextn_predict_layers", 2),
    ("num_nextn_predict_layers", -1),
    ("num_nextn_predict_layers", True),
    ("index_topk_freq", 1.5),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [1, True]),
    ("qk_rope_head_dim", 63),
    ("sliding_window", 4096),  # a switch nobody read
    ("attention_sink", True),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value}" for name, value in WRONG])
def test_refuses_and_names_the_field_and_the_value(name: str, value: Any) -> None:
    hf = changed(**{name: value}, indexer_types=DROP)
    if name == "qk_rope_head_dim":
        hf |= {"qk_head_dim": 192 + value}
    with pytest.raises(ConfigError) as error:
        Config.from_hf(hf)
    assert name in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": 8000000, "rope_type": "yarn", "factor": 4.0}, r"rope_type='yarn'"),
        ({"rope_theta": 8000000, "type": "yarn"}, r"'type': 'yarn'"),
        ({"rope_type": "default"}, r"no rope_parameters\.rope_theta"),
        ({"rope_theta": None}, r"no rope_parameters\.rope_theta"),
        ({"rope_theta": 0}, r"rope_theta=0"),
        ({"rope_theta": True}, r"rope_theta=True"),
        (DROP, r"no rope_parameters\.rope_theta"),
    ],
    ids=str,
)
def test_refuses_other_ropes_and_guesses_no_theta(rope: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_hf(changed(rope_parameters=rope))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("weight_block_size", [64, 128]),
        ("weight_block_size", None),
        ("scale_fmt", "ue8m0"),
        ("a_switch_nobody_read", True),
    ],
)
def test_refuses_other_quantisations(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_hf(changed(quantization_config=FP8 | {key: value}))
    assert f"quantization_config.{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_types": INDEXER_TYPES[:77]}, r"indexer_types has 77 entries for num_hidden_layers=78"),
        ({"indexer_types": [*INDEXER_TYPES, "full", "full"]}, r"indexer_types has 80 entries"),
        ({"indexer_types": [*INDEXER_TYPES, "full"], "num_nextn_predict_layers": 0}, r"indexer_types has 79 entries"),
        ({"indexer_types": ["full"] * 77 + ["dense"]}, r"indexer_types=.*'dense'"),
        ({"indexer_types": "full"}, r"indexer_types='full'"),
        ({"indexer_types": ["shared"] + ["full"] * 77}, r"indexer_types\[0\]='shared'"),
        ({"mlp_layer_types": ["sparse"] * 77}, r"mlp_layer_types has 77 entries"),
        ({"mlp_layer_types": ["full"] * 78}, r"mlp_layer_types=.*'full'"),
        ({"indexer_types": DROP, "index_topk_pattern": "F" * 77}, r"index_topk_pattern='FFF"),
        ({"indexer_types": DROP, "index_topk_pattern": "F" * 77 + "X"}, r"index_topk_pattern=.*X'"),
        ({"indexer_types": DROP, "index_topk_pattern": "S" + "F" * 77}, r"indexer_types\[0\]='shared'"),
        ({"index_head_dim": 62}, r"qk_rope_head_dim=64 .*index_head_dim=62"),
    ],
)
def test_refuses_lists_and_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_hf(changed(**changes))


def test_unknown_fields_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping=50\.0, zebra='x'"):
        Config.from_hf(changed(zebra="x", attn_logit_softcapping=50.0))


@pytest.mark.parametrize("name", ["norm_topk_prob", "rope_interleave", "indexer_rope_interleave"])
def test_null_is_not_true(name: str) -> None:
    """transformers and vLLM read a null switch as false: it must not pass for true."""
    with pytest.raises(ConfigError, match=f"{name}=None"):
        Config.from_hf(changed(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", "fp8"),
        ("layer_types", 78),
        ("layer_types", [["full_attention"]] * 78),
        ("num_hidden_layers", 10**9),
        ("n_routed_experts", 10**8),
        ("index_topk_pattern", [["F"]] * 78),
        ("index_topk_pattern", "F" * 100),
        ("index_topk_freq", 0),
    ],
    ids=[
        "quantization_config",
        "layer_types",
        "nested types",
        "layers",
        "experts",
        "nested pattern",
        "long pattern",
        "zero freq",
    ],
)
def test_malformed_values_are_config_errors(name: str, value: Any) -> None:
    """Neither another exception nor a silent reading."""
    with pytest.raises(ConfigError, match=name):
        Config.from_hf(changed(**{name: value}, indexer_types=DROP))


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.nan, math.inf])
def test_refuses_latent_norm_eps(eps: float) -> None:
    with pytest.raises(ConfigError, match="latent_norm_eps=" + repr(eps)):
        Config.from_hf(GLM52, latent_norm_eps=eps)
