"""Config.from_hf on the published configs, and what it derives."""

from typing import Any

import pytest

from glm52_jax.config import Config
from tests.configs import DROP, FP8, FULL_52, GEOMETRY, GLM5, GLM52, GLM52_FP8, INDEXER_TYPES, SAVED, changed


def by_schedule(layers: int = 78, **keys: Any) -> Config:
    """A config whose layer kinds come from something else than the explicit lists."""
    return Config.from_hf(changed(num_hidden_layers=layers, indexer_types=DROP, mlp_layer_types=DROP, **keys))


@pytest.mark.parametrize("hf", [GLM52, GLM52_FP8], ids=["bf16", "fp8"])
def test_glm52(hf: dict[str, Any]) -> None:
    config = Config.from_hf(hf)
    same = [name for name in GEOMETRY if hasattr(config, name)]
    assert len(same) == 21
    assert {name: getattr(config, name) for name in same} == {name: GEOMETRY[name] for name in same}
    assert config.max_position_embeddings == 1048576
    assert config.rope_theta == 8e6
    assert config.eos_token_ids == (154820, 154827, 154829)
    assert config.indexer_types == tuple(INDEXER_TYPES)
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 75
    assert config.fp8 == ("quantization_config" in hf)


def test_glm52_layer_kinds() -> None:
    config = Config.from_hf(GLM52)
    assert config.full_layers == (0, 1, 2, *range(6, 75, 4))
    assert config.dense_layers == (0, 1, 2)
    assert config.sparse_layers == tuple(range(3, 78))
    source = {i: max(f for f in config.full_layers if f <= i) for i in range(78)}
    assert [source[i] for i in (3, 4, 5, 7, 8, 9, 75, 76, 77)] == [2, 2, 2, 6, 6, 6, 74, 74, 74]
    assert len(config.full_layers) == 21 and 78 - len(config.full_layers) == 57


def test_real_sizes_derive_the_known_constants() -> None:
    config = Config.from_hf(GLM52)
    assert config.qk_head_dim == 256
    assert config.softmax_scale == 0.0625
    assert config.latent_dim == 576


def test_glm5_is_all_full_and_dense_by_count() -> None:
    config = Config.from_hf(GLM5)
    assert config.indexer_types == ("full",) * 78
    assert config.full_layers == tuple(range(78))
    assert config.dense_layers == (0, 1, 2)
    assert config.rope_theta == 1e6
    assert config.max_position_embeddings == 202752


def test_config_saved_by_transformers() -> None:
    config = Config.from_hf(SAVED)
    assert config.rope_theta == 1e4
    assert config.eos_token_ids == (1,)
    assert config.num_nextn_predict_layers == 0
    assert config.indexer_types == ("full",) * 78
    assert config.hidden_size == 6144 and not config.fp8


def test_schedule_gives_the_explicit_list() -> None:
    assert by_schedule() == Config.from_hf(GLM52)
    assert by_schedule(index_skip_topk_offset=DROP).full_layers == (0, 1, *range(5, 78, 4))
    assert by_schedule(index_topk_freq=DROP).full_layers == tuple(range(78))
    assert by_schedule(layers=11, index_topk_freq=2, index_skip_topk_offset=2).full_layers == (0, 1, 3, 5, 7, 9)


def test_pattern_comes_before_the_schedule_and_after_the_list() -> None:
    assert by_schedule(layers=5, index_topk_pattern="FSSFS").full_layers == (0, 3)
    assert by_schedule(layers=5, index_topk_pattern=list("FSSFS")).full_layers == (0, 3)
    config = Config.from_hf(changed(index_topk_pattern="F" * 78))
    assert config.full_layers == FULL_52


def test_lists_may_count_the_mtp_layer() -> None:
    longer = changed(indexer_types=[*INDEXER_TYPES, "full"], mlp_layer_types=["dense"] * 3 + ["sparse"] * 76)
    assert Config.from_hf(longer) == Config.from_hf(GLM52)


def test_latent_norm_eps() -> None:
    assert Config.from_hf(GLM52).latent_norm_eps == 1e-5
    assert Config.from_hf(changed(rms_norm_eps=3e-6)).latent_norm_eps == 3e-6
    config = Config.from_hf(GLM52, latent_norm_eps=1e-6)
    assert (config.latent_norm_eps, config.rms_norm_eps) == (1e-6, 1e-5)


def test_config_is_hashable_and_frozen() -> None:
    config = Config.from_hf(GLM52)
    assert hash(config) == hash(Config.from_hf(GLM52))
    assert config != Config.from_hf(GLM5)
    with pytest.raises(AttributeError):
        config.hidden_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("extra", [{"scale_fmt": "float"}, {"dequantize": False}, {"ignored_layers": None}], ids=str)
def test_what_transformers_adds_to_a_quantisation(extra: dict[str, Any]) -> None:
    quantised = GLM52_FP8 | {"quantization_config": FP8 | extra}
    assert Config.from_hf(quantised) == Config.from_hf(GLM52_FP8)


def test_eos_forms() -> None:
    assert Config.from_hf(changed(eos_token_id=7)).eos_token_ids == (7,)
    assert Config.from_hf(changed(eos_token_id=DROP)).eos_token_ids == ()
    assert Config.from_hf(changed(eos_token_id=[3, 2])).eos_token_ids == (3, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 64},  # the decoy: nothing may read it
        {"head_dim": DROP},
        {"unheard_of": None},
        {"rope_scaling": None},
        {"rope_theta": 8000000},
        {"rope_parameters": {"rope_theta": 8000000.0}},
        {"rope_parameters": {"rope_theta": 8000000, "rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_parameters": DROP, "rope_theta": 8000000},
        {"num_key_value_heads": DROP, "qk_head_dim": DROP, "rope_interleave": DROP, "indexer_rope_interleave": DROP},
        {"num_experts": 256, "num_local_experts": 256, "moe_router_dtype": "float32"},
        {"layer_types": ["deepseek_sparse_attention"] * 78},
    ],
    ids=str,
)
def test_what_changes_nothing(changes: dict[str, Any]) -> None:
    assert Config.from_hf(changed(**changes)) == Config.from_hf(GLM52)
