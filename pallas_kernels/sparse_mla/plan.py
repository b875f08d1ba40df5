"""How a sparse MLA call is cut: heads and keys of a tile, splits of the keys. Static, from sizes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.sparse_mla.spec import Spec

# SMs assumed where the GPU is not known.
_SMS = 132
# Shared memory of a block, below which only blocks of 16 heads are planned.
_WIDE_SMEM = 160 * 1024


@dataclass(frozen=True)
class Plan:
    """block_heads x block_keys a tile, ``tiles`` tiles a split, ``splits`` splits a row; warps and pipeline stages."""

    block_heads: int
    block_keys: int
    splits: int
    tiles: int
    warps: int
    stages: int


def cut(spec: Spec, block_keys: int, splits: int) -> tuple[int, int]:
    """(splits, tiles a split): the splits asked for, fewer where that leaves none empty."""
    tiles = -(-spec.k // block_keys)
    each = -(-tiles // min(splits, tiles))
    return -(-tiles // each), each


def make_plan(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of the Triton backend; spec.splits overrides the number of splits.

    Measured on the H200, FP8: one row of 64 heads 9.0 us in 4 x 32 programs of 16 heads and 64 keys (13 with 64 heads a
    program); one row of 8 heads 6.6 us with 64 splits of 32 keys, 8.7 with 32 of 64; 128 rows of 8 heads 116 us with four
    programs an SM, 157 with one. Blocks of 64 heads need wgmma and its shared memory. Other GPUs: not measured.
    """
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    hopper = arch is None or arch.sm == 90
    if spec.heads <= 16 or spec.rows * spec.heads <= 128 or (arch and arch.smem_per_block < _WIDE_SMEM):
        block_heads = 16
    else:
        block_heads = 64 if hopper and spec.heads > 32 else 32
    programs = spec.rows * -(-spec.heads // block_heads)
    small = block_heads == 16
    block_keys = 32 if programs == 1 or (block_heads == 64 and not spec.quantized) else 64
    splits, tiles = cut(spec, block_keys, spec.splits or max(1, (4 if small else 1) * sms // programs))
    stages = 2 if block_heads == 64 and not spec.quantized else 1
    return Plan(block_heads, block_keys, splits, tiles, 8 if block_heads == 64 else 4, stages)


def hopper_plan(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of the Gluon backend: one program an SM, 64 keys a tile; spec.splits overrides the number of splits.

    Up to 8 rows two programs of 32 heads share a row, which halves the partials (8 rows of 64 heads, H200: 20.9 us against
    23.5); from 16 rows on 64 heads a program, which read the latents once (64 rows: 76 against 94).
    """
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    block_heads = 16 if spec.heads <= 16 else 32 if spec.heads <= 32 or spec.rows <= 8 else 64
    programs = spec.rows * -(-spec.heads // block_heads)
    splits, tiles = cut(spec, 64, spec.splits or max(1, sms // programs))
    return Plan(block_heads, 64, splits, tiles, 4, 3)


def one_tile_each(spec: Spec) -> bool:
    """Whether Gluon's kernel for few heads serves: one tile of keys a program and all programs resident at once."""
    resident = spec.heads <= 8 or (spec.heads <= 16 and spec.rows <= 8)
    resident = resident and spec.rows * -(-spec.k // 64) <= 4 * 128 and spec.k <= 4096
    return spec.quantized and resident and not spec.splits


def few_cluster(spec: Spec) -> int:
    """How many splits that kernel merges through shared memory: of one row eight, where the parts go on to W_UV.

    Measured with W_UV, 8 and 16 heads: 1 row 8.5 and 9.3 us so, 8.7 and 10.1 with 64 parts merged there. 8 rows: no gain.
    """
    return 8 if spec.apart and spec.rows == 1 else 1


def few_plan(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of that kernel. A tile is small while the SMs are not all busy, since all its copies are under way at once.

    Measured on the H200 with the merge, 8 heads of 2048 keys, tiles of 32 and 64: 1 row 7.1 and 7.4 us, 2 rows 7.8 and 7.9,
    4 rows 9.5 and 9.0; 8 rows 11.7 with 64 keys. 16 heads with W_UV: 1 row 10.1 in two programs of 8 heads a tile of 32 keys,
    10.8 in one of 16; 2 rows 13.6, 13.6, and 12.0 with 64 keys and 16 heads; 4 rows 14.5, in two programs 15.0.
    """
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    small = spec.rows * -(-spec.k // 64) <= sms // 2 and (spec.heads <= 8 or spec.rows == 1)
    block_keys = 32 if small else 64
    splits, tiles = cut(spec, block_keys, -(-spec.k // block_keys))
    return Plan(8 if spec.heads <= 8 or small else 16, block_keys, splits, tiles, 4, 1)
