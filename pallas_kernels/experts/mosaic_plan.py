"""How the Hopper kernels of the experts cut a problem: static sizes and shared memory, no kernel language here."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts.spec import Spec

UNIT = 8  # k-blocks of a row that share the eight columns of one wgmma
TILE = 64  # rows of weights in one wgmma
LINE = 32  # scales, or numbers of a table, that a copy takes: 128 bytes
SMS = 132
SMEM = 227 * 1024 - 6 * 1024  # of a block of threads, without barriers and alignment
UP_STAGE = 2 * (TILE * BLOCK + 4 * LINE)  # bytes of a step of gate_up
_DOWN_ROWS = (16, 32, 48, 64)


@dataclasses.dataclass(frozen=True)
class OneRow:
    """The kernels for one row.

    k, experts, hidden, width, shared_width: as in Spec; terms: e4m3 terms of an x, 1 (W8A8) or 2 (W8A16).
    down_rows: outputs of a block of threads of down; step: k-blocks of its stages. groups_up, groups_down: warpgroups of a block of
    threads; stages_up, stages_down: depths of the ring of each.
    """

    k: int
    experts: int
    hidden: int
    width: int
    shared_width: int
    terms: int
    down_rows: int
    step: int
    groups_up: int
    groups_down: int
    stages_up: int
    stages_down: int
    workers: int = SMS

    @property
    def columns(self) -> int:
        """Of x in wgmma, all terms."""
        return UNIT * self.terms

    @property
    def up_units(self) -> int:
        return self.hidden // (BLOCK * UNIT)

    @property
    def shared_blocks(self) -> int:
        return self.shared_width // BLOCK

    @property
    def width_blocks(self) -> int:
        return self.width // BLOCK

    @property
    def most_blocks(self) -> int:
        """k-blocks of down where every choice is an expert."""
        return self.shared_blocks + self.k * self.width_blocks

    @property
    def down_units(self) -> int:
        return -(-self.most_blocks // UNIT)

    @property
    def tiles(self) -> int:
        """Of gate_up, eight rows of gate and eight of up, at most."""
        return self.most_blocks * BLOCK // UNIT

    def up_bytes(self) -> int:
        """Shared memory of gate_up."""
        x = self.up_units * (self.columns * BLOCK + 4 * UNIT)
        return self.groups_up * (self.stages_up * UP_STAGE + 2 * 4 * TILE) + x

    def down_bytes(self) -> int:
        stage = TILE * self.step * BLOCK + 2 * 4 * LINE
        x = self.down_units * (self.columns * BLOCK + 4 * UNIT)
        return self.groups_down * (self.stages_down * stage + 4 * TILE) + x


def one_row(spec: Spec, **changes: int) -> OneRow | None:
    """None where the sizes do not fit: hidden must be whole units, and shared memory must hold all of the product."""
    if spec.rows != 1 or spec.hidden % (BLOCK * UNIT) or spec.width % BLOCK or spec.shared_width % BLOCK:
        return None
    fitting = [rows for rows in _DOWN_ROWS if spec.hidden % rows == 0]
    down_rows = next((rows for rows in fitting if spec.hidden // rows <= SMS), fitting[-1])
    sizes = (spec.k, spec.experts, spec.hidden, spec.width, spec.shared_width)
    # With few tiles an SM their latency counts: more warpgroups, smaller steps of down. As measured on an H200 (README).
    few = (spec.k * spec.width + spec.shared_width) // 16 <= 4 * SMS
    step = math.gcd(2 if few else 4, math.gcd(spec.width, spec.shared_width) // BLOCK)
    groups = 3 if few else 2
    shape = {"down_rows": down_rows, "step": step, "groups_up": groups, "groups_down": groups}
    shape |= {"stages_up": 1, "stages_down": 1} | changes
    plan = OneRow(*sizes, 2 if spec.arithmetic == "w8a16" else 1, **shape)
    if "stages_up" not in changes:
        fitting = (SMEM - plan.up_bytes()) // (plan.groups_up * UP_STAGE) + 1
        plan = dataclasses.replace(plan, stages_up=min(12, fitting))
    if "stages_down" not in changes:
        stage = plan.groups_down * (TILE * plan.step * BLOCK + 8 * LINE)
        share = -(-plan.most_blocks // (plan.step * plan.groups_down))
        plan = dataclasses.replace(plan, stages_down=min(12, share, (SMEM - plan.down_bytes()) // stage + 1))
    if min(plan.stages_up, plan.stages_down) < 1 or max(plan.up_bytes(), plan.down_bytes()) > SMEM:
        return None
    return plan


@dataclasses.dataclass(frozen=True)
class Rows:
    """One kernel for 2 to 64 rows, gate_up (mats 2) or down (mats 1).

    rows, k, experts: as in Spec; terms: as in OneRow. n, depth: rows and columns of a routed expert's matrix; shared_n,
    shared_depth: of the shared one's. folded: the shared expert takes part. step: k-blocks of a stage; piece: those quantized at a
    time; groups: warpgroups of a block of threads; stages: depth of the ring of each.
    """

    rows: int
    k: int
    experts: int
    terms: int
    mats: int
    n: int
    depth: int
    shared_n: int
    shared_depth: int
    folded: bool
    step: int
    piece: int
    groups: int
    stages: int
    workers: int = SMS

    @property
    def pairs(self) -> int:
        return self.rows * self.k

    @property
    def rows_from(self) -> int:
        """Slots that share a row of the input: all choices of a row for gate_up."""
        return self.k if self.mats == 2 else 1

    @property
    def common(self) -> bool:
        """Whether the columns are all rows, the same for every item."""
        return self.mats == 2 and self.folded

    @property
    def tiles(self) -> int:
        return self.n // TILE

    @property
    def shared_tiles(self) -> int:
        return self.shared_n // TILE if self.folded else 0

    @property
    def blocks(self) -> int:
        return self.depth // BLOCK

    @property
    def shared_blocks(self) -> int:
        return self.shared_depth // BLOCK

    @property
    def most_blocks(self) -> int:
        return max(self.blocks, self.shared_blocks) if self.folded else self.blocks

    @property
    def steps(self) -> int:
        return self.blocks // self.step

    @property
    def shared_steps(self) -> int:
        return self.shared_blocks // self.step

    @property
    def table_lines(self) -> int:
        return -(-2 * self.experts // LINE)

    @property
    def order_lines(self) -> int:
        return -(-self.pairs // LINE)

    @property
    def items_here(self) -> int:
        """Items whose tiles one block of threads meets, at most."""
        items = min(self.pairs, self.experts) + self.pairs // UNIT
        return -(-(self.shared_tiles + items * self.tiles) // self.workers) // self.tiles + 2

    @property
    def stage_bytes(self) -> int:
        return self.groups * self.mats * (TILE * self.step * BLOCK + 4 * LINE)

    def smem(self) -> int:
        x = self.most_blocks * UNIT * (self.terms * BLOCK + 4)
        group = 2 * UNIT * self.piece * BLOCK * 2 + TILE * UNIT * 4 + 12 * self.items_here
        return (
            self.stages * self.stage_bytes + x + self.groups * group + 4 * LINE * (self.table_lines + self.order_lines)
        )


def several_rows(spec: Spec, **changes: int) -> tuple[Rows, Rows] | None:
    """Plans of gate_up and of down. The shared expert takes part up to eight rows: beyond, its weights would be read again."""
    if not 2 <= spec.rows <= 64 or any(size % BLOCK for size in (spec.hidden, spec.width, spec.shared_width)):
        return None
    plans = []
    for mats in (2, 1):
        n, depth = (spec.width, spec.hidden) if mats == 2 else (spec.hidden, spec.width)
        shared_n, shared_depth = (spec.shared_width, depth) if mats == 2 else (n, spec.shared_width)
        common = math.gcd(depth, shared_depth) // BLOCK
        sizes = (spec.rows, spec.k, spec.experts, 2 if spec.arithmetic == "w8a16" else 1, mats)
        folded, short = spec.rows <= UNIT, spec.width <= 8 * BLOCK
        step, piece, groups = math.gcd(4 // mats, common), math.gcd(4, common), 1
        if mats == 1 and short:
            groups = 3  # A short tile of down gives one warpgroup more to do than its bytes take to come.
        elif mats == 2 and short and folded:
            # One or two tiles a block of threads: two warpgroups share the bandwidth that blocks with one tile leave.
            step, piece, groups = 1, math.gcd(2, common), 2
        plan = Rows(*sizes, n, depth, shared_n, shared_depth, folded, step, piece, groups, 1)
        plan = dataclasses.replace(plan, **changes)
        stages = changes.get("stages", min(12, (SMEM - plan.smem()) // plan.stage_bytes + 1))
        if stages < 2:
            return None
        plans.append(dataclasses.replace(plan, stages=stages))
    return plans[0], plans[1]
