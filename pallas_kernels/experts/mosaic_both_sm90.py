"""Experts of 2 to 8 rows on Hopper in one launch, in Pallas Mosaic GPU: gate_up with SwiGLU, then down with a part a pair.

An item is an expert and those of the batch's rows that chose it; the first is the shared expert, which all rows chose. Every
warpgroup of the persistent blocks of threads has one stream of steps through one ring of TMA stages: its tiles of gate_up (32 rows
of gate and as many of up), then its tiles of down (64 rows). So weights of down are on their way while gate_up ends.

gate_up multiplies by all rows of the batch, which come quantized, a piece at a time while the first tile is multiplied, or which
every block quantizes at its start. It gives the product of the rows that the
item has as words of a mailbox (``mosaic_flags_sm90``): tiles of down wait for the words of their item, not for the launch. All
blocks are resident and no tile of gate_up waits, so that waits end. Tiles of gate_up are dealt round by round; a warpgroup without
a tile in the last round takes as many bytes more of down, of items that were complete a round before; those that the last round
completes are dealt evenly and come last.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3
from pallas_kernels.experts import mosaic_both_items_sm90 as items
from pallas_kernels.experts import mosaic_flags_sm90 as flags
from pallas_kernels.experts.mosaic_both_plan import HALF, Both
from pallas_kernels.experts.mosaic_one_sm90 import kernel_of
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT
from pallas_kernels.experts.mosaic_share_sm90 import Share
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import split

_ACC = plgpu.Layout.WGMMA
# A number in each lane, the same in all warps.
_LANES = plgpu.Layout.TILED(
    plgpu.Tiling(((HALF,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


class Worker(Share):
    """A warpgroup."""

    def __init__(self, plan: Both, refs: tuple[Any, ...], memory: dict[str, Any]) -> None:
        self.plan, inputs = plan, list(refs)
        self.layer = jnp.int32(0) if plan.sliced else inputs.pop(0)[0]
        epoch, self.table, self.order, self.x = (inputs.pop(0) for _ in range(4))
        self.x_scales = inputs.pop(0) if plan.given else None
        *self.weights, self.box, self.parts = inputs
        self.epoch = epoch[0]
        self.__dict__.update(memory)
        self.cta, self.wg = lax.axis_index("worker"), lax.axis_index("wg")
        self.number = self.wg * plan.workers + self.cta

    def compute(self) -> None:
        plan = self.plan

        @pl.when(self.wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(self.order, self.pairs, self.pairs_full)

        if plan.given:
            self.ask_x(jnp.int32(0))
            self.deal()
            self.first_steps()
            # The others are asked for by the first tile, two pieces ahead of their products.
            pl.when(self.mine > 0)(functools.partial(self.ask_x, jnp.int32(1)))
        else:
            self.quantize_x()
        plgpu.barrier_wait(self.pairs_full)
        lax.fori_loop(0, self.mine, self.up_tile, None)
        lax.fori_loop(0, self.items_a + self.items_b, self.down_item, None)
        if plan.given:
            pl.when((self.wg == 0) & (self.mine == 0))(functools.partial(self.wait_x, jnp.int32(0)))

    def quantize_x(self) -> None:
        """For all warpgroups of the block, while the first steps are copied: x is asked for before these."""
        plan = self.plan
        self.deal()
        numbers = [self.wg + plan.groups * j for j in range(plan.loads)]
        tiles = [flags.rows_of(self.x, jnp.minimum(number, plan.blocks - 1)) for number in numbers]
        self.first_steps()
        for j, (number, tile) in enumerate(zip(numbers, tiles, strict=True)):
            values = tile.astype(jnp.float32)
            if plan.groups * (j + 1) <= plan.blocks:
                self.quantize(number, values)
            else:
                pl.when(number < plan.blocks)(functools.partial(self.quantize, number, values))
        self.together()

    def together(self) -> None:
        """What all warpgroups have done before is done."""
        plgpu.commit_smem()
        if self.plan.groups > 1:
            plgpu.barrier_arrive(self.turn)
            plgpu.barrier_wait(self.turn)

    def products(self, first: Any, steps: int, x_first: Any, starts: list[Any], new_x: Any = None) -> jax.Array:
        """Sum [64, 8] of the steps from ``first`` on, times k-blocks of shared memory from ``x_first`` on. starts: of the two
        halves' scales. new_x: whether these are the first products by quantized x, a piece of which may still be on its way."""
        plan = self.plan
        second = plgpu.broadcasted_iota(jnp.int32, (TILE, UNIT), 0, layout=_ACC) >= HALF

        def step(s: Any, total: jax.Array) -> jax.Array:
            at, block = first + s, x_first + s * plan.step
            slot = lax.rem(at, jnp.int32(plan.stages))
            xs = [
                plgpu.load(self.factors.at[block + g], layout=_ACC.reduce(0), optimized=False) for g in range(plan.step)
            ]
            plgpu.barrier_wait(self.full.at[self.wg * plan.stages + slot])
            skip = [lax.rem(start + s * plan.step, jnp.int32(4)) for start in starts]
            scales = [[self.scales[self.wg, slot, m, skip[m] + g] for m in range(2)] for g in range(plan.step)]
            parts = self.multiply(slot, block)
            # All four warps are through with this slot.
            items.meet()
            following = at + plan.stages
            pl.when(following < self.all_steps)(functools.partial(self.fetch, following))
            for x, (low, high), part in zip(xs, scales, parts, strict=True):
                wide = plgpu.layout_cast(lax.broadcast_in_dim(x, (TILE, UNIT), (1,)), _ACC)
                total = total + part * (wide * jnp.where(second, high, low))
            return total

        zero = plgpu.layout_cast(jnp.zeros((TILE, UNIT), jnp.float32), _ACC)
        if steps == 1:
            return step(jnp.int32(0), zero)
        if new_x is None:
            return lax.fori_loop(0, steps, step, zero)
        per = plan.piece // plan.step

        def piece(n: Any, total: jax.Array) -> jax.Array:
            pl.when(new_x)(functools.partial(self.next_x, n))
            return lax.fori_loop(n * per, n * per + per, step, total)

        return lax.fori_loop(0, plan.blocks // plan.piece, piece, zero)

    def multiply(self, slot: Any, block: Any) -> list[jax.Array]:
        """Products [64, 8] of the blocks of a stage, a fresh accumulator each: FP8 wgmma keeps some 14 bits."""
        plan = self.plan

        def body(*accumulators: Any) -> list[jax.Array]:
            for g, acc in enumerate(accumulators):
                weights = self.ring.at[self.wg, slot, :, pl.ds(g * BLOCK, BLOCK)]
                plgpu.wgmma(acc, weights, self.x8.at[block + g].T)
            return [acc[...] for acc in accumulators]

        products = pl.run_scoped(body, *[plgpu.ACC((TILE, UNIT * plan.terms), jnp.float32)] * plan.step)
        if plan.terms == 1:
            return products
        return [product[:, :UNIT] + product[:, UNIT:] * (1 / 16) for product in products]

    def quantize(self, block: Any, tile: jax.Array) -> None:
        """[8, 128] to the columns of a k-block in shared memory, and their scales."""
        terms, scale = split(tile, self.plan.terms)
        for t, term in enumerate(terms):
            self.x8.at[block, pl.ds(UNIT * t, UNIT), :][...] = term
        self.factors.at[block][...] = scale

    # -- gate_up

    def up_tile(self, i: Any, _: None) -> None:
        plan = self.plan
        item, tile = self.up_place(i)
        expert = self.expert_of(item)
        matrix = jnp.where(expert < 0, self.layer, self.layer * plan.experts + expert) * 2
        skip = jnp.where(expert < 0, plan.skips[2], plan.skips[0])
        starts = [self.up_scale(matrix + m, tile, skip) for m in range(2)]
        new_x = i == 0 if plan.given else None
        total = self.products(i * plan.up_steps, plan.up_steps, jnp.int32(0), starts, new_x)
        self.partial.at[self.wg][...] = total
        items.meet()
        rows = self.rows_of(item)

        def one(c: int) -> None:
            slot = self.slot_of(item, c)
            row = jnp.where(expert < 0, slot - plan.pairs, lax.div(slot, jnp.int32(plan.k)))
            gate, up = (
                plgpu.load(self.partial.at[self.wg, pl.ds(m * HALF, HALF), row], layout=_LANES, optimized=False)
                for m in range(2)
            )
            product = gate / (1.0 + jnp.exp(-gate)) * up
            at = slot * plan.width + tile * HALF
            self.box.at[pl.ds(at, HALF)][...] = flags.stamped(product, self.epoch)

        for c in range(UNIT):
            pl.when(c < rows)(functools.partial(one, c))

    # -- down

    def down_item(self, number: Any, _: None) -> None:
        """All tiles that this warpgroup has of an item of one of its two shares."""
        plan, per = self.plan, self.plan.down_tiles
        early = number < self.items_a
        nth = jnp.where(early, number, number - self.items_a)
        item = nth + jnp.where(early, self.item_a, self.item_b)
        first = jnp.where(early, self.first_a, self.first_b)
        last = first + jnp.where(early, self.count_a, self.count_b)
        low, high = jnp.maximum(item * per, first), jnp.minimum(item * per + per, last)
        # Of the tile number 0: where its steps would be in the stream.
        base = jnp.where(early, -self.first_a, self.count_a - self.first_b)
        for c in range(UNIT):
            slot = self.slot_of(item, c)
            self.slots[self.wg, c] = slot
            self.starts[self.wg, c] = slot * plan.width
        items.meet()
        words = flags.words_of(
            self.box, self.starts.at[self.wg], [jnp.int32(b * BLOCK) for b in range(plan.inner)], self.epoch
        )
        x_first = plan.blocks + self.wg * plan.inner
        for b, word in enumerate(words):
            self.quantize(x_first + b, flags.value_of(word))
        plgpu.commit_smem()
        rows, expert = self.rows_of(item), self.expert_of(item)
        matrix = jnp.where(expert < 0, self.layer, self.layer * plan.experts + expert)

        skip = jnp.where(expert < 0, plan.skips[3], plan.skips[1])

        def tile(at: Any, _: None) -> None:
            start = self.down_scale(matrix, at - item * per, skip)
            step = self.up_all + (base + at) * plan.down_steps
            total = self.products(step, plan.down_steps, x_first, [start, start])
            flags.store_columns(total, self.parts, self.slots.at[self.wg], rows, (at - item * per) * TILE)

        lax.fori_loop(low, high, tile, None)
        # All four warps are through with this item's slots.
        items.meet()


def run(
    plan: Both,
    places: tuple[jax.Array | None, ...],
    x: jax.Array,
    stacks: tuple[jax.Array, ...],
    mailbox: jax.Array,
    *,
    quantized: tuple[jax.Array, jax.Array] | None = None,
    skips: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> tuple[jax.Array, jax.Array]:
    """(parts float32 [pairs + rows, hidden], mailbox). places: layer [1], epoch [1], table, order; stacks: as for ``build``.

    Without a layer the stacks have one; its scales start ``skips`` behind the start of theirs (gate_up, down, the shared two).
    quantized: e4m3 [blocks, 16, 128], terms 0 of 8 rows and then terms 1, and their scales [blocks, 8], as ``split`` makes
    them for W8A16; x is not read then.
    """
    layer, *others = places
    plan = dataclasses.replace(plan, given=quantized is not None, sliced=layer is None, skips=skips)
    if plan.given and plan.terms != 2:
        raise ValueError(f"quantized rows have two terms, the plan has {plan.terms}: give x alone")
    box = jax.new_ref(mailbox)
    rows = quantized or (x.reshape(plan.rows, -1, BLOCK),)
    (parts,) = build(plan)(*([] if layer is None else [layer]), *others, *rows, *stacks, box)
    return parts, jax.freeze(box)


@functools.lru_cache(maxsize=64)
def build(plan: Both, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(layer [1], epoch [1], table, order, x [rows, blocks, 128], gate_up [stack, width, hidden], its scales in one row, down,
    its scales, the shared four, mailbox (a Ref, written)) -> [parts float32 [pairs + rows, hidden]].

    table, order: of the Triton plan, in lines of 32. A plan that is ``sliced`` has no layer, one with x ``given`` its e4m3 and
    their scales in x's place.
    """
    tiled = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128))
    scratch = {
        "ring": plgpu.SMEM((plan.groups, plan.stages, TILE, plan.step * BLOCK), E4M3, transforms=tiled),
        "x8": plgpu.SMEM((plan.x_blocks, UNIT * plan.terms, BLOCK), E4M3, transforms=tiled),
        "scales": plgpu.SMEM((plan.groups, plan.stages, 2, LINE), jnp.float32),
        "factors": plgpu.SMEM((plan.x_blocks, UNIT), jnp.float32),
        "partial": plgpu.SMEM((plan.groups, TILE, UNIT), jnp.float32),
        "pairs": plgpu.SMEM((plan.order_lines, LINE), jnp.int32),
        "here": plgpu.SMEM((plan.groups, 3 * plan.most_items), jnp.int32),
        "slots": plgpu.SMEM((plan.groups, UNIT), jnp.int32),
        "starts": plgpu.SMEM((plan.groups, UNIT), jnp.int32),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=plan.groups * plan.stages),
        "pairs_full": plgpu.Barrier(num_arrivals=1),
        "factors_full": plgpu.Barrier(num_arrivals=1),
        "x_full": plgpu.Barrier(num_arrivals=1, num_barriers=plan.blocks // plan.piece),
        "turn": plgpu.Barrier(num_arrivals=plan.groups),
    }

    def experts_both(*refs: Any) -> None:
        inputs = 15 + plan.given - plan.sliced
        Worker(plan, refs[:inputs], dict(zip(scratch, refs[inputs:], strict=True))).compute()

    out = [jax.ShapeDtypeStruct((plan.pairs + plan.rows, plan.hidden), jnp.float32)]
    return kernel_of(experts_both, out, plan.workers, plan.groups, scratch, interpret)
