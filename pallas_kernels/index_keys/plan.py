"""How the Triton kernels of index_keys cut a call: static, from sizes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.index_keys.spec import QUERY, WRITE, Spec

# SMs assumed where the GPU is not known.
_SMS = 132


@dataclass(frozen=True)
class Plan:
    """How the two launches are cut.

    The first: a program has a slice of the hidden size (one of splits), block_rows rows, and either one of key_tiles tiles of
    block_keys outputs of wk or all of weights_proj. stages: of its loads. The second: a program has a key or block_heads heads.
    native: the GPU converts e4m3 by itself.
    """

    splits: int
    block_rows: int
    block_keys: int
    key_tiles: int
    native: bool
    project_warps: int = 4
    stages: int = 3
    block_heads: int = 4
    finish_warps: int = 2


def plan_for(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of a spec on a GPU: up to two programs an SM, at most 24 slices (the second launch adds them)."""
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    wide = spec.rows > 64
    block_rows, block_keys = (64, 128) if wide else (16, 32)
    key_tiles = 0 if spec.form == QUERY else spec.head_dim // block_keys
    programs = -(-spec.rows // block_rows) * (key_tiles + (spec.form != WRITE))
    most = max(1, min(24, 2 * sms // programs))
    splits = max(n for n in range(1, most + 1) if spec.hidden // 128 % n == 0)
    native = arch is None or arch.sm >= 89
    if wide:
        return Plan(splits, block_rows, block_keys, key_tiles, native, project_warps=8, block_heads=16, finish_warps=4)
    return Plan(splits, block_rows, block_keys, key_tiles, native)
