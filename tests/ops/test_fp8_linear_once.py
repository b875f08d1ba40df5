"""The kernel of fp8_linear with all weights on their way at once, without a GPU: plans, the interpreter, lowering."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lowering
from pallas_kernels.arch import by_name
from pallas_kernels.compare import compare
from pallas_kernels.fp8_linear import mosaic_once_sm90, mosaic_sm90, reference
from pallas_kernels.fp8_linear.once_plan import OncePlan, once_plan_for
from pallas_kernels.fp8_linear.spec import CASES, Spec, inputs
from tests.ops import cluster_stores

H200 = by_name("H200-141")
NORM = {"norm": "bfloat16", "eps": 1e-5}
# (warpgroups, fold, step, stages, split): stages that are filled anew, pieces of k side by side, a cluster, two weights, few rows.
# Small ones: the interpreter stands still where more than some eight warpgroups wait.
SMALL = {
    "one row": (Spec(1, 2048, (64,), "w8a8", layers=2), (2, 1, 4, 1, 1)),
    "one row, folded, norm": (Spec(1, 2048, (64,), "w8a16", layers=2, **NORM), (2, 2, 4, 1, 1)),
    "one row, two weights": (Spec(1, 1024, (64, 64), "w8a16", layers=2, delta=True, **NORM), (1, 2, 2, 1, 1)),
    "one row, a cluster": (Spec(1, 2048, (64,), "w8a16", layers=2), (1, 1, 4, 2, 2)),
    "rows": (Spec(8, 1024, (64,), "w8a16", layers=2), (2, 1, 2, 1, 1)),
    "rows, folded": (Spec(5, 1024, (64,), "w8a16", layers=2), (2, 2, 2, 1, 1)),
    "rows, a cluster": (Spec(8, 1024, (64,), "w8a8", layers=2), (2, 1, 1, 1, 2)),
    "rows, a cluster, stages again": (Spec(3, 1024, (64,), "w8a16", layers=2), (1, 1, 1, 2, 2)),
}


def planned(spec: Spec, sizes: tuple[int, int, int, int, int]) -> OncePlan:
    terms = 2 if spec.arithmetic == "w8a16" else 1
    plan = OncePlan(spec.rows, spec.k, spec.ns, terms, *sizes, spec.norm, spec.delta, spec.eps)
    assert plan.fits, plan
    return plan


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_stores.install(monkeypatch)
    build, params = mosaic_once_sm90.build, plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(mosaic_once_sm90, "build", lambda plan, dtype: build(plan, dtype, params))


def agrees(spec: Spec, weights: Any, layer: int, args: tuple[Any, ...], got: tuple[jax.Array, ...]) -> None:
    """Measured 0 to 1e-6 against the reference of the kernel's own normed rows."""
    if spec.norm:
        wanted = reference.run(spec, args[0], weights, (layer,), None, *args[1:])
        for a, b in zip(got[:2], wanted[:2], strict=True):
            assert compare(a, b).rel_l2 < 1e-4 and (a is not got[0] or (a == b).all())
    x, outs = (got[1], got[2:]) if spec.norm else (args[0], got)
    plain = dataclasses.replace(spec, norm="", delta=False, x_dtype="float32")
    wanted = reference.run(plain, x.astype(jnp.float32), weights, (layer,))
    for a, b in zip(outs, wanted, strict=True):
        difference = compare(a, b)
        assert difference.rel_l2 < 2e-6, difference


@pytest.mark.parametrize("name", SMALL)
def test_interpreted_kernel_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known layer and a traced one have the same bits; no races."""
    spec, sizes = SMALL[name]
    spec = dataclasses.replace(spec, out_dtype="float32")
    interpreted(monkeypatch)
    x, weights, _, _, *norm = inputs(spec, jax.random.key(len(name)))
    found = []
    for layer in (1, jnp.asarray(1)):
        args = (x, weights, (layer,), None, *norm)
        found.append(jax.block_until_ready(mosaic_sm90.launch(spec, planned(spec, sizes), *args)))
        assert not gpu_callbacks.get_races().races_found
    for known, traced in zip(*found, strict=True):
        np.testing.assert_array_equal(known.astype(jnp.float32), traced.astype(jnp.float32))
    agrees(spec, weights, 1, (x, *norm), found[0])


# What is chosen, and at how many rows; all else has none.
CHOSEN = {
    "q_a_kv_a_w8a16": (1, 2, 8),
    "norm_q_a_kv_a_w8a16": (1,),
    "add_norm_q_a_kv_a_w8a16": (1,),
    "q_b_tp8_w8a16": (1,),
    "norm_q_b_tp8_w8a16": (1,),
    "o_proj_tp8_w8a16": (2, 8),
    "shared_down_w8a16": (2, 8),
    "index_q_w8a16": (2, 8),
}


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("name", CASES)
def test_chosen_plans_fit_and_lower(name: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[name], rows=rows, layers=3)
    plan = once_plan_for(spec)
    assert (plan is not None) == (rows in CHOSEN.get(name, ()))
    if plan is None:
        return
    assert plan.rows == rows and plan.fits and plan.terms == 2 and spec.arithmetic == "w8a16"
    shapes = jax.eval_shape(lambda key: inputs(spec, key), jax.random.key(0))
    text = lowering.lower_for_cuda(lambda *args: mosaic_sm90.run(spec, *args), *shapes, arch=H200)
    assert text.count("custom_call @mosaic_gpu") == 1


def test_row_counts_share_the_arithmetic() -> None:
    """2 to 8 rows differ in nothing but their number, so a row keeps its bits; other row counts and forms have no such plan."""
    for name in CASES:
        plans = [once_plan_for(dataclasses.replace(CASES[name], rows=rows)) for rows in range(2, 9)]
        assert {plan and dataclasses.replace(plan, rows=8) for plan in plans} == {plans[-1]}
        assert once_plan_for(dataclasses.replace(CASES[name], rows=9)) is None
    assert once_plan_for(dataclasses.replace(CASES["q_a_kv_a_w8a16"], form="swiglu", ns=(576,))) is None
