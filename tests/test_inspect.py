"""What inspect says of a checkpoint, on tiny ones and on the headers of the real GLM-5.2-FP8; and the table of GPUs."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from glm52_jax import tiny
from glm52_jax.checkpoint import TensorInfo
from glm52_jax.cli.inspect import _cell, human_bytes
from glm52_jax.config import Config
from glm52_jax.inspect_checkpoint import (
    GPU_COUNTS,
    KINDS,
    Fit,
    Summary,
    cache_bytes_per_token,
    fit,
    fits,
    inspect_directory,
    kind_of,
    split_refusal,
    summarise,
)
from pallas_kernels.arch import ARCHS, by_name, from_device_kind

# Spec section 1. The other keys of tiny_config are the real ones already.
REAL = {
    "vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64, "q_lora_rank": 2048,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128,
}  # fmt: skip


def headers(config: dict, fp8: bool, mtp: bool) -> list[TensorInfo]:
    """The tensors that a checkpoint of this config has, without writing any."""
    infos = []

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
        infos.append(TensorInfo(name, dtype, shape, Path("model.safetensors"), 0, size * math.prod(shape)))

    for name, (shape, kind) in tiny.tensor_specs(config, mtp).items():
        if fp8 and tiny.KINDS[kind].fp8:
            add(name, "F8_E4M3", shape)
            add(name + "_scale_inv", "F32", tiny.scale_shape(shape))
        else:
            add(name, "F32" if tiny.KINDS[kind].float32 else "BF16", shape)
    return infos


@pytest.fixture(scope="module")
def real() -> tuple[Config, Summary]:
    hf = tiny.tiny_config(**REAL)
    config = Config.from_hf(hf)
    return config, summarise(config, headers(hf, fp8=True, mtp=True))


class TestReal:
    """Numbers of the spec: its section 3 agrees with the published shard headers."""

    def test_elements_by_dtype(self, real):
        assert real[1].elements == {"F8_E4M3": 751_226_191_872, "BF16": 2_103_729_152, "F32": 45_872_560}

    def test_tensors_and_bytes(self, real):
        summary = real[1]
        assert summary.total.tensors == 118_629
        assert summary.total.nbytes == 751_226_191_872 + 2 * 2_103_729_152 + 4 * 45_872_560
        assert sum(group.nbytes for group in summary.by_kind.values()) == summary.total.nbytes
        assert round(summary.total.parameters / 1e9, 2) == 753.33
        assert summary.by_kind["mtp"].tensors == 1569
        assert "other" not in summary.by_kind and list(summary.by_kind) == [k for k in KINDS if k != "other"]

    def test_kinds(self, real):
        by_kind = real[1].by_kind
        assert by_kind["experts"].parameters == 75 * 256 * 3 * 2048 * 6144
        assert by_kind["shared experts"].parameters == 75 * 3 * 2048 * 6144
        assert by_kind["dense mlp"].parameters == 3 * 3 * 12288 * 6144
        assert by_kind["router"].parameters == 75 * (256 * 6144 + 256)
        assert by_kind["embeddings"].parameters == 2 * 154880 * 6144
        assert by_kind["indexer"].parameters == 21 * (4096 * 2048 + 128 * 6144 + 32 * 6144 + 2 * 128)
        assert by_kind["attention"].parameters == 78 * (
            2048 * 6144 + 16384 * 2048 + 576 * 6144 + 28672 * 512 + 6144 * 16384
        )
        assert by_kind["norms"].parameters == 78 * (2 * 6144 + 2048 + 512) + 6144

    def test_cache_bytes(self, real):
        assert cache_bytes_per_token(real[0], mtp=False) == 53_940
        assert cache_bytes_per_token(real[0], mtp=True) == real[1].cache_bytes_per_token == 54_728

    def test_replicated_weights(self, real):
        layers, full = 79, 22
        stored = {  # bytes on every GPU, in FP8 unless noted
            "q_a": layers * (2048 * 6144 + 4 * 16 * 48),
            "kv_a": layers * (576 * 6144 + 4 * 5 * 48),
            "router": 76 * (2 * 256 * 6144 + 4 * 256),
            "index keys": full * (128 * 6144 + 4 * 48 + 2 * 32 * 6144 + 2 * 2 * 128),
            "embeddings": 2 * 154880 * 6144,
            "norms": 2 * (layers * (2 * 6144 + 2048 + 512) + 6144 + 3 * 6144),
        }
        assert real[1].replicated_bytes == sum(stored.values())
        # W_UK and W_UV are held in bf16: twice the FP8 kv_b, without its scales.
        extra = layers * (28672 * 512 - 4 * 224 * 4)
        assert real[1].sliced_bytes + real[1].replicated_bytes == real[1].total.nbytes + extra
        assert real[1].weights_per_gpu(1) == real[1].total.nbytes + extra

    def test_eight_h200_hold_it_and_four_do_not(self, real):
        eight, four = (fit(*real, by_name("H200-141"), n) for n in (8, 4))
        assert 94e9 < eight.weights < 98e9  # 95 GB a rank, measured in the project's facts
        assert eight.free == int(141e9 * 0.95) - eight.weights
        assert eight.tokens == eight.free // 54_728 // 64 * 64 and 600_000 < eight.tokens < 750_000
        assert four.free < 0 and four.tokens == 0 and four.refusal is None

    def test_every_gpu_and_count_is_listed(self, real):
        rows = fits(*real)
        assert [(row.gpu, row.gpus) for row in rows] == [(a.name, n) for a in ARCHS for n in GPU_COUNTS]
        assert all(row.refusal is None for row in rows)
        assert [row.gpu for row in rows if row.tokens and row.gpus == 8] == ["H200-141", "B200-180", "B200-192"]

    def test_without_mtp(self):
        hf = tiny.tiny_config(**REAL)
        summary = summarise(Config.from_hf(hf), headers(hf, fp8=True, mtp=False))
        assert not summary.has_mtp and summary.cache_bytes_per_token == 53_940
        assert [note for note in summary.notes if "announces an MTP layer" in note and "model.layers.78." in note]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("model.layers.0.mlp.gate.weight", "router"),
            ("model.layers.0.mlp.gate_proj.weight", "dense mlp"),
            ("model.layers.0.mlp.experts.11.gate_proj.weight_scale_inv", "experts"),
            ("model.layers.0.self_attn.indexer.k_norm.bias", "indexer"),
            ("model.layers.0.self_attn.q_a_layernorm.weight", "norms"),
            ("model.layers.0.self_attn.q_a_proj.weight", "attention"),
            ("model.layers.2.self_attn.q_a_proj.weight", "mtp"),
            ("model.norm.weight", "norms"),
            ("model.normal.weight", "other"),
            ("model.layers.0.mlp.gated.weight", "other"),
            ("lm_head.weight", "embeddings"),
            ("lm_head_2.weight", "other"),
        ],
    )
    def test_kind(self, name, kind):
        assert kind_of(name, num_layers=2) == kind


class TestTiny:
    def test_directory(self, tmp_path):
        tiny.write_checkpoint(tmp_path, tiny.tiny_config(), weights="fp8", shards=3, mtp=True)
        config, checkpoint, summary = inspect_directory(tmp_path)
        assert len(checkpoint.files) == 3 and config.num_hidden_layers == 7
        assert summary.total.tensors == len(checkpoint.tensors)
        assert summary.total.nbytes == sum(checkpoint.bytes_by_dtype().values())
        assert {d: g.nbytes for d, g in summary.by_dtype.items()} == checkpoint.bytes_by_dtype()
        assert summary.notes == []

    def test_stray_indexer_tensors_are_not_counted_as_weights(self):
        hf = tiny.tiny_config()
        config, infos = Config.from_hf(hf), headers(hf, fp8=False, mtp=True)
        source = next(i for i in infos if i.name == "model.layers.2.self_attn.indexer.wk.weight")
        stray = dataclasses.replace(source, name="model.layers.3.self_attn.indexer.wk.weight")
        before, after = summarise(config, infos), summarise(config, [*infos, stray])
        assert after.weights_per_gpu(1) == before.weights_per_gpu(1)
        assert after.total.nbytes == before.total.nbytes + stray.nbytes
        assert after.notes == ["indexer tensors on 1 shared layers (3) are not used"]

    def test_unknown_names_are_announced(self):
        hf = tiny.tiny_config()
        extra = TensorInfo("model.layers.0.mlp.extra.weight", "BF16", (2,), Path("x"), 0, 4)
        summary = summarise(Config.from_hf(hf), [*headers(hf, fp8=False, mtp=True), extra])
        assert summary.notes == ["1 tensors have unknown names: the loader will refuse them"]

    def test_refusals_name_the_sizes(self):
        config = Config.from_hf(tiny.tiny_config())
        assert split_refusal(config, 1, 128) is None
        assert split_refusal(config, 4, 1) is None
        assert "num_attention_heads=4" in str(split_refusal(config, 8, 1))
        assert "num_attention_heads * qk_head_dim=320 is not a multiple of 4 GPUs x 128 rows" in str(
            split_refusal(config, 4, 128)
        )


class TestArch:
    def test_names_find_themselves(self):
        assert len({arch.name for arch in ARCHS}) == len(ARCHS)
        assert all(by_name(arch.name.lower()) is arch for arch in ARCHS)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="unknown GPU 'H300': known are A100-40, "):
            by_name("H300")

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("NVIDIA H200", "H200-141"),
            ("NVIDIA H100 80GB HBM3", "H100-80"),
            ("NVIDIA A100-SXM4-40GB", "A100-40"),
            ("NVIDIA A100-SXM4-80GB", "A100-80"),
            ("NVIDIA B200", "B200-180"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
            ("NVIDIA H100 PCIe", None),
            ("NVIDIA H100 NVL", None),
            ("NVIDIA A100 80GB PCIe", None),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
            ("NVIDIA H200 MIG 1g.18gb", None),
            ("Tesla V100-SXM2-16GB", None),
            ("cpu", None),
        ],
    )
    def test_device_kinds(self, kind, name):
        arch = from_device_kind(kind)
        assert (arch.name if arch else None) == name

    @pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
    def test_numbers_are_plausible(self, arch):
        assert arch.compute_capability in {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}
        assert 90 < arch.num_sms < 200
        # Shared memory of a block is a multiple of 1 KiB, less than the SM's 100 to 256 KiB of L1.
        assert arch.smem_per_block % 1024 == 0 and 99 <= arch.smem_per_block // 1024 <= 227
        assert 40 <= arch.l2_bytes / 2**20 <= 128
        assert 1e12 <= arch.bandwidth <= 8e12
        assert arch.copy_bandwidth is None or 0.8 < arch.copy_bandwidth / arch.bandwidth < 1


def test_needs_no_jax(tmp_path):
    tiny.write_checkpoint(tmp_path, tiny.tiny_config(num_hidden_layers=1))
    code = (
        "import sys; from glm52_jax.cli import main; code = main(['inspect', sys.argv[1]]);"
        "heavy = {'jax', 'jaxlib', 'flax', 'tokenizers'} & set(sys.modules); print(heavy, file=sys.stderr);"
        "sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout


class TestTable:
    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (753_329_940_480, "753.33 GB"), (-2e12, "-2.00 TB")],
    )
    def test_human_bytes(self, count, text):
        assert human_bytes(int(count)) == text

    def test_a_cell_says_tokens_or_what_is_missing_or_that_sizes_do_not_split(self):
        row = Fit("H200-141", 4, weights=191, free=-57_830_000_000, tokens=0)
        assert _cell(row) == "-57.83 GB"
        assert _cell(dataclasses.replace(row, free=10**9, tokens=12_800)) == "12,800"
        assert _cell(dataclasses.replace(row, refusal="8 heads")) == "no split"
