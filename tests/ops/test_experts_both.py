"""The Hopper kernel with both projections of several rows, without a GPU: who does what, results in Pallas' interpreter, lowering.

The interpreter runs blocks of threads one after the other and no inline PTX: gate_up and down run as two phases there, and what
reads words and stores columns is replaced by Pallas' own loads and stores.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import arch, experts, lowering
from pallas_kernels.blocks import BLOCK, BlockScaled
from pallas_kernels.compare import compare
from pallas_kernels.experts import (
    mosaic_both_items_sm90,
    mosaic_both_sm90,
    mosaic_flags_sm90,
    mosaic_sm90,
    reference,
)
from pallas_kernels.experts.mosaic_both_plan import Both, both_of
from pallas_kernels.experts.spec import CASES, Spec, inputs, mailbox_words
from pallas_kernels.router.reference import split
from tests.ops.test_experts_mosaic import sorted_pairs, with_holes

H200 = arch.by_name("H200-141")
FIVE = Spec(5, 2, 4, 512, 256, 256, 2)


def _rows_of(ref: Any, block: Any) -> jax.Array:
    return jnp.stack([ref[min(r, ref.shape[0] - 1), block, :] for r in range(8)])


def _words_of(ref: Any, starts: Any, offsets: list[Any], epoch: Any) -> list[jax.Array]:
    return [jnp.stack([ref[pl.ds(starts[r] + offset, BLOCK)] for r in range(8)]) for offset in offsets]


def _store_columns(values: jax.Array, ref: Any, slots: Any, columns: Any, first: Any) -> None:
    for c in range(8):

        @pl.when(c < columns)
        def _(c: int = c) -> None:
            ref.at[slots[c], pl.ds(first, 64)][...] = values[:, c]


def _list_items(table: Any, here: Any, experts: int, rows: int, most: int) -> jax.Array:
    def write(item: Any, values: tuple[Any, ...]) -> None:
        for n, value in enumerate(values):
            here[3 * item + n] = jnp.int32(value)

    def end(i: int) -> Any:
        return table[i // 32, i % 32]

    write(0, (-1, 0, rows))
    pairs = count = jnp.int32(0)
    for e in range(experts):

        def one(i: Any, _: None, e: int = e, pairs: Any = pairs, count: Any = count) -> None:
            place = pairs + (i - count) * 8
            write(i + 1, (e, place, jnp.minimum(end(e) - place, 8)))

        jax.lax.fori_loop(count, jnp.minimum(end(experts + e), most - 1), one, None)
        pairs, count = end(e), end(experts + e)
    return count + 1


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in the interpreter, with races recorded, a phase at a time; the plan from numpy."""
    monkeypatch.setattr(mosaic_flags_sm90, "rows_of", _rows_of)
    monkeypatch.setattr(mosaic_flags_sm90, "words_of", _words_of)
    monkeypatch.setattr(mosaic_flags_sm90, "store_columns", _store_columns)
    monkeypatch.setattr(mosaic_both_items_sm90, "list_items", _list_items)
    monkeypatch.setattr(mosaic_both_items_sm90, "meet", plgpu.commit_smem)
    monkeypatch.setattr(mosaic_sm90, "sorted_pairs", sorted_pairs)
    params, run, build = (
        plgpu.InterpretGPUParams(detect_races=True),
        mosaic_both_sm90.run,
        mosaic_both_sm90.build,
    )
    monkeypatch.setattr(mosaic_both_sm90, "build", lambda plan: build(plan, params))

    def phases(plan: Both, places: Any, x: Any, stacks: Any, mailbox: Any, **more: Any) -> Any:
        for phase in ("up", "down"):
            parts, mailbox = run(dataclasses.replace(plan, phase=phase), places, x, stacks, mailbox, **more)
            assert not gpu_callbacks.get_races().races_found
        return parts, mailbox

    monkeypatch.setattr(mosaic_both_sm90, "run", phases)


def ready(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x quantized, and NaN in the rows that it lacks."""
    values, scales = split(x)
    lacks = jnp.arange(8) >= x.shape[0]
    return jnp.where(jnp.tile(lacks, 2)[:, None], jnp.nan, values), jnp.where(lacks, jnp.nan, scales)


def both(
    spec: Spec, plan: Both | None, change: Any = lambda *args: args, epoch: int = 3, early: bool = False
) -> tuple[Any, Any, Any]:
    """(kernel, reference) at the last layer as float32, and the mailbox. change: (x, ids, weights, *stacks) -> the same.

    early: x is quantized, and the layer known, before the launch.
    """
    assert plan is not None
    x, ids, weights, *stacks = change(*inputs(spec, jax.random.key(spec.rows))[:7])
    layer = jnp.asarray(spec.layers - 1, jnp.int32)
    box = jnp.zeros((mailbox_words(spec.rows, spec.k, spec.width, spec.shared_width),), jnp.int32)
    given: dict[str, Any] = {"layer": layer, "mailbox": box, "epoch": jnp.int32(epoch)}
    if early:
        given |= {"layer": spec.layers - 1, "quantized": ready(x)}
    got, box = mosaic_sm90.run(spec, x, ids, weights, *stacks, **given, plan=plan)
    want = reference.run(spec, x, ids, jnp.nan_to_num(weights), *stacks, layer=layer)
    got, want = (np.asarray(a.astype(jnp.float32)) for a in (got, want))
    return got, want, np.asarray(box)


# One tile of gate_up for some warpgroups and none for others, x in three pieces.
NARROW = dataclasses.replace(FIVE, hidden=384, width=128, shared_width=128)


def _one_expert(x: Any, ids: Any, *rest: Any) -> tuple[Any, ...]:
    return x, jnp.full_like(ids, 2), *rest


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "shape,rows,arithmetic,changes,change,early",
    [
        (FIVE, 3, "w8a8", {"workers": 7, "stages": 2, "step": 1}, with_holes, False),
        (FIVE, 8, "w8a16", {"workers": 1, "stages": 2}, _one_expert, False),
        (NARROW, 2, "w8a16", {"workers": 9, "stages": 2}, _one_expert, True),
        (NARROW, 7, "w8a16", {"workers": 3, "stages": 3}, with_holes, True),
    ],
)
def test_results(shape: Spec, rows: int, arithmetic: str, changes: dict[str, int], change: Any, early: bool) -> None:
    """Warpgroups with and without a tile in the last round; an expert with two items; epochs in the words of valid choices only."""
    spec = dataclasses.replace(shape, rows=rows, arithmetic=arithmetic)
    got, want, box = both(spec, both_of(spec, **changes), change, early=early)
    difference = compare(got, want)
    assert difference.rel_l2 < 1e-3, difference
    placed = np.asarray(change(*inputs(spec, jax.random.key(rows))[:7])[1]).reshape(-1)
    written = np.append((placed >= 0) & (placed < spec.experts), np.ones(rows, bool))
    np.testing.assert_array_equal(box[: written.size * spec.width] & 0xFFFF, np.repeat(3 * written, spec.width))


@pytest.mark.usefixtures("interpreted")
def test_neither_a_row_nor_an_expert_leaks() -> None:
    """Row 1 is NaN, and an expert that only row 0 chose."""

    def poisoned(x: Any, ids: Any, w: Any, gate_up: BlockScaled, *rest: Any) -> tuple[Any, ...]:
        ids = jnp.where(ids == 3, 2, ids).at[0, 0].set(3)
        return x.at[1].set(jnp.nan), ids, w, BlockScaled(gate_up.data, gate_up.scale.at[:, 3].set(jnp.nan)), *rest

    got, want, _ = both(FIVE, both_of(FIVE, workers=2, stages=2), poisoned)
    assert np.isnan(got[:2]).all() and np.isnan(want[:2]).all()
    assert np.isfinite(got[2:]).all() and compare(got[2:], want[2:]).rel_l2 < 1e-3


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("case,rows", [("tp8_57", 8), ("tp8_57", 2), ("small", 8), ("small", 3)])
def test_every_tile_is_somebodys(case: str, rows: int, groups: int) -> None:
    """Each tile of down once, one after the other, and those of gate_up in rounds."""
    plan = both_of(dataclasses.replace(CASES[case], rows=rows), groups=groups)
    assert plan is not None
    for items in range(1, plan.most_items + 1):
        dealt = [plan.dealt(items, n) for n in range(plan.all_groups)]
        ranges = [(first, first + count) for share in (0, 1) for first, count in (d[1 + share] for d in dealt)]
        assert ranges[0][0] == 0 and ranges[-1][1] == items * plan.down_tiles
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
        rounds = [d[0] for d in dealt]
        assert sum(rounds) == items * plan.up_tiles and max(rounds) <= min(rounds) + 1


@pytest.mark.parametrize(
    "rows,groups,arithmetic,early", [(8, 2, "w8a16", False), (8, 2, "w8a16", True), (2, 3, "w8a8", False)]
)
def test_lowers_for_cuda(rows: int, groups: int, arithmetic: str, early: bool) -> None:
    """One launch, the mailbox in place."""
    spec = dataclasses.replace(CASES["tp8_57"], rows=rows, layers=3, arithmetic=arithmetic)
    lists = (jnp.zeros((2, spec.experts), jnp.int32), jnp.zeros((spec.pairs,), jnp.int32))
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    run: Any = functools.partial(mosaic_sm90.run, spec, plan=both_of(spec, groups=groups))

    def call(*a: Any) -> Any:
        if early:
            return run(*a[:7], 1, None, lists, *a[10:12], quantized=ready(a[0]))
        return run(*a[:9], lists, *a[10:12])

    text = lowering.lower_for_cuda(call, *args, arch=H200)
    assert text.count("custom_call @mosaic_gpu") == 1 and text.count("output_operand_alias<") == 1


def test_which_sizes_have_a_plan() -> None:
    for case, spec in CASES.items():
        for rows in (1, 2, 8, 9):
            at = dataclasses.replace(spec, rows=rows)
            plan = both_of(at)
            assert (plan is not None) == (case in ("tp8", "tp8_57", "small") and 1 < rows < 9), (case, rows)
            words = mailbox_words(rows, spec.k, spec.width, spec.shared_width)
            assert words >= rows * (spec.k * spec.width + spec.shared_width) if plan else words == 1
            if plan is not None:
                assert plan.smem() <= 221 * 1024 and plan.stages >= 2
    # A GPU with fewer SMs has fewer blocks of threads, which all must be resident.
    assert both_of(dataclasses.replace(CASES["tp8"], rows=8), workers=114).all_groups == 228  # type: ignore[union-attr]


def test_a_mailbox_must_be_large_enough() -> None:
    spec = dataclasses.replace(CASES["small"], rows=2)
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    args = [jnp.zeros(a.shape, a.dtype) for a in args[:3]] + list(args[3:7])
    with pytest.raises(ValueError, match="mailbox of 8 words must have 3072"):
        jax.eval_shape(lambda *a: experts.mix(*a, layer=0, mailbox=jnp.zeros(8, jnp.int32)), *args)
    with pytest.raises(ValueError, match="must be int32"):
        jax.eval_shape(lambda *a: experts.mix(*a, layer=0, mailbox=jnp.zeros(4096)), *args)
