"""How the Triton experts are cut into programs: static numbers from the spec and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.experts.spec import Spec

# First GPU whose Triton has e4m3 as a type.
_NATIVE_E4M3 = 89
# Bytes in flight that an SM needs to keep its share of the memory busy, twice over (4.2 TB/s / 132 SMs * 1 us = 32 KB).
_IN_FLIGHT = 64 * 1024


@dataclass(frozen=True)
class Plan:
    """block_rows: rows (padded) that share one read of an expert's tile. half: rows of gate, and of up, in a program's tile.
    block_down: rows of down in a program's tile. items: (expert, row block) places, of which the last may stay empty.
    native: e4m3 is a type of the GPU, otherwise the weights are bytes.
    """

    block_rows: int
    half: int
    block_down: int
    items: int
    stages: int
    warps: int
    native: bool


def plan_for(spec: Spec, arch: Arch | None) -> Plan:
    """block_rows is 16 up to 64 rows, where an expert has two or three; experts with more take several items, neighbours in the
    grid, so that only the first reads memory. A sliced expert gets smaller tiles, or not every SM would have one."""
    few = spec.rows <= 64
    block_rows = 16 if few else 64
    # One row has one expert a pair. Otherwise sum(ceil(c / b)) <= experts hit + sum(c) / b.
    items = spec.k if spec.rows == 1 else min(spec.pairs, spec.experts) + spec.pairs // block_rows
    wide = min(spec.pairs, spec.experts) * spec.width >= 132 * 64
    half, block_down = (32 if wide else 16, 64) if few else (64, 128)
    smem = 99 * 1024 if arch is None else arch.smem_per_block
    tile = max(2 * half, block_down) * 128 + block_rows * 256
    stages = max(2, min(6, smem // 2 // tile, 1 + _IN_FLIGHT // tile))
    # Eight warps: with four, 128 x 64 sums and their operands spill.
    return Plan(block_rows, half, block_down, items, stages, 4 if few else 8, arch is None or arch.sm >= _NATIVE_E4M3)
