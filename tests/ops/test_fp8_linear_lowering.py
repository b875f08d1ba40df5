"""The Hopper kernel of fp8_linear without a GPU: its plans, its results in Pallas' interpreter, its lowering for CUDA."""

import dataclasses
import re
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
from pallas_kernels.fp8_linear import mosaic_once_sm90, mosaic_sm90, plan, prefill_split, reference
from pallas_kernels.fp8_linear.spec import CASES, Spec, inputs
from tests.ops import cluster_stores

H200 = by_name("H200-141")
# Small, and together: one row by eight k-blocks a wgmma and by one, two weights, SwiGLU, uneven shares, 576 rows, padding.
SMALL = {
    "one row": Spec(1, 2048, (128,), "w8a8", layers=2),
    "one row, w8a16": Spec(1, 1024, (192,), "w8a16", layers=2),
    "one row, few blocks": Spec(1, 384, (64,), "w8a16"),
    "one row, swiglu": Spec(1, 1024, (64,), "w8a16", form="swiglu", layers=2),
    "three rows, two weights": Spec(3, 512, (64, 192), "w8a8", layers=2),
    "eight rows, uneven": Spec(8, 640, (64,), "w8a16"),
    "swiglu": Spec(5, 512, (64,), "w8a8", form="swiglu"),
    "sixteen rows": Spec(16, 512, (64,), "w8a8", layers=3),
    "64 rows": Spec(64, 256, (64,), "w8a16"),
    "k of five blocks": Spec(2, 640, (192, 64), "w8a16", layers=2),
    "33 rows, three blocks": Spec(33, 384, (64,), "w8a8"),
    "norm, one row": Spec(1, 2048, (64, 192), "w8a8", layers=2, norm="bfloat16", eps=1e-5),
    "norm, one row, few tiles": Spec(1, 3072, (64,), "w8a16", layers=2, norm="bfloat16", delta=True, eps=1e-5),
    "norm, three rows": Spec(3, 1024, (128,), "w8a8", layers=2, norm="float32", delta=True, eps=1e-5),
    "norm, eight rows": Spec(8, 1024, (64, 64), "w8a16", norm="bfloat16", eps=1e-5),
}
# k shared out to a cluster, (warpgroups, unit, step, stages, x_slots, split): even and uneven shares, two weights, a norm, SwiGLU.
SPLIT = {
    "eight rows": (Spec(8, 1024, (64, 128), "w8a16", layers=2), (2, 2, 2, 1, 1, 2)),
    "three rows, uneven": (Spec(3, 640, (64,), "w8a8", layers=2), (1, 1, 1, 2, 2, 3)),
    "one row, uneven": (Spec(1, 3072, (192,), "w8a8", layers=2), (1, 8, 4, 2, 2, 2)),
    "norm, one row": (
        Spec(1, 3072, (64, 192), "w8a16", layers=2, norm="bfloat16", delta=True, eps=1e-5),
        (1, 8, 4, 2, 2, 3),
    ),
    "swiglu, one row": (Spec(1, 2048, (64,), "w8a8", form="swiglu", layers=2), (1, 8, 4, 2, 1, 2)),
    "swiglu": (Spec(2, 1024, (64,), "w8a16", form="swiglu", layers=2), (1, 2, 2, 2, 2, 4)),
    "norm, three rows": (Spec(3, 1024, (64, 192), "w8a16", layers=2, norm="bfloat16", eps=1e-5), (1, 4, 4, 1, 1, 2)),
    "norm, two warpgroups": (Spec(8, 1024, (128,), "w8a8", layers=2, norm="float32", eps=1e-5), (2, 2, 2, 1, 1, 2)),
    "norm, uneven": (Spec(2, 640, (64,), "w8a16", norm="bfloat16", eps=1e-5), (2, 1, 1, 2, 1, 1)),
    "33 rows": (Spec(33, 1024, (64,), "w8a16", layers=2), (2, 1, 1, 2, 2, 2)),
    "one unit a warpgroup": (Spec(8, 1024, (64,), "w8a16"), (2, 4, 4, 1, 1, 1)),
}
# Without a cluster nothing is stored to another block.
ALONE = [name for name, (_, sizes) in SPLIT.items() if sizes[-1] == 1]
# Lowering takes 0.5 s a kernel: several rows only for these.
WIDE = ("o_proj_w8a8", "q_a_kv_a_w8a16", "dense_gate_up_w8a16")


def run_interpreted(spec: Spec, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[jax.Array, ...]:
    """The kernel in the interpreter, with its races recorded: any race fails."""
    cluster_stores.install(monkeypatch)
    build, once, split = mosaic_sm90.build, mosaic_once_sm90.build, prefill_split.build
    params = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(mosaic_once_sm90, "build", lambda plan, dtype: once(plan, dtype, params))
    monkeypatch.setattr(mosaic_sm90, "build", lambda plan, dtype: build(plan, dtype, params))
    monkeypatch.setattr(prefill_split, "build", lambda *sizes: split(*sizes, params))
    out = jax.block_until_ready(mosaic_sm90.run(spec, *args))
    assert not gpu_callbacks.get_races().races_found
    return out


def planned(spec: Spec, sizes: tuple[int, ...]) -> plan.Plan:
    names = ("warpgroups", "unit", "step", "stages", "x_slots", "split")
    chosen = plan.plan_for(spec) or plan.plan_for(dataclasses.replace(spec, norm=""))
    assert chosen is not None
    chosen = dataclasses.replace(chosen, norm=spec.norm, delta=spec.delta, eps=spec.eps)
    return dataclasses.replace(chosen, **dict(zip(names, sizes, strict=True)))


@pytest.mark.parametrize("name", [*SMALL, *(f"split, {name}" for name in SPLIT)])
def test_interpreted_kernel_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured below 1e-6: the interpreter accumulates in float32."""
    if name in SMALL:
        spec = dataclasses.replace(SMALL[name], out_dtype="float32")
    else:
        spec, sizes = SPLIT[name.removeprefix("split, ")]
        spec = dataclasses.replace(spec, out_dtype="float32")
        split = planned(spec, sizes)
        monkeypatch.setattr(mosaic_sm90, "plan_for", lambda _: split)
    x, weights, _, _, *norm = inputs(spec, jax.random.key(len(name)))
    args = (weights, (jnp.asarray(spec.layers - 1, jnp.int32),))
    got = run_interpreted(spec, (x, *args, None, *norm), monkeypatch)
    if spec.norm:
        total, normed = got[:2]
        for a, b in zip(got[:2], reference.run(spec, x, *args, None, *norm)[:2], strict=True):
            assert compare(a, b).rel_l2 < 1e-4 and (a is not total or (a == b).all())
        x, got, spec = normed, got[2:], dataclasses.replace(spec, norm="", delta=False)
    want = reference.run(dataclasses.replace(spec, x_dtype="float32"), x.astype(jnp.float32), *args)
    for a, b in zip(got, want, strict=True):
        difference = compare(a, b)
        assert difference.rel_l2 < 2e-6, difference


# The scales of a layer start a part of the stack, or within one where they are fewer than what is copied, or are all of a stack.
KNOWN = {
    "two weights": Spec(3, 512, (64, 192), "w8a8", layers=2),
    "k of five blocks": Spec(2, 640, (192, 64), "w8a16", layers=2),
    "norm": Spec(1, 3072, (64,), "w8a16", layers=2, norm="bfloat16", delta=True, eps=1e-5),
    "swiglu": Spec(1, 1024, (64,), "w8a16", form="swiglu", layers=3),
    "the last of six": Spec(1, 1024, (192,), "w8a16", layers=6),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_layer_has_the_bits_of_a_traced_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KNOWN[name]
    x, weights, _, _, *norm = inputs(spec, jax.random.key(len(name)))
    found = []
    for index in (spec.layers - 1, jnp.asarray(spec.layers - 1, jnp.int32)):
        with monkeypatch.context() as patch:
            found.append(run_interpreted(spec, (x, weights, (index,), None, *norm), patch))
    for known, traced in zip(*found, strict=True):
        np.testing.assert_array_equal(known.astype(jnp.float32), traced.astype(jnp.float32))


def test_known_layers_share_a_kernel_without_an_index() -> None:
    """kv_a's scales of a layer are 960 bytes: they start at four places of 256, and the last, at the stack's end, is all of it."""
    spec = dataclasses.replace(CASES["q_a_kv_a_w8a16"], layers=8)
    x, weights, _, _ = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))

    def calls(x: Any, weights: Any, traced: Any) -> list[Any]:
        return [mosaic_sm90.run(spec, x, weights, (i,)) for i in (0, 4, 7, traced)]

    text = lowering.lower_for_cuda(calls, x, weights, jax.ShapeDtypeStruct((), jnp.int32), arch=H200)
    # One for layers 0 and 4, one for layer 7, and one that has an index more.
    operands = re.findall(r"custom_call @mosaic_gpu\w*\(([^)]*)\)", text)
    assert [len(found.split(",")) for found in operands] == [6, 6, 7]
    assert len(set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text))) == 3


def test_w8a16_keeps_small_elements_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an element of 1, those down to 2^-14 are exact; an e4m3 x of W8A8 keeps nothing below 2^-18."""
    spec = Spec(1, 1024, (64,), "w8a16", out_dtype="float32")
    _, weights, index, _ = inputs(spec, jax.random.key(0))
    x = np.full((1, 1024), 1.0078125 * 2.0**-14, np.float32)
    x[0, ::128] = 1.0
    small = jnp.asarray(x, jnp.bfloat16)
    got = run_interpreted(spec, (small, weights, index), monkeypatch)[0]
    want = reference.run(dataclasses.replace(spec, x_dtype="float32"), small.astype(jnp.float32), weights, index)[0]
    assert compare(got, want).rel_l2 < 2e-6


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("value", ["zero", "nan", "inf", "huge"])
def test_hostile_rows_stay_by_themselves(rows: int, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(rows, 1024, (64,), "w8a8", out_dtype="float32")
    x, weights, index, _ = inputs(spec, jax.random.key(1))
    bad = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "huge": 3e38}[value]
    x = x.at[0, :128].set(jnp.bfloat16(bad))
    got = np.asarray(run_interpreted(spec, (x, weights, index), monkeypatch)[0])
    want = np.asarray(reference.run(spec, x, weights, index)[0])
    assert np.isnan(got[0]).all() == (value in ("nan", "inf"))
    assert np.isfinite(got[1:]).all()
    finite = slice(1 if value in ("nan", "inf", "huge") else 0, None)
    if rows > 1 or value == "zero":
        assert compare(got[finite], want[finite]).rel_l2 < 2e-6


@pytest.mark.parametrize("rows,name", [(1, name) for name in CASES] + [(8, name) for name in WIDE] + [(64, WIDE[2])])
def test_real_cases_lower_for_cuda(name: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=3)
    choice = registry.resolve("fp8_linear", fp8_linear.BACKENDS, spec, arch=H200)
    assert choice.backend == "mosaic_sm90", choice
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    text = lowering.lower_for_cuda(lambda *args: mosaic_sm90.run(spec, *args), *shapes, arch=H200)
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(
    "name,rows,launches", [("norm_q_b", 1, 1), ("norm_q_b", 64, 2), ("norm_q_b_tp8", 8, 1), ("norm_q_b_tp8", 9, 2)]
)
def test_norm_linears_launches(name: str, rows: int, launches: int) -> None:
    """One row, and up to eight of a shard: a single kernel. More: the norm in jnp, x quantized, the product."""
    spec = dataclasses.replace(CASES[f"{name}_w8a16"], rows=rows, layers=2)
    x, weights, index, _, norm, _ = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))

    def function(x: Any, norm: Any, weights: Any, index: Any) -> Any:
        return fp8_linear.norm_linears(x, norm, weights, index, eps=1e-5)

    text = lowering.lower_for_cuda(function, x, norm, weights, index, arch=H200)
    assert text.count("custom_call @mosaic_gpu") == launches, text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("name", SPLIT)
def test_split_plans_lower(name: str) -> None:
    """The stores to the leading block; their barrier must be the only one of its array (see ``Tile.send``)."""
    spec, sizes = SPLIT[name]
    split = planned(spec, sizes)
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    text = lowering.lower_for_cuda(lambda *args: mosaic_sm90.launch(spec, split, *args), *shapes, arch=H200)
    assert (name not in ALONE) == ("st.async.cluster" in text) == ("barrier.cluster.wait" in text)


def test_stack_beyond_32_bit_offsets_lowers() -> None:
    """256 experts' gate and up: 6.4e9 elements."""
    spec = dataclasses.replace(CASES["shared_gate_up_w8a8"], layers=256)
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    assert shapes[1][0].data.size > 2**32
    assert lowering.lower_for_cuda(lambda *args: mosaic_sm90.run(spec, *args), *shapes, arch=H200)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, 64])
@pytest.mark.parametrize("name", CASES)
def test_plans_fit(name: str, rows: int) -> None:
    """Only a norm of many rows, or of several long ones, has no plan: it is a launch of its own."""
    spec = dataclasses.replace(CASES[name], rows=rows)
    chosen = plan.plan_for(spec)
    if spec.norm and (rows > plan.NORM_ROWS or (rows > 1 and "norm_q_b_tp8" not in name)):
        assert chosen is None
        return
    assert chosen is not None and chosen.rows == rows and chosen.ready == (rows > plan.IN_KERNEL_ROWS)
    assert chosen.smem <= 226 * 1024 and chosen.blocks % chosen.unit == 0 and chosen.unit % chosen.step == 0
    assert chosen.warpgroups * chosen.stages <= 32 and chosen.columns >= min(rows, 8)
    assert 1 <= chosen.split <= 8 and chosen.units >= chosen.shares


def test_dispatch_never_changes_the_arithmetic() -> None:
    spec = CASES["o_proj_w8a16"]
    assert plan.plan_for(spec).terms == 2  # type: ignore[union-attr]
    assert plan.plan_for(CASES["o_proj_w8a8"]).terms == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 65}, "1 to 64 rows, got 65"),
        ({"k": 300}, "k=300"),
        ({"k": 576}, "multiple of 128 .* got k=576"),
        ({"k": 32640}, "no plan .* k=32640"),
        ({"norm": "float16"}, "norm of bfloat16 or float32, got float16"),
        ({"ns": (200,)}, r"n=\(200,\)"),
        ({"weights": "bfloat16"}, "got bfloat16"),
        ({"x_dtype": "float32"}, "got float32"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(Spec(1, 512, (128,)), **change)
    with pytest.raises(registry.BackendRefused, match=reason):
        registry.resolve("fp8_linear", fp8_linear.BACKENDS, spec, arch=H200, forced="mosaic_sm90")
    with pytest.raises(registry.BackendRefused, match="needs SM90, got SM80"):
        registry.resolve(
            "fp8_linear", fp8_linear.BACKENDS, Spec(1, 512, (128,)), arch=by_name("A100-80"), forced="mosaic_sm90"
        )


def test_the_longest_row_of_scales_lowers() -> None:
    spec = Spec(1, 32768, (64,), "w8a8")
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    assert plan.plan_for(spec).scale_slots == 256  # type: ignore[union-attr]
    assert "mosaic_gpu" in lowering.lower_for_cuda(lambda *args: mosaic_sm90.run(spec, *args), *shapes, arch=H200)


def test_linears_equal_linear() -> None:
    spec = Spec(2, 256, (64, 128), "w8a8")
    x, weights, index, _ = inputs(spec, jax.random.key(0))
    both = fp8_linear.linears(x, weights, index, arithmetic="w8a8")
    for w, got in zip(weights, both, strict=True):
        np.testing.assert_array_equal(got, fp8_linear.linear(x, w, index, arithmetic="w8a8"))
