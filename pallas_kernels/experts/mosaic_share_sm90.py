"""A warpgroup of the one launch (``mosaic_both_sm90``): its share of the tiles, their items, and the copies of its steps."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts.mosaic_both_plan import HALF, Both
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT


class Share:
    """Its attributes are the worker's and its shared memory; those of ``deal`` are made here."""

    plan: Both
    layer: Any
    cta: Any
    wg: Any
    number: Any
    table: Any
    order: Any
    weights: Any
    ends: Any
    pairs: Any
    here: Any
    ring: Any
    scales: Any
    full: Any
    tables_full: Any

    def ask_tables(self) -> None:
        @pl.when(self.wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(self.table, self.ends, self.tables_full)
            plgpu.copy_gmem_to_smem(self.order, self.pairs, self.tables_full)

    def end(self, i: Any) -> Any:
        """Number i of the table: pairs up to and with each expert, then items up to and with each."""
        return self.ends[lax.div(i, jnp.int32(LINE)), lax.rem(i, jnp.int32(LINE))]

    def deal(self) -> None:
        """This warpgroup's tiles, and the items that they belong to."""
        plan, items = self.plan, 1 + self.end(jnp.int32(2 * self.plan.experts - 1))
        self.mine, *shares = plan.dealt(items, self.number, lambda a, b: lax.div(a, jnp.int32(b)), jnp.where)
        (self.first_a, self.count_a), (self.first_b, self.count_b) = shares
        if plan.phase == "up":
            self.count_a = self.count_b = jnp.int32(0)
        if plan.phase == "down":
            self.mine = jnp.int32(0)
        self.up_all = self.mine * plan.up_steps
        self.all_steps = self.up_all + (self.count_a + self.count_b) * plan.down_steps
        self.item_a, self.items_a = self.items_of(self.first_a, self.count_a)
        self.item_b, self.items_b = self.items_of(self.first_b, self.count_b)
        self.list_items()

    def items_of(self, first: Any, count: Any) -> tuple[Any, Any]:
        """(first item, number of items) of a share of down."""
        per = jnp.int32(self.plan.down_tiles)
        item = lax.div(first, per)
        return item, jnp.where(count > 0, lax.div(first + count - 1, per) - item + 1, 0)

    def list_items(self) -> None:
        """Writes the expert (-1: the shared one), the first place in the order and the number of rows of this warpgroup's items.

        All its threads write the same, each warpgroup to a list of its own.
        """
        plan, groups = self.plan, self.plan.all_groups

        def up(i: Any, _: None) -> None:
            self.list_item(i, lax.div(self.number + i * groups, jnp.int32(plan.up_tiles)))

        def down(start: int, first: Any, i: Any, _: None) -> None:
            self.list_item(start + i, first + i)

        lax.fori_loop(0, self.mine, up, None)
        a, b = plan.most_up, plan.most_up + plan.most_down_items
        lax.fori_loop(0, self.items_a, functools.partial(down, a, self.item_a), None)
        lax.fori_loop(0, self.items_b, functools.partial(down, b, self.item_b), None)
        plgpu.commit_smem()

    def list_item(self, entry: Any, number: Any) -> None:
        plan, item, low, high = self.plan, number - 1, jnp.int32(0), jnp.int32(self.plan.experts)
        # The first expert whose items end behind this one.
        for _step in range(plan.experts.bit_length()):
            middle = lax.shift_right_logical(low + high, 1)
            behind = self.end(plan.experts + jnp.minimum(middle, plan.experts - 1)) > item
            low, high = jnp.where(behind | (low >= high), low, middle + 1), jnp.where(behind, middle, high)
        before = jnp.maximum(low - 1, 0)
        items_before = jnp.where(low > 0, self.end(plan.experts + before), 0)
        place = jnp.where(low > 0, self.end(before), 0) + (item - items_before) * UNIT
        shared = number == 0
        self.here[self.wg, 3 * entry] = jnp.where(shared, -1, low)
        self.here[self.wg, 3 * entry + 1] = place
        self.here[self.wg, 3 * entry + 2] = jnp.where(shared, plan.rows, jnp.minimum(self.end(low) - place, UNIT))

    def slot_of(self, entry: Any, column: int) -> Any:
        """Slot of a row of an item: a pair by its number, a row of the shared expert by pairs + row. Columns without a row repeat
        the first."""
        plan = self.plan
        place, rows = self.here[self.wg, 3 * entry + 1], self.here[self.wg, 3 * entry + 2]
        at = jnp.where(column < rows, column, 0)
        shared = self.here[self.wg, 3 * entry] < 0
        place = jnp.where(shared, 0, place + at)
        pair = self.pairs[lax.div(place, jnp.int32(LINE)), lax.rem(place, jnp.int32(LINE))]
        return jnp.where(shared, plan.pairs + at, pair)

    def fetch(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: two halves of 32 x ``step`` 128-blocks, each with its scales."""
        plan = self.plan
        gate_up, gate_up_scale, down, down_scale, *shared = self.weights

        @pl.when(i < self.up_all)
        def _() -> None:
            number, step = lax.div(i, jnp.int32(plan.up_steps)), lax.rem(i, jnp.int32(plan.up_steps))
            tile = lax.rem(self.number + number * plan.all_groups, jnp.int32(plan.up_tiles))
            expert = self.here[self.wg, 3 * number]

            def copy(data: Any, scale: Any, matrix: Any) -> None:
                halves = [(matrix * 2 + m, tile * HALF) for m in range(2)]
                self.copy(data, scale, i, halves, step, plan.width, plan.blocks)

            pl.when(expert < 0)(lambda: copy(shared[0], shared[1], self.layer))
            pl.when(expert >= 0)(lambda: copy(gate_up, gate_up_scale, self.layer * plan.experts + expert))

        @pl.when(i >= self.up_all)
        def _() -> None:
            rest = i - self.up_all
            number, step = lax.div(rest, jnp.int32(plan.down_steps)), lax.rem(rest, jnp.int32(plan.down_steps))
            early = number < self.count_a
            at = jnp.where(early, self.first_a + number, self.first_b + number - self.count_a)
            item, tile = lax.div(at, jnp.int32(plan.down_tiles)), lax.rem(at, jnp.int32(plan.down_tiles))
            start = jnp.where(early, plan.most_up - self.item_a, plan.most_up + plan.most_down_items - self.item_b)
            expert = self.here[self.wg, 3 * (start + item)]

            def copy(data: Any, scale: Any, matrix: Any) -> None:
                halves = [(matrix, tile * TILE + m * HALF) for m in range(2)]
                self.copy(data, scale, i, halves, step, plan.hidden, plan.inner)

            pl.when(expert < 0)(lambda: copy(shared[2], shared[3], self.layer))
            pl.when(expert >= 0)(lambda: copy(down, down_scale, self.layer * plan.experts + expert))

    def copy(self, data: Any, scale: Any, i: Any, halves: list[Any], step: Any, n: int, across: int) -> None:
        """halves: (matrix, first row) of each."""
        plan, slot = self.plan, lax.rem(i, jnp.int32(self.plan.stages))
        index, width = self.wg * plan.stages + slot, plan.step * BLOCK
        starts = [self.scale_start(*half, n, across) + step * plan.step for half in halves]
        starts = [start - lax.rem(start, jnp.int32(4)) for start in starts]  # copies start at 16 bytes
        targets = [self.ring.at[self.wg, slot, pl.ds(m * HALF, HALF), :] for m in range(2)]
        for m, (matrix, row) in enumerate(halves):
            source = data.at[matrix, pl.ds(row, HALF), pl.ds(step * width, width)]
            plgpu.copy_gmem_to_smem(source, targets[m], self.full.at[index])
            line = self.scales.at[self.wg, slot, m]
            plgpu.copy_gmem_to_smem(scale.at[pl.ds(starts[m], LINE)], line, self.full.at[index])

    def scale_start(self, matrix: Any, row: Any, n: int, across: int) -> Any:
        return (matrix * (n // BLOCK) + lax.div(row, jnp.int32(BLOCK))) * across
