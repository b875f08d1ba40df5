"""The prefill kernel of fp8_linear without a GPU: its plans, its results in Pallas' interpreter, its lowering for CUDA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fp8_linear, lowering, registry
from pallas_kernels.arch import by_name
from pallas_kernels.compare import compare
from pallas_kernels.fp8_linear import mosaic_prefill_sm90, prefill_plan, prefill_split, reference
from pallas_kernels.fp8_linear.spec import CASES, Spec, inputs

H200 = by_name("H200-141")
# Small, and together: rows and outputs that end inside a tile and inside a block, one share of k and several, two weights, SwiGLU.
SMALL = {
    "65 rows": Spec(65, 256, (64,), "w8a8", layers=2),
    "two weights, w8a16": Spec(130, 512, (192, 576), "w8a16", layers=2),
    "shares of k": Spec(72, 2048, (128,), "w8a8"),
    "swiglu": Spec(100, 384, (192,), "w8a8", form="swiglu", layers=2),
    "a traced layer": Spec(65, 256, (64,), "w8a8"),
}


def run_interpreted(spec: Spec, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[jax.Array, ...]:
    """The kernels in the interpreter, with their races recorded: any race fails."""
    split, product = prefill_split.build, mosaic_prefill_sm90.build
    params = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(prefill_split, "build", lambda *sizes: split(*sizes, params))
    monkeypatch.setattr(mosaic_prefill_sm90, "build", lambda *a: product(*a, *[None] * (3 - len(a)), params))
    out = jax.block_until_ready(mosaic_prefill_sm90.run(spec, *args))
    assert not gpu_callbacks.get_races().races_found
    return out


def wide(spec: Spec) -> Spec:
    return dataclasses.replace(spec, x_dtype="float32", out_dtype="float32")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted_kernel_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured below 1e-6 in float32, where the interpreter accumulates."""
    out = "bfloat16" if SMALL[name].form == "swiglu" else "float32"
    spec = dataclasses.replace(SMALL[name], out_dtype=out)
    x, weights, *_ = inputs(spec, jax.random.key(len(name)))
    # A known layer where there are several, which is sliced; else a traced one.
    index = (1,) if spec.layers > 1 else (jnp.zeros((), jnp.int32),)
    got = run_interpreted(spec, (x, weights, index), monkeypatch)
    want = reference.run(wide(spec), x.astype(jnp.float32), weights, index)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == jnp.dtype(out)
        difference = compare(np.asarray(a.astype(jnp.float32)), b)
        assert difference.rel_l2 < (2.5e-3 if out == "bfloat16" else 2e-6), difference


@pytest.mark.parametrize("terms", [1, 2])
def test_split_is_the_reference_or_exact(terms: int) -> None:
    """One term has the bits of ``quantize_groups``; two terms give bfloat16 back, down to 2^-14 of a group's largest."""
    rows, k = 33, 256
    x = (
        jax.random.normal(jax.random.key(0), (rows, k), jnp.float32)
        * 10.0 ** (jnp.arange(rows, dtype=jnp.float32) % 7.0 - 3.0)[:, None]
    )
    x = x.at[0, :128].set(0.0).at[1, :128].set(1.0078125 * 2.0**-14).at[1, 0].set(1.0).astype(jnp.bfloat16)
    params = plgpu.InterpretGPUParams(detect_races=True)
    values, scale = jax.block_until_ready(prefill_split.build(rows, 64, k, terms, params)(x))
    assert not gpu_callbacks.get_races().races_found
    assert values.shape == (terms, 64, k) and scale.shape == (k // 128, 64)
    assert not np.asarray(values[:, rows:].astype(jnp.float32)).any()
    if terms == 1:
        want, want_scale = jax.jit(reference.quantize_groups)(x)
        np.testing.assert_array_equal(np.asarray(scale[:, :rows]), np.asarray(want_scale).T)
        np.testing.assert_array_equal(np.asarray(values[0, :rows]).view(np.uint8), np.asarray(want).view(np.uint8))
    else:
        parts = np.asarray(values.astype(jnp.float32))[:, :rows]
        steps = np.repeat(np.asarray(scale).T[:rows], 128, axis=1)
        exact = np.asarray(x.astype(jnp.float32))
        error = np.abs((parts[0] + parts[1] / 16) * steps - exact)
        amax = np.repeat(np.abs(exact).reshape(rows, -1, 128).max(axis=-1), 128, axis=1)
        assert (error <= 2.0**-14 * steps).all() and not error[np.abs(exact) >= 2.0**-14 * amax].any()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_hostile_rows_stay_by_themselves(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(66, 256, (64,), "w8a8", out_dtype="float32")
    x, weights, index, *_ = inputs(spec, jax.random.key(1))
    x = x.at[0, :128].set(jnp.bfloat16(value))
    got = np.asarray(run_interpreted(spec, (x, weights, index), monkeypatch)[0])
    want = np.asarray(reference.run(spec, x, weights, index)[0])
    assert np.isfinite(got[0]).all() == np.isfinite(value)
    assert compare(got[1:], want[1:]).rel_l2 < 2e-6


@pytest.mark.parametrize("rows", [65, 100, 512, 4096])
@pytest.mark.parametrize("name", ["o_proj_w8a8", "q_a_kv_a_w8a16", "dense_gate_up_w8a8"])
def test_real_cases_lower_for_cuda(name: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=3)
    choice = registry.resolve("fp8_linear", fp8_linear.BACKENDS, spec, arch=H200)
    assert choice.backend == "mosaic_prefill_sm90", choice
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    text = lowering.lower_for_cuda(lambda *args: mosaic_prefill_sm90.run(spec, *args), *shapes, arch=H200)
    assert text.count("mosaic_gpu") >= 2


@pytest.mark.parametrize("rows", [65, 128, 129, 500, 1000, 4096, 100_000])
@pytest.mark.parametrize("name", CASES)
def test_plans_fit_and_cover(name: str, rows: int) -> None:
    spec = CASES[name]
    terms = 2 if spec.arithmetic == "w8a16" else 1
    for n in spec.ns:
        plan = prefill_plan.plan_for(rows, spec.k, n, terms)
        assert plan.smem <= 226 * 1024 and plan.stages >= 2
        assert plan.padded_rows >= rows and plan.column_tiles * plan.tile_columns >= n
        assert plan.blocks >= plan.splits >= 1 and plan.columns <= 128 and 128 % plan.columns == 0
        multiply, copy = plan.registers
        assert 128 * (plan.consumers * multiply + copy) <= 65536


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 64}, "more than 64 rows, got 64"),
        ({"k": 320}, "k=320"),
        ({"ns": (200,)}, r"n=\(200,\)"),
        ({"weights": "bfloat16"}, "got bfloat16"),
        ({"x_dtype": "float32"}, "got float32"),
        ({"norm": "bfloat16"}, "no norm"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(Spec(65, 512, (128,)), **change)
    with pytest.raises(registry.BackendRefused, match=reason):
        registry.resolve("fp8_linear", fp8_linear.BACKENDS, spec, arch=H200, forced="mosaic_prefill_sm90")
