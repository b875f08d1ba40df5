"""How the Hopper kernel of fp8_linear cuts a problem: static sizes and shared memory, no kernel language here."""

from __future__ import annotations

import dataclasses

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_linear.spec import Spec

TILE = 64  # output rows of a block of threads: the M of wgmma
_SMS = 132
# Shared memory of a block of threads, one or two of them on an SM, and what barriers, alignment and Mosaic's scratch take of it.
_SMEM_ONE, _SMEM_TWO, _RESERVED = 227 * 1024, 113 * 1024, 4 * 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel. Two specs with equal plans share it.

    rows, k, ns: as in Spec; mats: matrices that a tile reads, 2 for SwiGLU; terms: e4m3 terms of an x, 1 (W8A8) or 2 (W8A16).
    warpgroups: each walks its own share of k; unit: k-blocks whose x is quantized at once; step: k-blocks of a TMA stage.
    stages, x_slots: depths of the rings.
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

    @property
    def blocks(self) -> int:
        return self.k // BLOCK

    @property
    def units(self) -> int:
        return self.blocks // self.unit

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
    def x_rows(self) -> int:
        return 1 if self.one_row else self.columns

    @property
    def atoms(self) -> int:
        """x tiles of a unit."""
        return 1 if self.one_row else self.unit

    @property
    def n(self) -> int:
        return self.columns * self.terms

    @property
    def partial(self) -> int:
        return 1 if self.one_row else self.n

    @property
    def scale_slots(self) -> int:
        return -(-self.blocks // 32) * 32

    @property
    def tiles(self) -> int:
        return sum(n // TILE for n in self.ns)

    @property
    def smem(self) -> int:
        """Bytes of shared memory, without barriers and alignment."""
        ring = self.stages * self.step * self.mats * TILE * BLOCK
        x = self.x_slots * self.atoms * self.columns * BLOCK * 2 + 2 * self.atoms * self.n * BLOCK
        factors = 2 * self.unit * self.n * 4 + self.mats * self.partial * TILE * 4
        return self.warpgroups * (ring + x + factors) + self.mats * self.scale_slots * 4


# (warpgroups, unit, step, most stages) by kind of tile, best first, as measured on an H200. Few warpgroups with wide steps read
# long pieces of each row at a time, which the DRAM rewards: one row of o_proj takes 26.8 us with (1, 8, 8, 3), 29.0 with
# (1, 8, 2, 12) and 28.6 with (4, 8, 2, 3). More warpgroups pay where few tiles each have much to do per byte: many rows, few SMs.
_ONE_ROW_FEW = ((3, 8, 4, 2), (2, 8, 4, 2), (2, 8, 2, 2), (1, 8, 2, 2))
_ONE_ROW = ((1, 8, 8, 3), (1, 8, 4, 4), (1, 8, 2, 2))
_ONE_ROW_SHORT = ((2, 8, 4, 2), (1, 8, 4, 4), (1, 8, 2, 2))
_ONE_ROW_TWO = ((1, 8, 4, 3), (1, 8, 2, 2), (1, 8, 1, 2))
_ONE_ROW_SWIGLU = ((1, 8, 2, 2), (1, 8, 1, 2))
_ROWS = ((3, 2, 2, 3), (4, 1, 1, 4), (2, 1, 1, 4))
_ROWS_FEW = ((4, 2, 2, 2), (4, 1, 1, 4), (2, 1, 1, 4))
_ROWS_TWO = ((1, 4, 4, 2), (1, 2, 2, 2), (2, 1, 1, 2), (1, 1, 1, 4), (1, 1, 1, 2))
_ROWS_SWIGLU = ((1, 2, 2, 2), (2, 1, 1, 2), (1, 1, 1, 2))
_LAST = ((2, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 2))


def plan_for(spec: Spec) -> Plan | None:
    """The plan of a spec that has whole blocks; None where shared memory does not suffice."""
    blocks, tiles = spec.k // BLOCK, sum(n // TILE for n in spec.ns)
    mats, terms = 2 if spec.form == "swiglu" else 1, 2 if spec.arithmetic == "w8a16" else 1
    shapes = _shapes(spec.rows == 1 and blocks % 8 == 0, tiles, blocks, mats)
    # With more tiles than SMs two share an SM; where they do not fit so, they follow each other.
    for budget in (_SMEM_TWO, _SMEM_ONE) if tiles > _SMS else (_SMEM_ONE,):
        for warpgroups, unit, step, stages in shapes:
            if blocks % unit or blocks // unit < warpgroups:  # every warpgroup has a share
                continue
            stages = min(stages, -(-(blocks // unit) // warpgroups) * (unit // step))
            for x_slots in (2, 1):
                plan = Plan(spec.rows, spec.k, spec.ns, mats, terms, warpgroups, unit, step, stages, x_slots)
                if plan.smem <= budget - _RESERVED:
                    return plan
    return None


def _shapes(one_row: bool, tiles: int, blocks: int, mats: int) -> tuple[tuple[int, int, int, int], ...]:
    if one_row and tiles > _SMS:
        return _ONE_ROW_SWIGLU if mats == 2 else _ONE_ROW_TWO
    if one_row and blocks <= 16:
        return _ONE_ROW_SHORT
    if one_row:
        return _ONE_ROW_FEW if tiles < 64 else _ONE_ROW
    if tiles > _SMS:
        return (_ROWS_SWIGLU if mats == 2 else _ROWS_TWO) + _LAST
    return (_ROWS_FEW if tiles < 64 else _ROWS) + _LAST
