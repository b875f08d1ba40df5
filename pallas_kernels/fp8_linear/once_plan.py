"""How the Hopper kernel with all weights on their way at once cuts a problem: static sizes, no kernel language here."""

from __future__ import annotations

import dataclasses

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_linear.plan import TILE
from pallas_kernels.fp8_linear.spec import Spec

# What a block of threads can have, without what barriers, alignment and Mosaic's scratch take.
_SMEM = 223 * 1024


@dataclasses.dataclass(frozen=True)
class OncePlan:
    """One kernel. Two specs with equal plans share it.

    rows, k, ns, terms, norm, delta, eps, offsets: as in ``plan.Plan``. warpgroups, split: warpgroups of a block of threads
    and blocks of a cluster; each has its own stretch of k. fold: pieces of a stretch side by side in the 64 rows of a product, so
    that a block of threads owns 64 / fold output rows. step: k-blocks of a piece that are copied at once; stages: copies of a
    warpgroup under way.
    """

    rows: int
    k: int
    ns: tuple[int, ...]
    terms: int
    warpgroups: int
    fold: int
    step: int
    stages: int
    split: int = 1
    norm: str = ""
    delta: bool = False
    eps: float = 0.0
    offsets: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        return self.k // BLOCK

    @property
    def height(self) -> int:
        """Output rows of a block of threads."""
        return TILE // self.fold

    @property
    def tiles(self) -> int:
        return sum(n // self.height for n in self.ns)

    @property
    def stretch(self) -> int:
        """k-blocks of a warpgroup."""
        return self.blocks // (self.warpgroups * self.split)

    @property
    def steps(self) -> int:
        return self.stretch // (self.fold * self.step)

    @property
    def one_row(self) -> bool:
        """Whether the columns of a product are eight k-blocks of a single row."""
        return self.rows == 1

    @property
    def atoms(self) -> int:
        """Tiles [8, 128] of x of a warpgroup: eight k-blocks of one row, or one of eight rows."""
        return self.stretch // 8 if self.one_row else self.stretch

    @property
    def scale_slots(self) -> int:
        """Scales of a row of blocks as they are copied: whole 128 bytes."""
        return -(-self.blocks // 32) * 32

    @property
    def row_outputs(self) -> int:
        """Outputs of x's shape: normed, and total where it is not x."""
        return bool(self.norm) + self.delta

    @property
    def mats(self) -> int:
        """Matrices that a tile reads."""
        return 1

    @property
    def ready(self) -> bool:
        """Whether x comes quantized."""
        return False

    @property
    def smem(self) -> int:
        """Bytes of shared memory, without barriers and alignment."""
        ring = self.stages * self.step * TILE * BLOCK
        x = self.atoms * 8 * (self.terms * BLOCK + 4) + (0 if self.one_row else self.stretch * 8 * BLOCK * 2)
        sums = TILE * 4 * (1 if self.one_row else 8) + (self.split - 1) * TILE * 4 * 8
        return self.warpgroups * (ring + x + sums + 64) + self.scale_slots * 4

    @property
    def fits(self) -> bool:
        """Whether the sizes divide each other, and fit."""
        if self.blocks % (self.warpgroups * self.split) or self.stretch % (self.fold * self.step):
            return False
        # The pieces of a product of one row share its columns. A norm needs all of a single row in one block of threads.
        if self.one_row and (self.stretch % 8 or 8 % (self.fold * self.step)):
            return False
        if self.norm and (not self.one_row or self.split > 1):
            return False
        return all(n % self.height == 0 for n in self.ns) and self.blocks % 4 == 0 and self.smem <= _SMEM


# (warpgroups, fold, step, stages, split), and the fewest and most tiles of 64 rows, by k-blocks: what a step on an H200 was faster
# with. The README says with what it was not.
_ONE_ROW = {16: ((2, 2, 4, 1, 1), 0, 48), 48: ((2, 2, 2, 6, 1), 0, 60)}
_ROWS = {16: ((2, 1, 4, 2, 1), 64, 132), 48: ((3, 1, 2, 2, 2), 0, 48)}


def once_plan_for(spec: Spec) -> OncePlan | None:
    """The plan of a spec that is faster so than with ``plan.plan_for``."""
    if spec.form != "linear" or not 1 <= spec.rows <= 8 or spec.k % BLOCK or any(n % TILE for n in spec.ns):
        return None
    if spec.arithmetic != "w8a16":  # W8A8 was not timed so
        return None
    known = (_ONE_ROW if spec.rows == 1 else _ROWS).get(spec.k // BLOCK)
    if known is None:
        return None
    (warpgroups, fold, step, stages, split), fewest, most = known
    if not fewest <= sum(n // TILE for n in spec.ns) <= most:
        return None
    plan = OncePlan(
        *(spec.rows, spec.k, spec.ns, 2),
        *(warpgroups, fold, step, stages, split),
        *(spec.norm, spec.delta, spec.eps),
    )
    return plan if plan.fits else None
