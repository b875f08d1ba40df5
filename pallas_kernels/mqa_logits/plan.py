"""How a call is cut: queries of a block of threads, programs, stages. Static, from sizes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.arch import Arch
from pallas_kernels.mqa_logits.spec import Spec

# SMs assumed where the GPU is not known.
_SMS = 132
# Queries of a sequence up to which the programs share all pages equally; beyond, each takes a fixed rectangle.
_DECODE_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """One kernel.

    rows: queries of a group, which share the keys that a block of threads reads: ``tiles`` products of ``lanes`` queries each.
    stages: depth of the ring of pages. programs: of a decode call. chunk: pages of a prefill program; 0 for a decode call.
    """

    rows: int
    lanes: int
    tiles: int
    stages: int
    programs: int
    chunk: int


def make_plan(spec: Spec, arch: Arch | None) -> Plan:
    """The plan of the Hopper kernel.

    Measured on the H200: 3 stages and as many programs as fit are best or within 1 % (128K keys: 7.2 us against 7.6 with 4 stages
    and 8.5 with 6; 32 sequences of 32K 38.6 us); eight rows want 2 (29.5 us against 30.6 with 3). Prefill: 3 or 4 stages and 32
    to 128 pages a program are equal.
    """
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    rows = min(spec.width, _DECODE_ROWS)
    lanes = 1 if rows == 1 else 2 if rows == 2 else 4
    tiles = 2 if rows > 4 else 1
    if spec.width > _DECODE_ROWS:
        return Plan(rows, lanes, tiles, 3, 0, 64)
    return Plan(rows, lanes, tiles, 2 if tiles == 2 else 3, sms * {1: 6, 2: 5, 4: 3}[lanes], 0)


@dataclass(frozen=True)
class PortablePlan:
    """The Triton kernel: queries of a program, ``lanes`` of them side by side in its columns, ``splits`` programs a group."""

    queries: int
    lanes: int
    splits: int
    warps: int
    stages: int


def make_portable_plan(spec: Spec, arch: Arch | None) -> PortablePlan:
    """The plan of the Triton kernel: up to 128 columns a program, at least the 16 of a product.

    Six stages, because a page is two loads behind its id: 1M keys take 39.0 us, with four stages 45.5.
    """
    sms = arch.num_sms if arch and arch.num_sms else _SMS
    lanes = max(1 << (min(spec.width, 4) - 1).bit_length(), 16 // spec.heads)
    queries = min(lanes, max(1, 128 // spec.heads))
    lanes = min(lanes, queries)
    groups = spec.rows * -(-spec.width // queries)
    return PortablePlan(queries, lanes, max(1, min(spec.table, 4 * sms // groups)), 4, 6)
