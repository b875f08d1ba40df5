"""Loading: dtypes, layouts, refusals, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glm52_jax
from glm52_jax import CheckpointError, loader
from glm52_jax.config import Config
from glm52_jax.layout import merge_kv_b, split_kv_b
from glm52_jax.tiny import dequantise, read_checkpoint, tiny_config, write_checkpoint
from glm52_jax.weights import Leaf, weight_leaves
from pallas_kernels.blocks import BlockScaled
from tests.fixtures_util import assert_placed_in_place, checkpoint_dir

SMALL = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}


def rewrite(directory: Path, change) -> None:
    """Rewrites a checkpoint of one safetensors file after ``change(tensors)`` edited {name: array}."""
    tensors = {name: np.array(value) for name, value in read_checkpoint(directory).items()}
    change(tensors)
    names = {
        np.dtype(ml_dtypes.bfloat16): "BF16",
        np.dtype(np.float32): "F32",
        np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    }
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in tensors.values())
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def fp8_dir(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", tiny_config(**SMALL), weights="fp8")
    return tmp_path / "c"


@pytest.fixture
def bf16_dir(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", tiny_config(**SMALL), weights="bfloat16")
    return tmp_path / "c"


def test_every_number_lands_where_the_layout_says() -> None:
    """Each leaf of a loaded model, against the checkpoint's tensors by name, dequantized independently in numpy."""
    directory = checkpoint_dir("fp8")
    tensors = read_checkpoint(directory)
    model = glm52_jax.load(directory, dtype="float32", weights="float32")
    c = model.config
    heads, nope = c.num_attention_heads, c.qk_nope_head_dim

    def stored(name: str) -> np.ndarray:
        scale = tensors.get(name + "_scale_inv")
        return tensors[name].astype(np.float32) if scale is None else dequantise(tensors[name], scale)

    leaves = jax.tree.leaves(weight_leaves(c, mtp=True), is_leaf=lambda x: isinstance(x, Leaf))
    arrays = jax.tree.leaves(model.weights)
    assert len(leaves) == len(arrays)
    for leaf, array in zip(leaves, arrays, strict=True):
        assert array.shape == leaf.shape
        for source in leaf.sources:
            want = stored(source.tensor)
            if leaf.kind in ("w_uk", "w_uv"):
                by_head = want.reshape(heads, -1, c.kv_lora_rank)
                want = by_head[:, :nope] if leaf.kind == "w_uk" else by_head[:, nope:]
            assert np.array_equal(np.asarray(array[source.index]), want), source.tensor


def test_every_tensor_is_claimed_once() -> None:
    directory = checkpoint_dir("fp8")
    config = Config.from_hf(json.loads((directory / "config.json").read_text()))
    leaves = jax.tree.leaves(weight_leaves(config, mtp=True), is_leaf=lambda x: isinstance(x, Leaf))
    names = [source.tensor for leaf in leaves if leaf.kind != "w_uv" for source in leaf.sources]
    assert len(names) == len(set(names))
    assert set(names) == {n.removesuffix("_scale_inv") for n in read_checkpoint(directory)}


def test_storage_and_activation_dtypes(fp8_dir: Path) -> None:
    kept = glm52_jax.load(fp8_dir)
    attention, moe = kept.weights.attention, kept.weights.moe
    assert isinstance(attention.q_b, BlockScaled) and isinstance(moe.gate_up, BlockScaled)
    assert attention.q_b.data.dtype == jnp.float8_e4m3fn and attention.q_b.scale.dtype == jnp.float32
    assert attention.w_uk.dtype == jnp.bfloat16 and moe.router.dtype == jnp.bfloat16
    assert moe.router_bias.dtype == jnp.float32
    assert (kept.plan.cache, kept.plan.dtype) == ("fp8", "bfloat16")
    exact = glm52_jax.load(fp8_dir, dtype="float32")
    assert exact.weights.attention.w_uk.dtype == jnp.float32 and exact.plan.cache == "float32"
    widened = glm52_jax.load(fp8_dir, weights="bfloat16")
    assert widened.weights.attention.q_b.dtype == jnp.bfloat16 and widened.plan.cache == "bfloat16"
    assert widened.weights.moe.router_bias.dtype == jnp.float32
    assert glm52_jax.load(fp8_dir, cache="float32").plan.cache == "float32"


def test_router_is_never_narrowed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(**SMALL), weights="float32")
    model = glm52_jax.load(tmp_path, weights="bfloat16")
    assert model.weights.attention.q_b.dtype == jnp.bfloat16
    assert model.weights.moe.router.dtype == jnp.float32


@pytest.mark.parametrize(
    "kwargs",
    [{"dtype": "float16"}, {"cache": "int8"}, {"linear": "w4a16"}, {"weights": "int8"}, {"latent_norm_eps": 0.0}],
)
def test_load_refuses_unknown_arguments(kwargs: dict, bf16_dir: Path) -> None:
    with pytest.raises(ValueError, match=str(next(iter(kwargs.values())))):
        glm52_jax.load(bf16_dir, **kwargs)


def test_progress_reaches_the_total(bf16_dir: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    glm52_jax.load(bf16_dir, progress=lambda *call: calls.append(call))
    done = [d for d, _, _ in calls]
    assert (
        done == sorted(done)
        and done[-1] == calls[-1][1]
        and {name for _, _, name in calls} == set(read_checkpoint(bf16_dir))
    )


def test_missing_and_unexpected_tensors_are_named(bf16_dir: Path) -> None:
    def change(tensors: dict) -> None:
        tensors["model.layers.1.self_attn.q_c_proj.weight"] = tensors.pop("model.layers.1.self_attn.q_b_proj.weight")

    rewrite(bf16_dir, change)
    with pytest.raises(CheckpointError, match=r"(?s)layers\.1\.self_attn\.q_b_proj.*layers\.1\.self_attn\.q_c_proj"):
        glm52_jax.load(bf16_dir)


def test_missing_block_scale_is_named(fp8_dir: Path) -> None:
    rewrite(fp8_dir, lambda t: t.pop("model.layers.2.mlp.experts.3.down_proj.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight_scale_inv"):
        glm52_jax.load(fp8_dir)


@settings(max_examples=12)
@given(data=st.data())
def test_nan_in_scales_is_named(small_fp8: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("nan") / "c"
    shutil.copytree(small_fp8, directory)
    names = sorted(n for n in read_checkpoint(directory) if n.endswith("_scale_inv"))
    name = data.draw(st.sampled_from(names))
    value = data.draw(st.sampled_from([np.nan, np.inf, -1.0]))

    def change(tensors: dict) -> None:
        flat = tensors[name].reshape(-1)
        flat[data.draw(st.integers(0, flat.size - 1))] = value

    rewrite(directory, change)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loader, "_allocate", None)  # refused before anything is allocated
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            glm52_jax.load(directory)


def test_modules_to_not_convert_decides_nothing(fp8_dir: Path) -> None:
    """The published list names a tensor that does not exist and says nothing that the tensors do not (spec trap 13)."""
    want = jax.tree.map(np.asarray, glm52_jax.load(fp8_dir).weights)
    config = json.loads((fp8_dir / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.self_attn.o_proj", "indexers_proj"]
    (fp8_dir / "config.json").write_text(json.dumps(config))
    got = jax.tree.map(np.asarray, glm52_jax.load(fp8_dir).weights)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))


@pytest.fixture(scope="module")
def small_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_checkpoint(path := tmp_path_factory.mktemp("small") / "c", tiny_config(**SMALL), weights="fp8")
    return path


def test_mixed_storage_is_refused_unless_converted(fp8_dir: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"

    def change(tensors: dict) -> None:
        tensors[name] = dequantise(tensors[name], tensors.pop(name + "_scale_inv")).astype(ml_dtypes.bfloat16)

    rewrite(fp8_dir, change)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loader, "_allocate", None)
        with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj\.weight is BF16"):
            glm52_jax.load(fp8_dir)
    assert glm52_jax.load(fp8_dir, weights="bfloat16").weights.attention.o_proj.dtype == jnp.bfloat16


def test_indexer_tensors_on_shared_layers_are_skipped_with_one_warning(tmp_path: Path) -> None:
    config, shared = tiny_config(**SMALL | {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}), 1
    write_checkpoint(tmp_path, config, weights="bfloat16")
    want = glm52_jax.load(tmp_path, dtype="float32").score(list(range(80)))

    def change(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.0.self_attn.indexer.")]:
            tensors[name.replace("layers.0.", f"layers.{shared}.")] = tensors[name] * 3

    rewrite(tmp_path, change)
    with pytest.warns(UserWarning, match=f"skipped 5 indexer tensors .*layers.{shared}") as caught:
        model = glm52_jax.load(tmp_path, dtype="float32")
    assert len(caught) == 1
    assert np.array_equal(model.score(list(range(80))), want)


def test_shards_in_any_order_give_the_same_weights(tmp_path: Path) -> None:
    config = tiny_config(**SMALL)
    for shards in (1, 5):
        write_checkpoint(tmp_path / str(shards), config, weights="fp8", shards=shards)
    one, five = (glm52_jax.load(tmp_path / str(n)).weights for n in (1, 5))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, five))


_PEAK = """
import sys, jax, glm52_jax
def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024
glm52_jax.load(sys.argv[1])  # start-up and compilation
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
model = glm52_jax.load(sys.argv[1])
print(status("VmHWM") - before, sum(a.nbytes for a in jax.tree.leaves(model.weights)))
"""


def test_host_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """Peak resident memory of a load, mapped files included, beyond the arrays themselves (which are host memory on a CPU)."""
    config = tiny_config(hidden_size=512, moe_intermediate_size=512, n_routed_experts=16, num_hidden_layers=6)
    write_checkpoint(tmp_path, config, weights="fp8", shards=8)
    shard = max(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    environment = {**os.environ, "XLA_FLAGS": ""}  # the suite's unoptimized copies take half a minute here
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, arrays = (int(n) for n in run.stdout.split())
    assert arrays > 4 * shard
    assert grown - arrays < 1.5 * shard, f"{grown - arrays} bytes beyond the arrays, one shard is {shard}"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
def test_loading_fills_in_place(dtype: str) -> None:
    assert_placed_in_place(dtype)


def test_kv_b_split_has_an_exact_inverse() -> None:
    kv_b = jnp.arange(3 * 7 * 5, dtype=jnp.float32).reshape(21, 5)
    w_uk, w_uv = split_kv_b(kv_b, 3, 4, 3)
    assert w_uk.shape == (3, 4, 5) and w_uv.shape == (3, 3, 5)
    assert np.array_equal(merge_kv_b(w_uk, w_uv), kv_b)
    assert np.array_equal(w_uv[1], kv_b[7 + 4 : 14])


def test_real_sizes_have_the_published_number_of_parameters() -> None:
    """Section 3's element counts, from the leaves of the real configuration: nothing is missing and nothing is twice."""
    config = Config.from_hf(REAL)
    leaves = jax.tree.leaves(weight_leaves(config, mtp=True), is_leaf=lambda x: isinstance(x, Leaf))
    count = sum(int(np.prod(s.shape)) for leaf in leaves if leaf.kind != "w_uv" for s in leaf.sources)
    f32_bias = 76 * 256
    assert count == 751_226_191_872 + 2_103_729_152 + f32_bias
    assert len(leaves) < 48, "arguments cost host time: weights stay a few dozen arrays"
    assert max(int(np.prod(leaf.shape[1:])) for leaf in leaves) > 2**31, "one layer's experts exceed 32-bit offsets"


REAL = {
    **json.loads((checkpoint_dir("glm52") / "config.json").read_text()),
    **{"vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64},
    **{
        "num_key_value_heads": 64,
        "q_lora_rank": 2048,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
    },
    **{"qk_head_dim": 256, "v_head_dim": 256, "intermediate_size": 12288, "moe_intermediate_size": 2048},
    **{
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "index_topk": 2048,
        "index_n_heads": 32,
        "index_head_dim": 128,
    },
    **{"first_k_dense_replace": 3, "index_topk_freq": 4, "index_skip_topk_offset": 3, "indexer_types": None},
    **{"mlp_layer_types": None, "layer_types": None},
}
