"""A warpgroup of the one launch (``mosaic_both_sm90``): its share of the tiles, their items, and the copies of its steps."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts import mosaic_both_items_sm90 as items
from pallas_kernels.experts.mosaic_both_plan import HALF, Both
from pallas_kernels.experts.mosaic_plan import LINE, TILE


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
    pairs: Any
    here: Any
    ring: Any
    scales: Any
    full: Any
    x: Any
    x_scales: Any
    x8: Any
    factors: Any
    x_full: Any
    factors_full: Any

    def deal(self) -> None:
        """Lists the items, and finds this warpgroup's tiles."""
        plan = self.plan
        # Each warpgroup has a list of its own: nobody waits for another one.
        count = items.list_items(self.table, self.here.at[self.wg], plan.experts, plan.rows, plan.most_items)
        items.meet()
        self.mine, *shares = plan.dealt(count, self.number, lambda a, b: lax.div(a, jnp.int32(b)), jnp.where)
        (self.first_a, self.count_a), (self.first_b, self.count_b) = shares
        if plan.phase == "up":
            self.count_a = self.count_b = jnp.int32(0)
        if plan.phase == "down":
            self.mine = jnp.int32(0)
        self.up_all = self.mine * plan.up_steps
        self.all_steps = self.up_all + (self.count_a + self.count_b) * plan.down_steps
        self.item_a, self.items_a = self.items_of(self.first_a, self.count_a)
        self.item_b, self.items_b = self.items_of(self.first_b, self.count_b)

    def first_steps(self) -> None:
        for i in range(self.plan.stages):
            pl.when(i < self.all_steps)(functools.partial(self.fetch, jnp.int32(i)))

    def items_of(self, first: Any, count: Any) -> tuple[Any, Any]:
        """(first item, number of items) of a share of down."""
        per = jnp.int32(self.plan.down_tiles)
        item = lax.div(first, per)
        return item, jnp.where(count > 0, lax.div(first + count - 1, per) - item + 1, 0)

    def up_place(self, i: Any) -> tuple[Any, Any]:
        """(item, tile of it) of this warpgroup's i-th tile of gate_up."""
        at, per = self.number + i * self.plan.all_groups, jnp.int32(self.plan.up_tiles)
        return lax.div(at, per), lax.rem(at, per)

    def expert_of(self, item: Any) -> Any:
        """-1: the shared one."""
        return self.here[self.wg, 3 * item]

    def rows_of(self, item: Any) -> Any:
        return self.here[self.wg, 3 * item + 2]

    def slot_of(self, item: Any, column: int) -> Any:
        """Slot of a row of an item: a pair by its number, a row of the shared expert by pairs + row. Columns without a row repeat
        the first."""
        plan = self.plan
        place, rows = self.here[self.wg, 3 * item + 1], self.rows_of(item)
        at = jnp.where(column < rows, column, 0)
        shared = self.expert_of(item) < 0
        place = jnp.where(shared, 0, place + at)
        pair = self.pairs[lax.div(place, jnp.int32(LINE)), lax.rem(place, jnp.int32(LINE))]
        return jnp.where(shared, plan.pairs + at, pair)

    def ask_x(self, n: Any) -> None:
        """Starts the copy of the n-th piece of quantized x, if there is one, with the first that of all scales: one warpgroup."""
        plan = self.plan

        @pl.when((self.wg == 0) & (n * plan.piece < plan.blocks))
        def _() -> None:
            place = pl.ds(n * plan.piece, plan.piece)
            plgpu.copy_gmem_to_smem(self.x.at[place], self.x8.at[place], self.x_full.at[n])

        @pl.when((self.wg == 0) & (n == 0))
        def _() -> None:
            plgpu.copy_gmem_to_smem(self.x_scales, self.factors.at[pl.ds(0, plan.blocks)], self.factors_full)

    def wait_x(self, n: Any) -> None:
        pl.when(n == 0)(lambda: plgpu.barrier_wait(self.factors_full))
        plgpu.barrier_wait(self.x_full.at[n])

    def next_x(self, n: Any) -> None:
        self.ask_x(n + 2)
        self.wait_x(n)

    def fetch(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: two halves of 32 x ``step`` 128-blocks, each with its scales."""
        plan = self.plan
        gate_up, gate_up_scale, down, down_scale, *shared = self.weights

        @pl.when(i < self.up_all)
        def _() -> None:
            number, step = lax.div(i, jnp.int32(plan.up_steps)), lax.rem(i, jnp.int32(plan.up_steps))
            item, tile = self.up_place(number)
            expert = self.expert_of(item)

            def copy(data: Any, scale: Any, matrix: Any, skip: int) -> None:
                starts = [self.up_scale(matrix * 2 + m, tile, skip) for m in range(2)]
                self.copy(data, scale, i, [(matrix * 2 + m, tile * HALF) for m in range(2)], step, starts)

            pl.when(expert < 0)(lambda: copy(shared[0], shared[1], self.layer, plan.skips[2]))
            pl.when(expert >= 0)(
                lambda: copy(gate_up, gate_up_scale, self.layer * plan.experts + expert, plan.skips[0])
            )

        @pl.when(i >= self.up_all)
        def _() -> None:
            rest = i - self.up_all
            number, step = lax.div(rest, jnp.int32(plan.down_steps)), lax.rem(rest, jnp.int32(plan.down_steps))
            early = number < self.count_a
            at = jnp.where(early, self.first_a + number, self.first_b + number - self.count_a)
            item, tile = lax.div(at, jnp.int32(plan.down_tiles)), lax.rem(at, jnp.int32(plan.down_tiles))
            expert = self.expert_of(item)

            def copy(data: Any, scale: Any, matrix: Any, skip: int) -> None:
                starts = [self.down_scale(matrix, tile, skip)] * 2
                self.copy(data, scale, i, [(matrix, tile * TILE + m * HALF) for m in range(2)], step, starts)

            pl.when(expert < 0)(lambda: copy(shared[2], shared[3], self.layer, plan.skips[3]))
            pl.when(expert >= 0)(lambda: copy(down, down_scale, self.layer * plan.experts + expert, plan.skips[1]))

    def copy(self, data: Any, scale: Any, i: Any, halves: list[Any], step: Any, starts: list[Any]) -> None:
        """halves: (matrix, first row) of each; starts: of their scales."""
        plan, slot = self.plan, lax.rem(i, jnp.int32(self.plan.stages))
        index, width = self.wg * plan.stages + slot, plan.step * BLOCK
        starts = [start + step * plan.step for start in starts]
        starts = [start - lax.rem(start, jnp.int32(4)) for start in starts]  # copies start at 16 bytes
        targets = [self.ring.at[self.wg, slot, pl.ds(m * HALF, HALF), :] for m in range(2)]
        for m, (matrix, row) in enumerate(halves):
            source = data.at[matrix, pl.ds(row, HALF), pl.ds(step * width, width)]
            plgpu.copy_gmem_to_smem(source, targets[m], self.full.at[index])
            line = self.scales.at[self.wg, slot, m]
            plgpu.copy_gmem_to_smem(scale.at[pl.ds(starts[m], LINE)], line, self.full.at[index])

    def up_scale(self, matrix: Any, tile: Any, skip: Any) -> Any:
        """Where the scales of a half of a tile of gate_up start."""
        plan = self.plan
        row = lax.div(tile * HALF, jnp.int32(BLOCK))
        return skip + (matrix * (plan.width // BLOCK) + row) * plan.blocks

    def down_scale(self, matrix: Any, tile: Any, skip: Any) -> Any:
        plan = self.plan
        row = lax.div(tile * TILE, jnp.int32(BLOCK))
        return skip + (matrix * (plan.hidden // BLOCK) + row) * plan.inner
