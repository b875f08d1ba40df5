"""How the Hopper kernel of fp8_linear cuts a problem: static sizes and shared memory, no kernel language here."""

from __future__ import annotations

import dataclasses

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_linear.spec import Spec

TILE = 64  # output rows of a block of threads: the M of wgmma
NORM_ROWS = 8  # most rows whose norm every block of threads repeats
IN_KERNEL_ROWS = 8  # most rows that every block of threads quantizes by itself
_SMS = 132
# Shared memory of a block of threads, one or two of them on an SM, and what barriers, alignment and Mosaic's scratch take of it.
_SMEM_ONE, _SMEM_TWO, _RESERVED = 227 * 1024, 113 * 1024, 4 * 1024
_MOST_COPIED = 256  # elements of one axis that a TMA copy takes: scales of a row of blocks


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel. Two specs with equal plans share it.

    rows, k, ns: as in Spec; mats: matrices that a tile reads, 2 for SwiGLU; terms: e4m3 terms of an x, 1 (W8A8) or 2 (W8A16).
    warpgroups: each walks its own share of k; unit: k-blocks whose x is quantized at once; step: k-blocks of a TMA stage.
    stages, x_slots: depths of the rings. ready: x comes quantized, from a launch before. norm, delta, eps: as in Spec.
    split: blocks of threads, one cluster, that share the k of a tile. offsets: the first scale of each weight where operands are
    those of one layer; None: they are stacks and the layer is loaded.
    """

    rows: int
    k: int
    ns: tuple[int, ...]
    mats: int
    terms: int
    warpgroups: int
    unit: int
    step: int
    stages: int
    x_slots: int
    ready: bool = False
    norm: str = ""
    delta: bool = False
    eps: float = 0.0
    split: int = 1
    offsets: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        return self.k // BLOCK

    @property
    def units(self) -> int:
        return self.blocks // self.unit

    @property
    def shares(self) -> int:
        """Warpgroups that share the units of a tile."""
        return self.warpgroups * self.split

    @property
    def most_units(self) -> int:
        """Units of the warpgroup that has most."""
        return -(-self.units // self.shares)

    @property
    def even(self) -> bool:
        """Whether all warpgroups of a tile walk as many whole units."""
        return self.blocks % (self.unit * self.shares) == 0

    @property
    def steps_per_unit(self) -> int:
        return self.unit // self.step

    @property
    def one_row(self) -> bool:
        """Whether the columns of wgmma are k-blocks of a single row."""
        return self.rows == 1 and self.unit == 8

    @property
    def columns(self) -> int:
        """Columns of one term."""
        return 8 if self.one_row else -(-self.rows // 8) * 8

    @property
    def atoms(self) -> int:
        """x tiles of a unit."""
        return 1 if self.one_row else self.unit

    @property
    def n(self) -> int:
        """Columns of quantized x in shared memory, all terms."""
        return self.columns * self.terms

    @property
    def whole(self) -> bool:
        """Whether all of x is in shared memory at once: several rows and their norm."""
        return bool(self.norm) and not self.one_row

    @property
    def width(self) -> int:
        """Columns of the sums: where x comes quantized, the terms of an x are added before they are scaled."""
        return self.columns if self.ready else self.n

    @property
    def partial(self) -> int:
        return 1 if self.one_row else self.width

    @property
    def buffers(self) -> int:
        """Units of quantized x in shared memory."""
        return self.x_slots if self.ready else min(2, self.most_units)

    @property
    def x_arrivals(self) -> int:
        """Copies of one unit of x; of all of it where all is there at once."""
        if self.whole:
            return self.units
        if self.ready:
            return self.terms + 1
        return self.atoms * (1 + self.delta) + bool(self.norm)

    @property
    def row_outputs(self) -> int:
        """Outputs of x's shape: normed, and total where it is not x."""
        return bool(self.norm) + self.delta

    @property
    def scale_slots(self) -> int:
        """Scales of a row of blocks as they are copied: whole 128 bytes, from the 16 before on where rows start within them."""
        return -(-(self.blocks + (3 if self.blocks % 4 else 0)) // 32) * 32

    @property
    def factor_slots(self) -> int:
        """Scales of x kept for a block: those from a launch before are copied by whole 128 bytes."""
        return -(-self.columns // 32) * 32 if self.ready else self.n

    @property
    def tiles(self) -> int:
        return sum(n // TILE for n in self.ns)

    @property
    def smem(self) -> int:
        """Bytes of shared memory, without barriers and alignment."""
        ring = self.stages * self.step * self.mats * TILE * BLOCK
        rows = self.atoms * self.columns * BLOCK * 2
        x = self.buffers * self.atoms * self.n * BLOCK
        x += 0 if self.ready or self.whole else self.x_slots * rows * (1 + self.delta)
        if self.norm and not self.whole:
            x += self.x_slots * self.unit * BLOCK * (4 if self.norm == "float32" else 2) + 288
        factors = self.buffers * self.unit * self.factor_slots * 4 + self.mats * self.partial * TILE * 4
        sent = (self.split - 1) * self.mats * TILE * self.width * 4
        all_rows = self.k * (2 * self.columns + (4 if self.norm == "float32" else 2)) if self.whole else 0
        return self.warpgroups * (ring + x + factors + sent) + self.mats * self.scale_slots * 4 + all_rows


# (warpgroups, unit, step, most stages) by kind of tile, best first, as measured on an H200. Few warpgroups with wide steps read
# long pieces of each row at a time, which the DRAM rewards: one row of o_proj takes 26.8 us with (1, 8, 8, 3), 29.0 with
# (1, 8, 2, 12) and 28.6 with (4, 8, 2, 3). More warpgroups pay where few tiles each have much to do per byte: many rows, few SMs.
_ONE_ROW_FEW = ((3, 8, 4, 2), (2, 8, 4, 2), (2, 8, 2, 2), (1, 8, 2, 2))
_ONE_ROW_FEW_NORM = ((2, 8, 4, 3), (3, 8, 2, 3), *_ONE_ROW_FEW)
_ONE_ROW = ((1, 8, 8, 3), (1, 8, 4, 4), (1, 8, 2, 2))
_ONE_ROW_SHORT = ((1, 8, 4, 4), (2, 8, 4, 2), (1, 8, 2, 2))  # o_proj of TP-8: 5.46 us, 5.63 with (2, 8, 4, 2)
_ONE_ROW_SHORT_FEW = ((2, 8, 4, 2), (1, 8, 4, 4), (1, 8, 2, 2))
_ONE_ROW_TWO = ((1, 8, 4, 3), (1, 8, 2, 2), (1, 8, 1, 2))
_ONE_ROW_SWIGLU = ((1, 8, 2, 2), (1, 8, 1, 2))
_ROWS = ((3, 2, 2, 3), (4, 1, 1, 4), (2, 1, 1, 4))
_ROWS_SHORT = ((2, 8, 8, 1), *_ROWS)  # o_proj of TP-8, 8 rows: 6.1 us, 7.0 with (3, 2, 2, 3)
_ROWS_FEW = ((4, 2, 2, 2), (4, 1, 1, 4), (2, 1, 1, 4))
_ROWS_TWO = ((1, 4, 4, 2), (1, 2, 2, 2), (2, 1, 1, 2), (1, 1, 1, 4), (1, 1, 1, 2))
_ROWS_SWIGLU = ((1, 2, 2, 2), (2, 1, 1, 2), (1, 1, 1, 2))
_READY = ((2, 2, 2, 3), (1, 2, 2, 4), (1, 2, 2, 2))
_LAST = ((2, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 2))
# ((warpgroups, unit, step, stages, x_slots, split), most blocks of threads): few tiles leave SMs idle, so clusters share k.
# Clusters of three were slower than none (123 blocks, not all at once on the GPU's groups of SMs). One row waits for latencies
# that a cluster only adds to: split for SwiGLU only.
_SPLIT = (((3, 2, 2, 2, 2, 2), 96), ((2, 2, 2, 2, 2, 2), 96))
_SPLIT_SHORT = (((1, 4, 4, 2, 2, 2), 128), *_SPLIT)
# (most rows, sizes) of a long k whose x comes quantized, W8A16.
_SPLIT_READY = ((16, (2, 2, 2, 4, 2, 2)), (32, (2, 2, 2, 3, 2, 2)), (64, (2, 1, 1, 3, 3, 2)))
# Several rows with their norm: q_b of TP-8 takes 5.4 us so, 1.4 + 4.6 with a norm before.
_NORM_SHORT = (((2, 4, 4, 1, 1, 2), 64), ((1, 4, 4, 2, 1, 2), 64))
_SPLIT_SWIGLU = (((1, 4, 4, 2, 2, 4), 96),)


def plan_for(spec: Spec) -> Plan | None:
    """The plan of a spec that has whole blocks; None where shared memory or one copy of scales does not suffice, or where the norm
    is faster as a launch of its own."""
    blocks, tiles = spec.k // BLOCK, sum(n // TILE for n in spec.ns)
    one_row = spec.rows == 1 and blocks % 8 == 0
    mats, terms = 2 if spec.form == "swiglu" else 1, 2 if spec.arithmetic == "w8a16" else 1
    if spec.norm and not one_row:
        return _rows_with_norm(spec, tiles, terms)
    ready = spec.rows > IN_KERNEL_ROWS
    if ready and mats == 1 and terms == 2 and blocks > 16:
        for rows, sizes in _SPLIT_READY:
            plan = Plan(spec.rows, spec.k, spec.ns, 1, terms, *sizes[:-1], ready=True, split=sizes[-1])
            few = spec.rows <= rows and tiles * plan.split <= 96
            if few and plan.blocks % plan.unit == 0 and plan.even and _fits(plan, _SMEM_ONE):
                return plan
    if not (ready or spec.norm) and (mats == 2 or not one_row):
        for sizes, most in _SPLIT_SWIGLU if mats == 2 else _SPLIT_SHORT if blocks <= 16 else _SPLIT:
            plan = Plan(spec.rows, spec.k, spec.ns, mats, terms, *sizes[:-1], split=sizes[-1])
            if tiles * plan.split <= most and plan.even and _fits(plan, _SMEM_ONE):
                return plan
    shapes = (
        _ready(-(-spec.rows // 8) * 8, terms * mats)
        if ready
        else _shapes(one_row, tiles, blocks, mats, bool(spec.norm))
    )
    # With more tiles than SMs two share an SM; where they do not fit so, they follow each other.
    for budget in (_SMEM_TWO, _SMEM_ONE) if tiles > _SMS else (_SMEM_ONE,):
        for warpgroups, unit, step, stages in shapes:
            if blocks % unit or blocks // unit < warpgroups:  # every warpgroup has a share
                continue
            stages = min(stages, -(-(blocks // unit) // warpgroups) * (unit // step))
            # One slot shows the latency of x in every unit; only q_b with its norm, two tiles an SM, took 11.2 us so, not 11.9.
            several = ready or (spec.norm and tiles <= _SMS)
            once = not one_row and blocks // unit <= warpgroups
            for x_slots in (1,) if once or (spec.norm and tiles > _SMS) else (2, 1):
                if x_slots == 1 and several and blocks // unit > warpgroups:
                    continue
                sizes = (warpgroups, unit, step, stages, x_slots)
                more = {"ready": ready, "norm": spec.norm, "delta": spec.delta, "eps": spec.eps}
                plan = Plan(spec.rows, spec.k, spec.ns, mats, terms, *sizes, **more)
                if _fits(plan, budget):
                    return plan
    return None


def _rows_with_norm(spec: Spec, tiles: int, terms: int) -> Plan | None:
    """Several rows whose norm every block of threads repeats: only where all of them are little beside its weights."""
    if spec.rows > NORM_ROWS or spec.delta or spec.k > 2048:
        return None
    for sizes, most in _NORM_SHORT:
        plan = Plan(spec.rows, spec.k, spec.ns, 1, terms, *sizes[:-1], norm=spec.norm, eps=spec.eps, split=sizes[-1])
        if tiles * plan.split <= most and plan.blocks % plan.unit == 0 and plan.even and _fits(plan, _SMEM_ONE):
            return plan
    return None


def _fits(plan: Plan, budget: int) -> bool:
    return plan.smem <= budget - _RESERVED and plan.scale_slots <= _MOST_COPIED


def _ready(columns: int, products: int) -> tuple[tuple[int, int, int, int], ...]:
    """Shapes for columns of x that come quantized: the accumulators of a step must fit the registers."""
    if columns * products <= 64:
        return ((2, 2, 2, 5), (2, 2, 2, 4), *_READY, *_LAST)
    return ((2, 2, 2, 2), (2, 1, 1, 4), (2, 1, 1, 3), (1, 1, 1, 4), *_LAST)


def _shapes(one_row: bool, tiles: int, blocks: int, mats: int, norm: bool) -> tuple[tuple[int, int, int, int], ...]:
    if one_row and tiles > _SMS:
        return _ONE_ROW_SWIGLU if mats == 2 else _ONE_ROW_TWO
    if one_row and blocks <= 16:
        return _ONE_ROW_SHORT_FEW if tiles < 64 else _ONE_ROW_SHORT
    if one_row and tiles < 64:
        return _ONE_ROW_FEW_NORM if norm else _ONE_ROW_FEW
    if one_row:
        return _ONE_ROW
    if tiles > _SMS:
        return (_ROWS_SWIGLU if mats == 2 else _ROWS_TWO) + _LAST
    if blocks == 16 and tiles >= 64:
        return _ROWS_SHORT + _LAST
    return (_ROWS_FEW if tiles < 64 else _ROWS) + _LAST
