"""How rows are cut for the GPU kernels: slices, blocks, warps. Static, from sizes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.top_k.spec import Spec

# A histogram has 2048 bins (11 bits of a key), whose prefix sums are looked up in 64 groups of 32.
BINS = 2048
GROUP = 32
GROUPS = BINS // GROUP
# SMs assumed where the GPU is not known.
_SMS = 132
# Longest row that one program takes.
_ONE_PROGRAM = 8192
# Longest row of gluon_row's kernel: nine scores a thread, what was measured (4352). It takes up to 8192.
_SHORT = 4608
_WARPS = 16


@dataclass(frozen=True)
class Plan:
    """``slices`` programs a row, each ``blocks`` blocks of ``block`` scores; one block is the single-launch kernel.

    listed: longest list that a row's last program selects among. warps: of each program. short: the one launch is
    ``gluon_row``'s, whose block is any multiple of 32 * warps; else it is a power of two.
    block and half of listed are at least 32 * warps, or threads would hold an element twice and count it twice.
    Slices of one row may wait for each other: rows * slices must not pass the SMs, unless there is one slice a row.
    """

    slices: int
    blocks: int
    block: int
    listed: int = 8192
    warps: int = _WARPS
    short: bool = False


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def make_plan(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of a call."""
    if spec.n <= _SHORT:
        return Plan(1, 1, -(-spec.n // (32 * _WARPS)) * 32 * _WARPS, short=True)
    if spec.n <= _ONE_PROGRAM:
        return Plan(1, 1, max(32 * _WARPS, _power_of_2(spec.n)))
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    most = max(1, min(128, sms // spec.rows))
    block = min(8192, max(4096, _power_of_2(-(-spec.n // most))))
    blocks = -(-spec.n // (block * most))
    return Plan(-(-spec.n // (block * blocks)), blocks, block)
