"""FP8 block-scaled linear layers for 1 to 64 rows on Hopper, in Pallas Mosaic GPU.

One block of threads owns 64 output rows (gate and up rows for SwiGLU) and all of k, so nothing is reduced across blocks. Weights
are the 64-row operand of e4m3 x e4m3 wgmma and the tokens its columns. Each warpgroup walks its own share of k through its own
ring of TMA stages, quantizes its own part of x one step ahead, and promotes every 128-wide product to float32 with both scales.
The partial sums of the warpgroups are added in a fixed order: the result is bitwise reproducible.

The columns of one wgmma (8 at least) are used up as follows.
  * one row: the columns are 8 consecutive k-blocks of x. A weight block is multiplied by all of them and a zero in the scale
    vector drops the products that do not belong together; the sum over the columns is the dot product.
  * W8A16: x is split exactly into e4m3 terms, x/s = hi + lo/16, that take a column each. hi carries 4 bits of the significand and
    lo the other 4 of bfloat16's 8: exact for elements above 2^-14 of their group's largest, and to 2^-22 of it below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3, E4M3_MAX, BlockScaled
from pallas_kernels.fp8_linear.plan import TILE, Plan, plan_for
from pallas_kernels.fp8_linear.spec import Spec

# [rows, 128] with a row in 16 lanes of 8 neighbouring elements: the maximum of a row stays in registers and shuffles.
_GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_ACC = plgpu.Layout.WGMMA


def run(
    spec: Spec, x: jax.Array, weights: tuple[BlockScaled, ...], index: tuple[Any, ...], after: Any = None
) -> tuple[jax.Array, ...]:
    """Outputs [..., n] of every weight, as ``fp8_linear`` describes them. ``after``: an array that must be ready before."""
    plan = plan_for(spec)
    assert plan is not None, spec
    flat = x.reshape(spec.rows, spec.k)
    if plan.x_rows != spec.rows:
        flat = jnp.pad(flat, ((0, plan.x_rows - spec.rows), (0, 0)))
    layer = _layer(weights[0].data.shape[: len(index)], index)
    operands: list[jax.Array] = []
    for w, n in zip(weights, spec.ns, strict=True):
        scale = w.scale.reshape(-1)
        short = plan.scale_slots - scale.shape[0]
        operands += [w.data.reshape(-1, n, spec.k), jnp.pad(scale, (0, short)) if short > 0 else scale]
    call = build(plan, jnp.dtype(spec.out_dtype).name)
    outs = call(layer, flat.reshape(plan.x_rows, plan.blocks, BLOCK), *operands, layer if after is None else after)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)


def _layer(stack: tuple[int, ...], index: tuple[Any, ...]) -> jax.Array:
    """The position in the flattened stack, int32 [1] in device memory: a runtime value, so that all layers share one kernel."""
    flat: Any = 0
    for size, i in zip(stack, index, strict=True):
        flat = flat * size + i
    return jnp.asarray(flat, jnp.int32).reshape(1)


@functools.lru_cache(maxsize=256)
def build(plan: Plan, out_dtype: str, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """The kernel of a plan: call(layer [1], x [x_rows, blocks, 128], (data [stack, n, k], scale [...]) per weight, after)."""
    count, mats = len(plan.ns), plan.mats

    def fp8_linear(layer_ref: Any, x: Any, *refs: Any) -> None:
        arrays, outs, scratch = refs[: 2 * count], refs[2 * count + 1 : 3 * count + 1], refs[3 * count + 1 :]
        cta = lax.axis_index("tile")
        layer, first = layer_ref[0], 0
        for j, n in enumerate(plan.ns):
            tile = _Tile(plan, n, layer, cta - first, x, arrays[2 * j], arrays[2 * j + 1], outs[j], scratch)
            if count == 1:
                tile.compute()
            else:
                pl.when((cta >= first) & (cta < first + n // TILE))(tile.compute)
            first += n // TILE

    tiled = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    groups, stages, steps = plan.warpgroups, plan.stages, plan.step
    scratch = (
        plgpu.SMEM((groups, stages, mats, TILE, steps * BLOCK), E4M3, transforms=tiled),
        plgpu.SMEM((groups, plan.x_slots, plan.atoms, plan.columns, BLOCK), jnp.bfloat16),
        plgpu.SMEM((mats, plan.scale_slots), jnp.float32),
        plgpu.SMEM((groups, 2, plan.atoms, plan.n, BLOCK), E4M3, transforms=tiled),
        plgpu.SMEM((groups, 2, plan.unit, plan.n), jnp.float32),
        plgpu.SMEM((groups, mats, TILE, 1 if plan.one_row else plan.n), jnp.float32),
        plgpu.Barrier(num_arrivals=mats, num_barriers=groups * stages),
        plgpu.Barrier(num_arrivals=plan.atoms, num_barriers=groups * plan.x_slots),
        plgpu.Barrier(num_arrivals=mats),
        plgpu.Barrier(num_arrivals=groups),
    )
    return plgpu.kernel(
        fp8_linear,
        out_type=[jax.ShapeDtypeStruct((plan.rows, n), jnp.dtype(out_dtype)) for n in plan.ns],
        grid=(plan.tiles,),
        grid_names=("tile",),
        num_threads=groups,
        thread_name="wg",
        scratch_types=scratch,
        # Every shared buffer here is ordered by hand; the automatic barriers cost a third of the time of a step.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )


def _split(v: jax.Array, terms: int) -> tuple[list[jax.Array], jax.Array]:
    """v [rows, 128] as scale * sum of terms[t] / 16^t, e4m3; the scale [rows] of term 0."""
    amax = jnp.max(jnp.abs(v), axis=1)
    if terms == 1:
        # XLA turns the reference's division by 448 into this product too.
        scale = jnp.maximum(amax, 1e-10) * (1 / E4M3_MAX)
        inverse = _reciprocal(scale)
    else:
        # A power of two, so that the split is exact; amax / scale is in (224, 448].
        bits = lax.bitcast_convert_type(jnp.maximum(amax, 2.0**-100) * (1 / E4M3_MAX), jnp.int32)
        bits = (bits + 0x7FFFFF) & 0x7F800000
        scale = lax.bitcast_convert_type(bits, jnp.float32)
        inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    q = v * plgpu.layout_cast(lax.broadcast_in_dim(inverse, v.shape, (0,)), _GROUPS)
    parts = []
    for t in range(terms):
        parts.append(q.astype(E4M3))
        if t + 1 < terms:
            q = (q - parts[-1].astype(jnp.float32)) * 16.0
    return parts, scale


def _reciprocal(s: jax.Array) -> jax.Array:
    """1 / s to an ulp or better, without the branch of a division."""
    root = lax.rsqrt(s)
    guess = root * root

    def upper(a: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int32) & -4096, jnp.float32)

    high, guess_high = upper(s), upper(guess)
    low, guess_low = s - high, guess - guess_high
    # 1 - s * guess, from exact products of halves.
    rest = ((1.0 - high * guess_high) - high * guess_low) - low * guess_high - low * guess_low
    return guess + guess * rest


class _Tile:
    """The work of one block of threads, traced by every warpgroup: 64 output rows of one weight."""

    def __init__(
        self, plan: Plan, n: int, layer: Any, tile: Any, x: Any, w: Any, scale: Any, out: Any, scratch: tuple[Any, ...]
    ) -> None:
        self.plan, self.layer, self.tile = plan, layer, tile
        self.x, self.w, self.scale, self.out = x, w, scale, out
        (self.ring, self.xbuf, self.scales, self.x8, self.factors, self.partial) = scratch[:6]
        (self.full, self.x_full, self.scales_full, self.done) = scratch[6:]
        self.row_blocks = -(-n // BLOCK)
        self.wg = lax.axis_index("wg")
        spread = plan.units // plan.warpgroups
        even = plan.units % plan.warpgroups == 0
        # Units of k that this warpgroup walks: wg, wg + warpgroups, ...
        self.units = spread if even else (plan.units - self.wg + plan.warpgroups - 1) // plan.warpgroups
        self.most_units = spread if even else spread + 1

    def compute(self) -> None:
        plan = self.plan
        for j in range(min(plan.x_slots, self.most_units)):
            self._when(j < self.units, functools.partial(self.fetch_x, jnp.int32(j)))
        pl.when(self.wg == 0)(self.fetch_scales)
        for i in range(min(plan.stages, self.most_units * plan.steps_per_unit)):
            self._when(i // plan.steps_per_unit < self.units, functools.partial(self.fetch_w, jnp.int32(i)))
        self._when(self.units > 0, functools.partial(self.quantize, jnp.int32(0)))
        plgpu.commit_smem()
        self._when(plan.x_slots < self.units, functools.partial(self.fetch_x, jnp.int32(plan.x_slots)))
        plgpu.barrier_wait(self.scales_full)
        zero = plgpu.layout_cast(jnp.zeros((TILE, plan.n), jnp.float32), _ACC)
        totals = lax.fori_loop(0, self.units, self.unit, (zero,) * plan.mats)
        self.store_partial(totals)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)
        for row in range(plan.rows):
            pl.when(self.wg == row % plan.warpgroups)(functools.partial(self.finish, row))

    @staticmethod
    def _when(condition: Any, action: Callable[[], None]) -> None:
        if isinstance(condition, bool):
            if condition:
                action()
        else:
            pl.when(condition)(action)

    def fetch_w(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: ``plan.step`` neighbouring 64 x 128 blocks of every matrix."""
        plan = self.plan
        unit = lax.div(i, plan.steps_per_unit) * plan.warpgroups + self.wg
        block = unit * plan.unit + lax.rem(i, plan.steps_per_unit) * plan.step
        slot = lax.rem(i, plan.stages)
        for m in range(plan.mats):
            columns = pl.ds(block * BLOCK, plan.step * BLOCK)
            source = self.w.at[self.layer * plan.mats + m, pl.ds(self.tile * TILE, TILE), columns]
            barrier = self.full.at[self.wg * plan.stages + slot]
            plgpu.copy_gmem_to_smem(source, self.ring.at[self.wg, slot, m], barrier)

    def fetch_x(self, iu: Any) -> None:
        plan = self.plan
        unit, slot = iu * plan.warpgroups + self.wg, lax.rem(iu, plan.x_slots)
        barrier = self.x_full.at[self.wg * plan.x_slots + slot]
        for a in range(plan.atoms):
            source = (
                self.x.at[0, pl.ds(unit * plan.unit, 8), :] if plan.one_row else self.x.at[:, unit * plan.unit + a, :]
            )
            plgpu.copy_gmem_to_smem(source, self.xbuf.at[self.wg, slot, a], barrier)

    def fetch_scales(self) -> None:
        """The scales of this row of blocks, and a few of the next: whole 128 bytes are copied."""
        plan = self.plan
        for m in range(plan.mats):
            row = (self.layer * plan.mats + m) * self.row_blocks + self.tile // (BLOCK // TILE)
            source = self.scale.at[pl.ds(row * plan.blocks, plan.scale_slots)]
            plgpu.copy_gmem_to_smem(source, self.scales.at[m], self.scales_full)

    def quantize(self, iu: Any) -> None:
        """x of one unit of k to e4m3 terms in ``x8``, its scales in ``factors``."""
        plan, wg = self.plan, self.wg
        slot, buffer = lax.rem(iu, plan.x_slots), lax.rem(iu, 2)
        columns = plan.columns
        plgpu.barrier_wait(self.x_full.at[wg * plan.x_slots + slot])
        column = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=_GROUPS.reduce(1))
        # All loads come before all stores, and nothing branches: the chains of the tiles overlap.
        tiles = [plgpu.load(self.xbuf.at[wg, slot, a], layout=_GROUPS, optimized=False) for a in range(plan.atoms)]
        terms, scales = zip(*(_split(tile.astype(jnp.float32), plan.terms) for tile in tiles), strict=True)
        for a in range(plan.atoms):
            for t, term in enumerate(terms[a]):
                self.x8.at[wg, buffer, a, pl.ds(columns * t, columns), :][...] = term
                term_scale = scales[a] * 16.0**-t
                for p in range(plan.unit) if plan.one_row else (a,):
                    value = jnp.where(column == p, term_scale, 0.0) if plan.one_row else term_scale
                    self.factors.at[wg, buffer, p, pl.ds(columns * t, columns)][...] = value

    def unit(self, iu: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """All steps of one unit of k; x of the next unit is quantized in the first."""
        plan, wg, buffer = self.plan, self.wg, lax.rem(iu, 2)
        sums = list(totals)
        for s in range(plan.steps_per_unit):
            i = iu * plan.steps_per_unit + s
            slot = lax.rem(i, plan.stages)
            # Read before the barrier below: the next but one unit overwrites them.
            block = (iu * plan.warpgroups + wg) * plan.unit + s * plan.step
            factors = []
            for g in range(plan.step):
                at = self.factors.at[wg, buffer, s * plan.step + g]
                factor = plgpu.load(at, layout=_ACC.reduce(0), optimized=False)
                factors += [factor * self.scales[m, block + g] for m in range(plan.mats)]
            if s == 0:
                pl.when(iu + 1 < self.units)(functools.partial(self.quantize, iu + 1))
            plgpu.barrier_wait(self.full.at[wg * plan.stages + slot])
            products = self.multiply(slot, buffer, s)
            # Orders x8 for wgmma, and says that all four warps are through with this slot.
            plgpu.commit_smem()
            following = i + plan.stages
            pl.when(following < self.units * plan.steps_per_unit)(functools.partial(self.fetch_w, following))
            if s == 0:
                more = iu + 1 + plan.x_slots
                pl.when(more < self.units)(functools.partial(self.fetch_x, more))
            for j, (product, factor) in enumerate(zip(products, factors, strict=True)):
                wide = plgpu.layout_cast(lax.broadcast_in_dim(factor, (TILE, plan.n), (1,)), _ACC)
                sums[j % plan.mats] = sums[j % plan.mats] + product * wide
        return tuple(sums)

    def multiply(self, slot: Any, buffer: Any, s: int) -> tuple[jax.Array, ...]:
        """Products of a stage, one fresh accumulator per block: Hopper's FP8 wgmma accumulates in some 14 bits."""
        plan = self.plan

        def body(*accumulators: Any) -> tuple[jax.Array, ...]:
            for j, acc in enumerate(accumulators):
                g, m = divmod(j, plan.mats)
                atom = 0 if plan.one_row else s * plan.step + g
                block = self.ring.at[self.wg, slot, m, :, pl.ds(g * BLOCK, BLOCK)]
                plgpu.wgmma(acc, block, self.x8.at[self.wg, buffer, atom].T)
            return tuple(acc[...] for acc in accumulators)

        kinds = [plgpu.ACC((TILE, plan.n), jnp.float32)] * (plan.step * plan.mats)
        return pl.run_scoped(body, *kinds)

    def store_partial(self, totals: tuple[jax.Array, ...]) -> None:
        plan = self.plan
        for m in range(plan.mats):
            if plan.one_row:
                self.partial.at[self.wg, m, :, 0][...] = jnp.sum(totals[m], axis=1)
            else:
                self.partial.at[self.wg, m][...] = totals[m]

    def finish(self, row: int) -> None:
        """Adds the warpgroups' sums in order and stores 64 outputs of one row of x."""
        plan = self.plan
        values = []
        for m in range(plan.mats):
            parts = [
                plgpu.load(self.partial.at[g, m, :, row + t * plan.columns], layout=_ACC.reduce(1), optimized=False)
                for g in range(plan.warpgroups)
                for t in range(1 if plan.one_row else plan.terms)
            ]
            values.append(functools.reduce(lambda a, b: a + b, parts))
        y = values[0]
        if plan.mats == 2:
            y = y / (1.0 + jnp.exp(-y)) * values[1]
        self.out.at[row, pl.ds(self.tile * TILE, TILE)][...] = y.astype(self.out.dtype)
