"""Experts of 2 to 64 rows on Hopper, in Pallas Mosaic GPU: one kernel for gate_up with SwiGLU and for down.

An item is an expert and up to eight of its rows, which are the columns of wgmma (twice as many in W8A16: x/s = hi + lo/16); weights
are its 64 rows. The tiles of all items are dealt out in equal, connected shares to one block of threads an SM. It gathers and
quantizes the rows of an item once and keeps them in shared memory while the weights of all its tiles there stream past. Up to
eight rows of gate_up need no gathering: the columns are all rows of the batch, for every item and for the shared expert, and a tile
stores those that the item has. Then warpgroups run through their tiles on their own.

What lies between the launches is indexed by slot: a pair (row, choice) by its number, a row of the shared expert by pairs + row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT, Rows
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS, split

_ACC = plgpu.Layout.WGMMA


class Worker:
    """A warpgroup: every ``groups``-th tile of the share of its block of threads."""

    def __init__(self, plan: Rows, refs: tuple[Any, ...], memory: dict[str, Any]) -> None:
        self.plan = plan
        layer, self.table, self.order, self.rows, self.shared_rows, *self.weights = refs
        self.layer = layer[0]
        *self.weights, self.out, self.shared_out = self.weights
        self.__dict__.update(memory)
        self.cta, self.wg = lax.axis_index("worker"), lax.axis_index("wg")

    def compute(self) -> None:
        plan = self.plan
        self.copy_tables()
        tiles = plan.shared_tiles + self.end(2 * plan.experts - 1) * plan.tiles
        self.first = lax.div(self.cta * tiles, plan.workers)
        count = lax.div((self.cta + 1) * tiles, plan.workers) - self.first
        # Tiles of this block that are the shared expert's: they come first. The others are numbered from ``start`` on.
        self.shared_count = jnp.clip(plan.shared_tiles - self.first, 0, count)
        self.start = self.first + self.shared_count - plan.shared_tiles
        self.shared_mine = self.mine(self.shared_count)
        shared_steps = self.shared_mine * plan.shared_steps
        self.all_steps = shared_steps + (self.mine(count) - self.shared_mine) * plan.steps
        items = self.list_items(count - self.shared_count)
        for i in range(plan.stages):
            pl.when(i < self.all_steps)(functools.partial(self.fetch, jnp.int32(i)))
        if plan.common:
            pl.when(count > 0)(functools.partial(self.all_rows, count))
            return
        if plan.shared_tiles:
            pl.when(self.shared_count > 0)(functools.partial(self.item, True, 0, jnp.int32(0), self.shared_count))

        def item(entry: Any, _: None) -> None:
            low = (self.first_item + entry) * plan.tiles - self.start
            high = jnp.minimum(low + plan.tiles + self.shared_count, count)
            self.item(False, entry, jnp.maximum(low, 0) + self.shared_count, high)

        lax.fori_loop(0, items, item, None)

    def all_rows(self, count: Any) -> None:
        """All tiles of this warpgroup, where every item has the same columns."""
        self.gather(True, 0)
        self.together()
        lax.fori_loop(0, self.shared_mine, functools.partial(self.tile, True, 0), None)

        def routed(i: Any, _: None) -> None:
            tile = self.start + self.wg + i * self.plan.groups - self.shared_count
            self.tile(False, lax.div(tile, self.plan.tiles) - self.first_item, i, None)

        lax.fori_loop(self.shared_mine, self.mine(count), routed, None)

    def mine(self, number: Any) -> Any:
        """Tiles of this warpgroup before the tile with that number in the block's share."""
        return lax.div(jnp.maximum(number - self.wg + self.plan.groups - 1, 0), jnp.int32(self.plan.groups))

    def item(self, shared: bool, entry: Any, low: Any, high: Any) -> None:
        """The tiles of an item, which have the numbers from low to high."""
        self.together()
        self.gather(shared, entry)
        self.together()
        lax.fori_loop(self.mine(low), self.mine(high), functools.partial(self.tile, shared, entry), None)

    def together(self) -> None:
        """What all warpgroups have done before is done."""
        plgpu.commit_smem()
        if self.plan.groups > 1:
            plgpu.barrier_arrive(self.turn)
            plgpu.barrier_wait(self.turn)

    def copy_tables(self) -> None:
        """Of the plan, to shared memory."""

        @pl.when(self.wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(self.table, self.ends, self.tables_full)
            plgpu.copy_gmem_to_smem(self.order, self.pairs, self.tables_full)

        plgpu.barrier_wait(self.tables_full)

    def end(self, i: Any) -> Any:
        """Number i of the table: pairs up to and with each expert, then items up to and with each."""
        return self.ends[lax.div(i, LINE), lax.rem(i, LINE)]

    def list_items(self, routed: Any) -> Any:
        """Writes the expert, the first place in the order and the number of rows of the items of the share's routed tiles; returns
        how many items they are. Every warpgroup has a list of its own."""
        plan = self.plan
        self.first_item = lax.div(jnp.maximum(self.start, 0), plan.tiles)
        items = jnp.where(routed > 0, lax.div(self.start + routed - 1, plan.tiles) - self.first_item + 1, 0)

        def one(n: Any, _: None) -> None:
            item, low, high = self.first_item + n, jnp.int32(0), jnp.int32(plan.experts)
            # The first expert whose items end behind this one.
            for _step in range(plan.experts.bit_length()):
                middle = lax.div(low + high, 2)
                behind = self.end(plan.experts + jnp.minimum(middle, plan.experts - 1)) > item
                low, high = jnp.where(behind | (low >= high), low, middle + 1), jnp.where(behind, middle, high)
            before = jnp.maximum(low - 1, 0)
            items_before = jnp.where(low > 0, self.end(plan.experts + before), 0)
            place = jnp.where(low > 0, self.end(before), 0) + (item - items_before) * UNIT
            self.here[self.wg, 3 * n] = low
            self.here[self.wg, 3 * n + 1] = place
            self.here[self.wg, 3 * n + 2] = jnp.minimum(self.end(low) - place, UNIT)

        lax.fori_loop(0, items, one, None)
        plgpu.commit_smem()
        return items

    def fetch(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: ``step`` neighbouring 64 x 128 blocks of every matrix of a tile."""
        plan, slot = self.plan, lax.rem(i, self.plan.stages)
        barrier = self.full.at[self.wg * plan.stages + slot]

        def copy(data: Any, scale: Any, matrix: Any, tile: Any, step: Any, n: int, across: int) -> None:
            width = plan.step * BLOCK
            for m in range(plan.mats):
                at = matrix * plan.mats + m
                source = data.at[at, pl.ds(tile * TILE, TILE), pl.ds(step * width, width)]
                plgpu.copy_gmem_to_smem(source, self.ring.at[self.wg, slot, m], barrier)
                start = self.scale_start(at, tile, n, across) + step * plan.step
                start = start - lax.rem(start, 4)  # copies start at 16 bytes
                plgpu.copy_gmem_to_smem(scale.at[pl.ds(start, LINE)], self.scales.at[self.wg, slot, m], barrier)

        data, scale, shared, shared_scale = self.weights
        shared_steps = self.shared_mine * plan.shared_steps

        def routed() -> None:
            rest = i - shared_steps
            number = self.wg + (self.shared_mine + lax.div(rest, plan.steps)) * plan.groups
            tile = self.start + number - self.shared_count
            item, step = lax.div(tile, plan.tiles), lax.rem(rest, plan.steps)
            matrix = self.layer * plan.experts + self.here[self.wg, 3 * (item - self.first_item)]
            copy(data, scale, matrix, lax.rem(tile, plan.tiles), step, plan.n, plan.blocks)

        def common() -> None:
            number, step = self.wg + lax.div(i, plan.shared_steps) * plan.groups, lax.rem(i, plan.shared_steps)
            tile = self.first + number
            copy(shared, shared_scale, self.layer, tile, step, plan.shared_n, plan.shared_blocks)

        if plan.shared_tiles:
            pl.when(i < shared_steps)(common)
        pl.when(i >= shared_steps)(routed)

    def scale_start(self, matrix: Any, tile: Any, n: int, across: int) -> Any:
        return (matrix * (n // BLOCK) + lax.div(tile * TILE, BLOCK)) * across

    def slot_of(self, shared: bool, entry: Any, column: int) -> Any:
        """Slot of a column; columns without a row repeat the first."""
        if shared:
            return self.plan.pairs + min(column, self.plan.rows - 1)
        place, rows = self.here[self.wg, 3 * entry + 1], self.here[self.wg, 3 * entry + 2]
        place = place + jnp.where(column < rows, column, 0)
        return self.pairs[lax.div(place, LINE), lax.rem(place, LINE)]

    def gather(self, shared: bool, entry: Any) -> None:
        """The rows of an item to e4m3 in ``x8`` and their scales in ``factors``, ``piece`` k-blocks at a time."""
        plan = self.plan
        slots = [self.slot_of(shared, entry, c) for c in range(UNIT)]
        if shared:
            source, rows = self.shared_rows, [slot - plan.pairs for slot in slots]
        else:
            source, rows = self.rows, [lax.div(slot, plan.rows_from) for slot in slots]
        blocks = plan.shared_blocks if shared else plan.blocks
        # Every ``groups``-th piece is this warpgroup's.
        pieces = self.mine(jnp.int32(blocks // plan.piece))

        def block_of(p: Any) -> Any:
            return (self.wg + p * plan.groups) * plan.piece

        def ask(p: Any) -> None:
            buffer = self.wg * 2 + lax.rem(p, 2)
            for c, row in enumerate(rows):
                part = source.at[row, pl.ds(block_of(p), plan.piece), :]
                plgpu.copy_gmem_to_smem(part, self.staging.at[buffer, c], self.x_full.at[buffer])

        def quantize(p: Any, _: None) -> None:
            buffer = self.wg * 2 + lax.rem(p, 2)
            plgpu.barrier_wait(self.x_full.at[buffer])
            parts = [self.staging.at[buffer, :, b, :] for b in range(plan.piece)]
            tiles = [plgpu.load(part, layout=GROUPS, optimized=False) for part in parts]
            plgpu.commit_smem()
            pl.when(p + 2 < pieces)(functools.partial(ask, p + 2))
            for b, tile in enumerate(tiles):
                terms, scale = split(tile.astype(jnp.float32), plan.terms)
                for t, term in enumerate(terms):
                    self.x8.at[block_of(p) + b, pl.ds(UNIT * t, UNIT), :][...] = term
                self.factors.at[block_of(p) + b][...] = scale

        for p in range(2):
            pl.when(p < pieces)(functools.partial(ask, jnp.int32(p)))
        lax.fori_loop(0, pieces, quantize, None)

    def tile(self, shared: bool, entry: Any, i: Any, _: None) -> None:
        """All steps of this warpgroup's i-th tile, one of the item that is in shared memory."""
        plan, number = self.plan, self.wg + i * self.plan.groups
        if shared:
            tile, matrix, before = self.first + number, self.layer, i * plan.shared_steps
            steps, n, across = plan.shared_steps, plan.shared_n, plan.shared_blocks
        else:
            tile = lax.rem(self.start + number - self.shared_count, plan.tiles)
            matrix = self.layer * plan.experts + self.here[self.wg, 3 * entry]
            before = self.shared_mine * plan.shared_steps + (i - self.shared_mine) * plan.steps
            steps, n, across = plan.steps, plan.n, plan.blocks
        starts = [self.scale_start(matrix * plan.mats + m, tile, n, across) for m in range(plan.mats)]

        def step(s: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at = before + s
            slot = lax.rem(at, plan.stages)
            plgpu.barrier_wait(self.full.at[self.wg * plan.stages + slot])
            factors = []
            for g in range(plan.step):
                block = s * plan.step + g
                factor = plgpu.load(self.factors.at[block], layout=_ACC.reduce(0), optimized=False)
                for m in range(plan.mats):
                    skip = lax.rem(starts[m] + s * plan.step, 4)
                    factors.append(factor * self.scales[self.wg, slot, m, skip + g])
            products = self.multiply(slot, s * plan.step, plan.step)
            # All four warps are through with this slot.
            plgpu.commit_smem()
            following = at + plan.stages
            pl.when(following < self.all_steps)(functools.partial(self.fetch, following))
            sums = list(totals)
            for j, (product, factor) in enumerate(zip(products, factors, strict=True)):
                wide = plgpu.layout_cast(lax.broadcast_in_dim(factor, (TILE, UNIT), (1,)), _ACC)
                sums[j % plan.mats] = sums[j % plan.mats] + product * wide
            return tuple(sums)

        zero = plgpu.layout_cast(jnp.zeros((TILE, UNIT), jnp.float32), _ACC)
        sums = lax.fori_loop(0, steps, step, (zero,) * plan.mats)
        self.store(shared, entry, tile, sums)

    def multiply(self, slot: Any, block: Any, step: int) -> list[jax.Array]:
        """Products [64, 8] of the blocks of a stage, a fresh accumulator each: FP8 wgmma keeps some 14 bits."""
        plan = self.plan

        def body(*accumulators: Any) -> list[jax.Array]:
            for j, acc in enumerate(accumulators):
                g, m = j // plan.mats, j % plan.mats
                weights = self.ring.at[self.wg, slot, m, :, pl.ds(g * BLOCK, BLOCK)]
                plgpu.wgmma(acc, weights, self.x8.at[block + g].T)
            return [acc[...] for acc in accumulators]

        kinds = [plgpu.ACC((TILE, UNIT * plan.terms), jnp.float32)] * (step * plan.mats)
        products = pl.run_scoped(body, *kinds)
        if plan.terms == 1:
            return products
        return [product[:, :UNIT] + product[:, UNIT:] * (1 / 16) for product in products]

    def store(self, shared: bool, entry: Any, tile: Any, sums: tuple[jax.Array, ...]) -> None:
        """64 outputs of each row of the item."""
        plan, y = self.plan, sums[0]
        if plan.mats == 2:
            y = y / (1.0 + jnp.exp(-y)) * sums[1]
        self.partial.at[self.wg][...] = y
        plgpu.commit_smem()
        rows = min(plan.rows, UNIT) if shared else self.here[self.wg, 3 * entry + 2]
        out = self.shared_out if shared else self.out

        def one(c: int) -> None:
            slot = self.slot_of(shared, entry, c) - (plan.pairs if shared else 0)
            at = lax.div(slot, plan.rows_from) if plan.common and not shared else c
            column = plgpu.load(self.partial.at[self.wg, :, at], layout=_ACC.reduce(1), optimized=False)
            out.at[slot, pl.ds(tile * TILE, TILE)][...] = column.astype(out.dtype)

        for c in range(UNIT):
            if not isinstance(rows, int):
                pl.when(c < rows)(functools.partial(one, c))
            elif c < rows:
                one(c)
