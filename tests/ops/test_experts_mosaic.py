"""The Hopper kernels of the experts without a GPU: plans, results in Pallas' interpreter, lowering for CUDA."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import arch, lowering
from pallas_kernels.blocks import BlockScaled
from pallas_kernels.compare import compare
from pallas_kernels.experts import mosaic_down_sm90, mosaic_gate_up_sm90, mosaic_sm90, reference
from pallas_kernels.experts.mosaic_plan import OneRow, Rows, one_row, several_rows
from pallas_kernels.experts.spec import CASES, Spec, inputs

H200 = arch.by_name("H200-141")
ONE = Spec(1, 3, 4, 1024, 128, 128, 2)
FIVE = Spec(5, 2, 4, 256, 128, 256, 2)


def sorted_pairs(spec: Spec, block_rows: int, ids: Any) -> tuple[jax.Array, jax.Array]:
    """What the Triton plan gives, from numpy."""
    flat = np.asarray(ids).reshape(-1)
    expert = np.where((flat >= 0) & (flat < spec.experts), flat, spec.experts)
    counts = np.bincount(expert, minlength=spec.experts + 1)[: spec.experts]
    table = np.stack([np.cumsum(counts), np.cumsum(-(-counts // block_rows))]).astype(np.int32)
    return jnp.asarray(table), jnp.asarray(np.argsort(expert, kind="stable").astype(np.int32))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in the interpreter, with races recorded; the plan from numpy."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    for module, name in (
        (mosaic_gate_up_sm90, "build"),
        (mosaic_down_sm90, "build"),
        (mosaic_sm90, "build_rows"),
    ):
        build = getattr(module, name)
        wrapped = functools.partial(build, interpret=params)
        monkeypatch.setattr(module, name, wrapped)
    monkeypatch.setattr(mosaic_sm90, "sorted_pairs", sorted_pairs)


def both(spec: Spec, plan: Any, change: Any = lambda *args: args) -> tuple[np.ndarray, np.ndarray]:
    """(kernel, reference) at the last layer as float32. change: (x, ids, weights, *stacks) -> the same; the reference gets the
    weights without NaN."""
    *args, _, _, _, _, _ = inputs(spec, jax.random.key(spec.rows))
    x, ids, weights, *stacks = change(*args)
    layer = jnp.asarray(spec.layers - 1, jnp.int32)
    got = np.asarray(mosaic_sm90.run(spec, x, ids, weights, *stacks, layer, plan=plan).astype(jnp.float32))
    assert not gpu_callbacks.get_races().races_found
    want = reference.run(spec, x, ids, jnp.nan_to_num(weights), *stacks, layer)
    return got, np.asarray(want.astype(jnp.float32))


def with_holes(x: Any, ids: Any, weights: Any, *stacks: Any) -> tuple[Any, ...]:
    """The second choice of the first row is no expert, nor the first of the last, where the row is another."""
    ids, weights = ids.at[0, 1].set(-1), weights.at[0, 1].set(jnp.nan)
    if x.shape[0] > 1:
        ids, weights = ids.at[-1, 0].set(10**6), weights.at[-1, 0].set(jnp.nan)
    return x, ids, weights, *stacks


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "arithmetic,changes",
    [
        ("w8a16", {"workers": 3, "groups_up": 2, "groups_down": 1, "down_rows": 64, "stages_down": 3}),
        (
            "w8a8",
            {
                "workers": 5,
                "groups_up": 3,
                "groups_down": 2,
                "stages_up": 2,
                "down_rows": 64,
                "stages_down": 2,
            },
        ),
    ],
)
def test_one_row(arithmetic: str, changes: dict[str, int]) -> None:
    """Measured below 1e-4: the interpreter accumulates in float32, so that hardly a rounding falls the other way."""
    spec = dataclasses.replace(ONE, arithmetic=arithmetic)
    got, want = both(spec, one_row(spec, **changes), with_holes if changes["workers"] == 5 else lambda *a: a)
    difference = compare(got, want)
    assert difference.rel_l2 < 1e-3, difference


@pytest.mark.usefixtures("interpreted")
def test_tiles_of_down_that_span_two_rows_of_scales() -> None:
    """48 rows from row 96 on, as at the real size; whole units need 1024, so only down can see other hidden sizes here."""
    hidden = 384
    spec = Spec(1, 2, 4, hidden, 128, 128, 2)
    plan = OneRow(2, 4, hidden, 128, 128, 2, 48, 1, 1, 2, 1, 2)
    _, ids, weights, _, down, _, shared, layer, *_ = inputs(spec, jax.random.key(3))
    h = jax.random.normal(jax.random.key(4), (plan.down_units * 8, 128), jnp.float32).astype(jnp.bfloat16)
    operands = [
        *(a for w in (down, shared) for a in (w.data.reshape(-1, hidden, 128), jnp.pad(w.scale.reshape(-1), (0, 128))))
    ]
    (got,) = mosaic_down_sm90.build(plan)(layer.reshape(1), ids.reshape(-1), weights.reshape(-1), h, *operands)
    values = [shared.data[0].astype(jnp.float32) * jnp.repeat(shared.scale[0], 128, axis=0)]
    for expert, weight in zip(np.asarray(ids)[0], np.asarray(weights)[0], strict=True):
        values.append(
            weight * down.data[0, expert].astype(jnp.float32) * jnp.repeat(down.scale[0, expert], 128, axis=0)
        )
    want = sum(np.asarray(w) @ np.asarray(h[i].astype(jnp.float32)) for i, w in enumerate(values))
    assert compare(np.asarray(got.astype(jnp.float32)), want).rel_l2 < 2e-3
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "rows,arithmetic,changes",
    [
        (3, "w8a8", {"workers": 7, "groups": 2, "stages": 2}),
        (20, "w8a16", {"workers": 3, "groups": 1, "stages": 3}),
    ],
)
def test_several_rows(rows: int, arithmetic: str, changes: dict[str, int]) -> None:
    """One to three items an expert, items cut between blocks of threads, blocks without a tile; the shared expert or not."""
    spec = dataclasses.replace(FIVE, rows=rows, arithmetic=arithmetic)
    got, want = both(spec, several_rows(spec, **changes), with_holes)
    difference = compare(got, want)
    assert difference.rel_l2 < 1e-3, difference


@pytest.mark.usefixtures("interpreted")
def test_neither_a_row_nor_an_expert_leaks() -> None:
    """Row 1 is NaN, and an expert that only row 0 chose."""

    def poisoned(x: Any, ids: Any, w: Any, gate_up: BlockScaled, *rest: Any) -> tuple[Any, ...]:
        ids = jnp.where(ids == 3, 4, ids).at[0, 0].set(3)
        return x.at[1].set(jnp.nan), ids, w, BlockScaled(gate_up.data, gate_up.scale.at[:, 3].set(jnp.nan)), *rest

    got, want = both(FIVE, several_rows(FIVE, workers=2, groups=1, stages=2), poisoned)
    assert np.isnan(got[:2]).all() and np.isnan(want[:2]).all()
    assert np.isfinite(got[2:]).all() and compare(got[2:], want[2:]).rel_l2 < 1e-3


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
@pytest.mark.parametrize("case", CASES)
def test_plans_fit(case: str, arithmetic: str, rows: int) -> None:
    spec = dataclasses.replace(CASES[case], rows=rows, arithmetic=arithmetic)
    one, several = one_row(spec), several_rows(spec)
    assert (one is None) == (rows > 1) and (several is None) == (rows == 1)
    if one is not None:
        assert max(one.up_bytes(), one.down_bytes()) <= 221 * 1024 and one.hidden % one.down_rows == 0
        assert one.width_blocks % one.step == one.shared_blocks % one.step == 0 and 8 % one.step == 0
        assert one.terms == (2 if arithmetic == "w8a16" else 1)
    for plan in several or ():
        assert plan.smem() <= 221 * 1024 and plan.stages >= 2 and plan.folded == (rows <= 8)
        assert (
            plan.blocks % plan.step == plan.blocks % plan.piece == 0 and max(plan.table_lines, plan.order_lines) <= 256
        )


@pytest.mark.parametrize("rows", [2, 8, 64])
@pytest.mark.parametrize("case", CASES)
def test_lists_of_items_have_room(case: str, rows: int) -> None:
    """Whatever is chosen: a block of threads meets no more items than its list takes."""
    spec = dataclasses.replace(CASES[case], rows=rows)
    random = np.random.default_rng(rows)
    for spread in (1, 3, spec.experts):
        counts = np.bincount(random.integers(0, spread, spec.pairs), minlength=spec.experts)
        items = int((-(-counts // 8)).sum())
        for plan in several_rows(spec) or ():
            assert _most_met(plan, items) <= plan.items_here


def _most_met(plan: Rows, items: int) -> int:
    total = plan.shared_tiles + items * plan.tiles
    bounds = [total * n // plan.workers for n in range(plan.workers + 1)]
    routed = [max(bound - plan.shared_tiles, 0) for bound in bounds]
    shares = itertools.pairwise(routed)
    return max((b - 1) // plan.tiles - a // plan.tiles + 1 if b > a else 0 for a, b in shares)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("case", ["ep4", "tp8"])
def test_lowers_for_cuda(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of all backends lowers one row of each case; here also more, without Triton's plan."""

    def tables(spec: Spec, _: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((2, spec.experts), jnp.int32), ids.reshape(-1)

    monkeypatch.setattr(mosaic_sm90, "sorted_pairs", tables)
    spec = dataclasses.replace(CASES[case], rows=rows, layers=3, arithmetic="w8a8" if rows == 1 else "w8a16")
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    text = lowering.lower_for_cuda(functools.partial(mosaic_sm90.run, spec), *args, arch=H200)
    assert text.count("custom_call @mosaic_gpu") == (1 if case == "tp8" and rows == 8 else 2)
