"""MQA logits on a machine without a GPU: choices, plans, inputs, and both kernels compiled for the GPUs they claim."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, lowering, registry
from pallas_kernels.mqa_logits import BACKENDS, paged_logits
from pallas_kernels.mqa_logits.plan import make_plan, make_portable_plan
from pallas_kernels.mqa_logits.spec import CASES, Spec, comparable, first_position, inputs

H200 = arch.by_name("H200-141")
GPUS = ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"]
# Shared memory of an SM of Hopper, and what the system takes of it for each block of threads.
SMEM, RESERVED = 228 * 1024, 1024


def lower(spec: Spec, gpu: arch.Arch, backend: str) -> str:
    shapes = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    *most, starts = shapes

    def call(*args: jax.Array) -> jax.Array:
        return paged_logits(*args[:6], starts=None if starts is None else args[6], backend=backend)

    return lowering.lower_for_cuda(call, *most, *([] if starts is None else [starts]), arch=gpu)


@pytest.mark.needs_triton
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("rows", "queries", "heads"), [(3, 1, 8), (1, 2, 64), (2, 5, 32), (2, 20, 16)])
def test_triton_compiles(rows: int, queries: int, heads: int, gpu: str) -> None:
    spec = dataclasses.replace(CASES["decode_2k"], rows=rows, queries=queries, heads=heads)
    assert lower(spec, arch.by_name(gpu), "triton").count("triton_kernel_call") == 1


@pytest.mark.needs_triton
@pytest.mark.parametrize(("rows", "queries", "heads"), [(1, 1, 8), (33, 1, 32), (2, 2, 16), (2, 7, 32), (2, 20, 32)])
@pytest.mark.parametrize("starts", [False, True])
def test_gluon_compiles(starts: bool, rows: int, queries: int, heads: int) -> None:
    spec = dataclasses.replace(CASES["decode_2k"], rows=rows, queries=queries, heads=heads, starts=starts)
    assert lower(spec, H200, "gluon").count("triton_kernel_call") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_dtype": "float32"}, "float32"),
        ({"cache_dtype": "float32"}, "float32"),
        ({"head_dim": 64}, "64"),
        ({"heads": 12}, "12"),
        ({"table": 0}, "0 pages"),
        ({"rows": 65536}, "65536 sequences"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_forced_backend_says_why_it_cannot(backend: str, change: dict[str, object], words: str) -> None:
    spec = dataclasses.replace(CASES["decode_128k"], **change)
    with pytest.raises(registry.BackendRefused, match=words):
        registry.resolve("mqa_logits", BACKENDS, spec, H200, forced=backend)


def test_queries_beyond_32_bit_offsets_are_not_gluons() -> None:
    spec = dataclasses.replace(CASES["decode_2k"], queries=1 << 19)
    assert "32-bit" in registry.resolve("mqa_logits", BACKENDS, spec, H200).reason
    assert registry.resolve("mqa_logits", BACKENDS, spec, H200).backend == "triton"
    fewer = dataclasses.replace(spec, queries=(1 << 19) - 1)
    assert registry.resolve("mqa_logits", BACKENDS, fewer, H200).backend == "gluon"


def test_the_gpu_decides() -> None:
    got = {
        gpu: registry.resolve("mqa_logits", BACKENDS, CASES["decode_128k"], arch.by_name(gpu)).backend for gpu in GPUS
    }
    assert got == {"A100-80": "triton", "H200-141": "gluon", "B200-180": "triton", "RTX PRO 6000": "triton"}
    assert registry.resolve("mqa_logits", BACKENDS, CASES["decode_128k"], None).backend == "reference"
    many = dataclasses.replace(CASES["decode_128k"], heads=64)
    assert registry.resolve("mqa_logits", BACKENDS, many, H200).backend == "triton"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 8, 9, 4096])
@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_plans_cover_every_query(rows: int, queries: int, heads: int, gpu: str) -> None:
    spec = dataclasses.replace(CASES["decode_2k"], rows=rows, queries=queries, heads=heads)
    plan = make_plan(spec, arch.by_name(gpu))
    assert plan.rows <= plan.lanes * plan.tiles and plan.lanes in (1, 2, 4) and plan.tiles in (1, 2)
    assert plan.rows >= queries if not plan.chunk else plan.rows == 8
    assert bool(plan.programs) != bool(plan.chunk)
    portable = make_portable_plan(spec, arch.by_name(gpu))
    assert portable.queries * heads in range(16, 129) and portable.queries % portable.lanes == 0
    assert 1 <= portable.splits <= spec.table


@pytest.mark.parametrize("queries", [1, 2, 4, 8, 4096])
def test_programs_of_a_decode_are_all_resident(queries: int) -> None:
    """Equal shares are equal times only where no program waits for another one to end."""
    spec = dataclasses.replace(CASES["decode_128k"], queries=queries)
    plan = make_plan(spec, H200)
    smem = plan.stages * 64 * 132 + plan.tiles * plan.lanes * spec.heads * 128
    assert -(-plan.programs // H200.num_sms) * (smem + RESERVED) <= SMEM and 3 * (smem + RESERVED) <= SMEM


@pytest.mark.parametrize("name", ["decode_2k", "prefill_1000_8k_starts"])
def test_inputs_are_distinct_pages_in_random_order(name: str) -> None:
    spec = dataclasses.replace(CASES[name], rows=3, queries=12, table=5)
    q, weights, cache, layer, table, lengths, starts = inputs(spec, jax.random.key(0))
    assert cache.shape == (1, 15, 64 * 132) and layer.shape == () and q.dtype == jnp.float8_e4m3fn
    assert sorted(np.asarray(table).ravel()) == list(range(15)) and not (np.diff(np.asarray(table)) == 1).all()
    assert weights.shape == q.shape[:3] and int(lengths.max()) == spec.span and int(lengths.min()) == spec.shortest
    assert (starts is not None) == spec.starts
    assert np.isfinite(np.asarray(cache[..., : 64 * 128]).view(jnp.float8_e4m3fn).astype(np.float32)).all()
    out = paged_logits(q, weights, cache, layer, table, lengths, starts=starts, backend="reference")
    assert np.isfinite(np.asarray(comparable(spec, out))).all()
    assert np.isneginf(np.asarray(out[:, :, : first_position(spec)])).all()


def test_costs_of_the_named_cases() -> None:
    """The figures that the targets are stated in: 132 bytes a key, and causal flops."""
    assert CASES["decode_1m"].bytes() == (1 << 20) * (132 + 4) + (1 << 14) * 4 + 32 * 132
    rectangle = 2 * 4096 * 32768 * 32 * 128
    assert 0.93 * rectangle < CASES["prefill_4096_32k"].flops() < 0.94 * rectangle


@pytest.mark.parametrize("wrong", ["weights", "table", "lengths", "starts", "cache"])
def test_shapes_that_do_not_fit_are_refused_with_the_numbers(wrong: str) -> None:
    spec = dataclasses.replace(CASES["decode_2k"], rows=2, queries=2, table=1, starts=True)
    names = ("q", "weights", "cache", "layer", "table", "lengths", "starts")
    args = dict(zip(names, inputs(spec, jax.random.key(0)), strict=True))
    args[wrong] = args[wrong][:1] if wrong != "cache" else args[wrong][..., :-1]
    with pytest.raises(ValueError, match="must be"):
        paged_logits(**args)
