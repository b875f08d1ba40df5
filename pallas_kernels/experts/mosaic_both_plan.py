"""How the one launch of 2 to 8 rows cuts a problem: static sizes and shared memory, no kernel language here."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts.mosaic_plan import LINE, SMEM, SMS, TILE, UNIT
from pallas_kernels.experts.spec import Spec, joined

HALF = TILE // 2  # rows of gate, and of up, in a tile of gate_up
# Tiles of x that a warpgroup holds in registers at the start, four registers each.
_MOST_LOADS = 24


def _choose(condition: bool, yes: int, no: int) -> int:
    return yes if condition else no


@dataclasses.dataclass(frozen=True)
class Both:
    """rows, k, experts, hidden, width: as in Spec, the shared expert is as wide as the others; terms: e4m3 terms of an x.

    step: k-blocks of a stage; groups: warpgroups of a block of threads; stages: depth of the ring of each; phase: "both", or "up"
    or "down" alone (for the interpreter, which runs blocks one after the other). given: x comes quantized. sliced: stacks have one
    layer; skips: where its scales start in theirs, of gate_up, down and the shared two.
    """

    rows: int
    k: int
    experts: int
    hidden: int
    width: int
    terms: int
    step: int
    groups: int
    stages: int
    workers: int = SMS
    phase: str = "both"
    given: bool = False
    sliced: bool = False
    skips: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def pairs(self) -> int:
        return self.rows * self.k

    @property
    def all_groups(self) -> int:
        return self.groups * self.workers

    @property
    def most_items(self) -> int:
        """With the shared expert's, which is the first."""
        return 1 + min(self.pairs, self.experts) + self.pairs // UNIT

    @property
    def blocks(self) -> int:
        return self.hidden // BLOCK

    @property
    def inner(self) -> int:
        """k-blocks of down."""
        return self.width // BLOCK

    @property
    def up_tiles(self) -> int:
        """Of an item."""
        return self.width // HALF

    @property
    def up_steps(self) -> int:
        return self.blocks // self.step

    @property
    def down_tiles(self) -> int:
        return self.hidden // TILE

    @property
    def down_steps(self) -> int:
        return self.inner // self.step

    @property
    def loads(self) -> int:
        """k-blocks of x that a warpgroup quantizes, at most."""
        return -(-self.blocks // self.groups)

    @property
    def worth(self) -> int:
        """Tiles of down that are as many bytes as one of gate_up."""
        return self.up_steps // self.down_steps

    @property
    def piece(self) -> int:
        """k-blocks of quantized x that a copy takes: the first products start when the first have come."""
        return math.gcd(8, self.blocks)

    @property
    def order_lines(self) -> int:
        return -(-self.pairs // LINE)

    @property
    def stage_bytes(self) -> int:
        return self.groups * (TILE * self.step * BLOCK + 2 * 4 * LINE)

    @property
    def x_blocks(self) -> int:
        """In shared memory: of x, then of the product, of each warpgroup."""
        return self.blocks + self.groups * self.inner

    def dealt(self, items: Any, n: Any, div: Any = operator.floordiv, choose: Any = _choose) -> tuple[Any, Any, Any]:
        """(tiles of gate_up, (first, number) of early tiles of down, the same of its others) of the n-th warpgroup.

        Tiles of gate_up go round: the n-th warpgroup has n, n + G and so on. Of the G warpgroups those before ``heavy`` have one
        in the last round. ``early`` tiles of down are of items that are complete before it: each warpgroup without a tile in it
        takes ``worth`` of them, if there are so many, and the rest is dealt evenly. div, choose: of numbers that are traced.
        """
        groups, tiles, down = self.all_groups, items * self.up_tiles, items * self.down_tiles
        rounds = div(tiles - 1, groups)  # full ones before the last
        heavy = tiles - rounds * groups
        light = groups - heavy
        early = div(rounds * groups, self.up_tiles) * self.down_tiles
        spare = early - light * self.worth
        of_heavy = div(choose(spare > 0, spare, 0) * heavy, groups)

        def before(i: Any) -> Any:
            """Early tiles of the warpgroups before the i-th."""
            late = div(choose(i > heavy, i - heavy, 0) * (early - of_heavy), choose(light > 0, light, 1))
            # Without light ones all is the heavy ones'.
            return choose(i > heavy, of_heavy + late, div(i * of_heavy, heavy))

        first, other = before(n), early + div(n * (down - early), groups)
        end, last = before(n + 1), early + div((n + 1) * (down - early), groups)
        return div(tiles - n + groups - 1, groups), (first, end - first), (other, last - other)

    def smem(self) -> int:
        x = self.x_blocks * UNIT * (self.terms * BLOCK + 4)
        group = TILE * UNIT * 4 + 12 * self.most_items + 8 * UNIT
        return self.stages * self.stage_bytes + x + self.groups * group + 4 * LINE * self.order_lines


def both_of(spec: Spec, **changes: int) -> Both | None:
    """None where two launches serve: other rows, a shared expert of another width, sizes that do not fit."""
    if not joined(spec.rows, spec.width, spec.shared_width) or spec.hidden % BLOCK:
        return None
    step = math.gcd(2, math.gcd(spec.hidden, spec.width) // BLOCK)
    terms = 2 if spec.arithmetic == "w8a16" else 1
    sizes = {"step": step, "groups": 2, "stages": 1} | changes
    plan = Both(spec.rows, spec.k, spec.experts, spec.hidden, spec.width, terms, **sizes)  # type: ignore[arg-type]
    if "stages" not in changes:
        plan = dataclasses.replace(plan, stages=min(12, (SMEM - plan.smem()) // plan.stage_bytes + 1))
    if plan.stages < 2 or plan.smem() > SMEM or plan.loads > _MOST_LOADS:
        return None
    return plan
