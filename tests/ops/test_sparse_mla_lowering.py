"""Sparse MLA on a machine without a GPU: choices, plans, and every backend compiled for the GPUs it claims."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import arch, lowering, registry
from pallas_kernels.sparse_mla import BACKENDS, attend
from pallas_kernels.sparse_mla.plan import cut, few_plan, hopper_plan, make_plan, one_tile_each
from pallas_kernels.sparse_mla.spec import CASES, Spec, inputs

H200 = arch.by_name("H200-141")
GPUS = ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"]


def shapes(spec: Spec) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((spec.rows, spec.heads, 576), jnp.dtype(spec.q_dtype)),
        jax.ShapeDtypeStruct((spec.layers, spec.pages, 64, spec.width), jnp.dtype(spec.cache_dtype)),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((spec.rows, spec.k), jnp.int32),
    )


def lower(spec: Spec, gpu: arch.Arch, backend: str) -> str:
    def call(q: jax.Array, cache: jax.Array, layer: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attend(
            q, cache, layer, slots, kv_lora_rank=512, scale=spec.scale, splits=spec.splits, backend=backend
        )  # fmt: skip

    return lowering.lower_for_cuda(call, *shapes(spec), arch=gpu)


@pytest.mark.needs_triton
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["h64_k2048_fp8", "h8_k2048_fp8", "h64_k2048_bf16"])
def test_triton_compiles(name: str, gpu: str, rows: int) -> None:
    text = lower(dataclasses.replace(CASES[name], rows=rows), arch.by_name(gpu), "triton")
    assert text.count("triton_kernel_call") in (1, 2)


@pytest.mark.needs_triton
@pytest.mark.parametrize(
    ("name", "rows", "kernels"),
    [
        *(("h64_k2048_fp8", 8, 2), ("h64_k2048_fp8", 128, 1), ("h32_k2048_fp8", 128, 1)),
        *(("h8_k512_fp8", 24, 2), ("h8_k512_fp8", 16, 2), ("h8_k2048_fp8", 1, 2), ("h8_k2048_fp8", 8, 2)),
        *(("h16_k2048_fp8", 1, 2), ("h16_k2048_fp8", 8, 2), ("h16_k2048_fp8", 9, 2)),
    ],
)
def test_gluon_compiles(name: str, rows: int, kernels: int) -> None:
    text = lower(dataclasses.replace(CASES[name], rows=rows), H200, "gluon")
    assert text.count("triton_kernel_call") == kernels


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": 256}, "256"),
        ({"q_dtype": "float32"}, "float32"),
        ({"cache_dtype": "float16"}, "float16"),
        ({"rows": 65536}, "65536 rows"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_forced_backend_says_why_it_cannot(backend: str, change: dict[str, object], words: str) -> None:
    spec = dataclasses.replace(CASES["h64_k2048_fp8"], **change)
    with pytest.raises(registry.BackendRefused, match=words):
        registry.resolve("sparse_mla", BACKENDS, spec, H200, forced=backend)


def test_the_gpu_decides() -> None:
    spec = dataclasses.replace(CASES["h64_k2048_fp8"], rows=8)
    got = {gpu: registry.resolve("sparse_mla", BACKENDS, spec, arch.by_name(gpu)).backend for gpu in GPUS}
    assert got == {"A100-80": "triton", "H200-141": "gluon", "B200-180": "triton", "RTX PRO 6000": "triton"}
    assert registry.resolve("sparse_mla", BACKENDS, spec, None).backend == "reference"
    few = dataclasses.replace(spec, heads=8)
    # A number of splits that is asked for leaves the kernel of one tile a program, which has one number only.
    few_or_not: list[tuple[dict[str, int], str]] = [
        *(({}, "gluon"), ({"splits": 4}, "triton"), ({"k": 8192}, "triton")),
        *(({"heads": 16}, "gluon"), ({"heads": 16, "splits": 4}, "triton"), ({"heads": 24, "rows": 2}, "triton")),
    ]
    for change, name in few_or_not:
        choice = registry.resolve("sparse_mla", BACKENDS, dataclasses.replace(few, **change), H200)
        assert choice.backend == name, change
    assert registry.resolve("sparse_mla", BACKENDS, dataclasses.replace(spec, rows=2), H200).backend == "triton"


@pytest.mark.parametrize("k", [1, 63, 64, 65, 512, 2000, 2048])
@pytest.mark.parametrize("splits", [1, 2, 7, 32, 1000])
def test_splits_cover_every_key_and_none_is_empty(k: int, splits: int) -> None:
    got, tiles = cut(dataclasses.replace(CASES["h64_k2048_fp8"], k=k), 64, splits)
    assert 1 <= got <= splits and got * tiles * 64 >= k > (got - 1) * tiles * 64


@pytest.mark.parametrize("gpu", [None, *GPUS])
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 32, 64, 80])
@pytest.mark.parametrize("rows", [1, 8, 64, 128, 5000])
def test_plans_are_made_of_powers_of_two(rows: int, heads: int, gpu: str | None) -> None:
    spec = dataclasses.replace(CASES["h64_k2048_fp8"], rows=rows, heads=heads)
    plan = make_plan(spec, arch.by_name(gpu) if gpu else None)
    for size in (plan.block_heads, plan.block_keys, plan.warps):
        assert size & (size - 1) == 0 and size > 0
    assert plan.block_heads >= 16 and plan.block_keys >= 16
    assert plan.splits * plan.tiles * plan.block_keys >= spec.k


@pytest.mark.parametrize("heads", [1, 8, 16, 24, 32, 64, 80])
@pytest.mark.parametrize("rows", [1, 8, 64, 128, 5000])
def test_hopper_plans_cover_every_head_and_key_in_one_wave(rows: int, heads: int) -> None:
    spec = dataclasses.replace(CASES["h64_k2048_fp8"], rows=rows, heads=heads)
    plan = hopper_plan(spec, H200)
    blocks = -(-heads // plan.block_heads)
    assert plan.block_heads in (16, 32, 64) and plan.splits * plan.tiles * plan.block_keys >= spec.k
    assert plan.splits == 1 or rows * blocks * plan.splits <= H200.num_sms


@pytest.mark.parametrize("k", [1, 65, 2000, 2048])
@pytest.mark.parametrize(
    ("heads", "rows"), [*((8, rows) for rows in (1, 2, 4, 8, 16)), *((13, rows) for rows in (1, 2, 8))]
)
def test_plans_of_few_heads_have_one_tile_a_program(heads: int, rows: int, k: int) -> None:
    spec = dataclasses.replace(CASES["h8_k2048_fp8"], heads=heads, rows=rows, k=k)
    plan = few_plan(spec, H200)
    assert one_tile_each(spec) and plan.tiles == 1 and plan.block_heads in (8, 16)
    assert plan.splits * plan.block_keys >= k > (plan.splits - 1) * plan.block_keys


def test_rows_have_slots_of_their_own_where_the_cache_is_large_enough() -> None:
    spec = dataclasses.replace(CASES["h8_k512_fp8"], rows=4, pages=32)
    slots = inputs(spec, jax.random.key(0))[3]
    assert len({int(slot) for slot in slots.ravel()}) == 4 * 512 and int(slots.min()) >= 0
    assert all(int(row.min()) // 512 == int(row.max()) // 512 == i for i, row in enumerate(slots))


def test_inputs_are_distinct_slots_inside_the_cache() -> None:
    spec = dataclasses.replace(CASES["h8_k512_fp8"], rows=3, pages=16)
    q, cache, layer, slots = inputs(spec, jax.random.key(0))
    assert q.shape == (3, 8, 576) and cache.shape == (1, 16, 64, 656) and layer.shape == ()
    for row in slots:
        assert len(set(row.tolist())) == spec.k and int(row.min()) >= 0 and int(row.max()) < spec.capacity
