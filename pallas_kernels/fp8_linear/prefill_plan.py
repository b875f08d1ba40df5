"""How the prefill kernel of fp8_linear cuts a product: static sizes and shared memory, no kernel language here."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.blocks import BLOCK

_SMS = 132
# What a block of threads can have, without what barriers, alignment and Mosaic's scratch take.
_SMEM = 227 * 1024 - 2 * 1024
_MOST_STAGES = 6
_ROW = 128  # bytes of a row of the output's staging buffer: one swizzle atom


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel. Two products with equal plans share it.

    rows, k, n: of one product; terms: e4m3 terms of an x, 1 (W8A8) or 2 (W8A16).
    consumers: warpgroups that multiply, each [64 * halves, columns] of a tile; one more copies. side_by_side: whether their pieces
    make up the columns of the tile, or else its rows.
    splits: shares of k, added outside. stages: depth of the TMA ring.
    width: tiles of rows that are walked through before the next tile of columns, for the L2.
    """

    rows: int
    k: int
    n: int
    terms: int
    consumers: int = 2
    side_by_side: bool = True
    halves: int = 2
    columns: int = 128
    splits: int = 1
    stages: int = 4
    width: int = 16

    @property
    def blocks(self) -> int:
        return self.k // BLOCK

    @property
    def groups(self) -> tuple[int, int]:
        """Warpgroups along the rows and along the columns of a tile."""
        return (1, self.consumers) if self.side_by_side else (self.consumers, 1)

    @property
    def tile_rows(self) -> int:
        return 64 * self.halves * self.groups[0]

    @property
    def tile_columns(self) -> int:
        return self.columns * self.groups[1]

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.tile_rows)

    @property
    def padded_rows(self) -> int:
        return self.row_tiles * self.tile_rows

    @property
    def stored_rows(self) -> int:
        """Rows of the output array: Mosaic stores whole tiles of 8 rows, those beyond are cut off."""
        return -(-self.rows // 8) * 8

    @property
    def column_tiles(self) -> int:
        return -(-self.n // self.tile_columns)

    @property
    def items(self) -> int:
        """Pieces of work."""
        return self.row_tiles * self.column_tiles * self.splits

    @property
    def workers(self) -> int:
        """Blocks of threads, one on an SM."""
        return min(self.items, _SMS)

    @property
    def stage_bytes(self) -> int:
        return (self.terms * self.tile_rows + self.tile_columns) * BLOCK

    @property
    def staging_bytes(self) -> int:
        return self.consumers * 64 * _ROW

    @property
    def smem(self) -> int:
        """Bytes of shared memory, without barriers and alignment."""
        return self.stages * self.stage_bytes + self.staging_bytes

    @property
    def registers(self) -> tuple[int, int]:
        """Of a multiplying thread and of a copying one; all together at most what an SM has."""
        return {2: (232, 40), 3: (160, 32)}[self.consumers]


# Shapes of a tile by terms, and microseconds of one k-block of it with all SMs at work: o_proj with 4096 rows on an H200. Two
# warpgroups of 128 x 128 each spill registers, which stalls them; three of 64 x 128 do not. W8A8 with two: before loads moved.
_TWO: dict[str, Any] = {}
_THREE: dict[str, Any] = {"consumers": 3, "side_by_side": False, "halves": 1}
_SHAPES = {1: ((_THREE, 0.76), (_TWO, 1.54)), 2: ((_THREE, 1.34), (_TWO, 2.10))}


def plan_for(rows: int, k: int, n: int, terms: int) -> Plan:
    """The plan of one product of whole k-blocks: the shape whose waves of tiles take the least time."""
    candidates = [(_shared(Plan(rows, k, n, terms, **shape)), step) for shape, step in _SHAPES[terms]]
    plan, _ = min(candidates, key=lambda c: -(-c[0].items // _SMS) * -(-c[0].blocks // c[0].splits) * c[1])
    return deepest(plan)


def _shared(plan: Plan) -> Plan:
    """With fewer tiles than SMs each share of k gets its own block of threads; the float32 sums pay off while rows are few."""
    splits = max(1, min(_SMS // plan.items, plan.blocks // 4, 16)) if plan.rows <= 4 * BLOCK else 1
    return dataclasses.replace(plan, splits=splits)


def deepest(plan: Plan) -> Plan:
    """The plan with as many stages as fit."""
    stages = min(_MOST_STAGES, (_SMEM - plan.staging_bytes) // plan.stage_bytes)
    return dataclasses.replace(plan, stages=stages)
