"""How a sparse MLA call is cut: heads and keys of a tile, splits of the keys. Static, from sizes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.sparse_mla.spec import Spec

# SMs assumed where the GPU is not known.
_SMS = 132


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
    """The plan of the Triton backend; spec.splits overrides the number of splits."""
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    block_heads = 16 if spec.heads <= 16 or spec.rows * spec.heads <= 128 else 64 if spec.heads > 32 else 32
    block_keys = 32 if block_heads == 64 else 64
    programs = spec.rows * -(-spec.heads // block_heads)
    splits, tiles = cut(spec, block_keys, spec.splits or max(1, sms // programs))
    return Plan(block_heads, block_keys, splits, tiles, 8 if block_heads == 64 else 4, 2)
