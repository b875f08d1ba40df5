"""index_keys without a GPU: choices, counts, and its kernels compiled for the GPUs they claim."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, index_keys, lowering, registry
from pallas_kernels.index_keys.plan import plan_for
from pallas_kernels.index_keys.spec import CASES, Spec, inputs

H200 = arch.by_name("H200-141")
GPUS = ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"]


def lower(spec: Spec, gpu: arch.Arch) -> str:
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    backend = next(b for b in index_keys.BACKENDS if b.name == "triton")
    return lowering.lower_for_cuda(lambda *a: backend.load()(spec, *a), *args, arch=gpu)


@pytest.mark.needs_triton
@pytest.mark.parametrize("rows", [1, 40, 512])
@pytest.mark.parametrize("gpu", GPUS)
def test_triton_compiles(gpu: str, rows: int) -> None:
    text = lower(dataclasses.replace(CASES["both_w8a16"], rows=rows), arch.by_name(gpu))
    assert text.count("triton_kernel_call") in (2, 3)  # wq_b may be a kernel of fp8_linear


@pytest.mark.needs_triton
@pytest.mark.parametrize("form", ["write", "query_w8a16", "both_w8a16"])
def test_triton_compiles_for_bfloat16_weights(form: str) -> None:
    spec = CASES[form]
    names = {name: "bfloat16" for name in ("wk", "wq_b") if getattr(spec, name)}
    assert "triton_kernel_call" in lower(dataclasses.replace(spec, **names), H200)


def changed(**changes: object) -> Spec:
    return dataclasses.replace(CASES["both_w8a16"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (changed(dtype="float32"), "float32"),
        (changed(head_dim=64), "head_dim 64 must be 128"),
        (changed(hidden=6100), "6100"),
        (changed(cache_dtype="float32"), "float32 cache"),
        (changed(wk="float32"), "wk of float32"),
        (changed(proj="float32"), "weights_proj float32"),
        (changed(quantized=False), "quantized=False"),
        (changed(heads=7), "7 heads"),
        (changed(wk="float8_e4m3fn without scales"), "without scales"),
    ],
)
def test_refusals_name_the_number(spec: Spec, words: str) -> None:
    choice = registry.resolve("index_keys", index_keys.BACKENDS, spec, H200)
    assert choice.backend == "reference" and words in choice.reason
    with pytest.raises(registry.BackendRefused, match="refuses"):
        registry.resolve("index_keys", index_keys.BACKENDS, spec, H200, forced="triton")


def test_who_serves_what() -> None:
    for spec in CASES.values():
        for gpu in GPUS:
            assert registry.resolve("index_keys", index_keys.BACKENDS, spec, arch.by_name(gpu)).backend == "triton"
        assert registry.resolve("index_keys", index_keys.BACKENDS, spec, None).backend == "reference"


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 512, 4096, 131072])
@pytest.mark.parametrize("case", list(CASES))
def test_plans_cover_the_hidden_size(case: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[case], rows=rows)
    plan = plan_for(spec, H200)
    assert spec.hidden // 128 % plan.splits == 0 and plan.splits <= 24
    assert plan.key_tiles * plan.block_keys == (0 if spec.form == "query" else 128)
    assert spec.heads % plan.block_heads == 0


def test_counts_at_the_real_sizes() -> None:
    """Weights once: wk and wq_b one byte a number with a scale a block, weights_proj two; 132 bytes a key."""
    wk, wq_b, proj = 128 * 6144 + 4 * 48, 4096 * 2048 + 4 * 32 * 16, 2 * 32 * 6144
    rows, rotation = 2 * 6144, 4 * 64
    key, query = 132 + 4, 2 * 2048 + 32 * 132
    assert CASES["write"].bytes() == wk + rows + rotation + key
    assert CASES["query_w8a8"].bytes() == wq_b + proj + rows + rotation + query
    assert CASES["both_w8a16"].bytes() == wk + wq_b + proj + rows + rotation + key + query
    assert CASES["both_w8a16"].flops() == 2 * (160 * 6144 + 4096 * 2048)


@pytest.mark.parametrize("quantized", [False, True])
def test_both_sides_at_once_equal_each_alone(quantized: bool) -> None:
    small = changed(rows=5, hidden=256, q_lora_rank=128, heads=3, head_dim=32, rope=8, pages=2, layers=2)
    args = inputs(dataclasses.replace(small, cache_dtype="uint8" if quantized else "float32"), jax.random.key(0))
    cache, latent, x, wk, norm, bias, wq_b, proj, _, slots, cos, sin = args
    if not quantized:
        cache = jnp.zeros((2, 2, 64, 32), jnp.float32)
    found = index_keys.write_and_query(
        latent, x, wk, norm, bias, wq_b, proj, cache, 1, slots, cos, sin, quantized=quantized
    )
    alone = (
        index_keys.write(x, wk, norm, bias, cache, 1, slots, cos, sin),
        *index_keys.query(latent, x, wq_b, proj, 1, cos, sin, quantized=quantized),
    )
    for a, b in zip(found, alone, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() and np.asarray(a, np.float32).any()
