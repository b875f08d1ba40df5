"""Batch sizes that decode programs are compiled for, and programs of all of them."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.program import DecodeProgram
from glm52_jax.weights import Weights

# Rows of a step that programs are compiled for: sequences x query rows of each.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_BURST = 4


def bucket(rows: int) -> int:
    """The smallest of ``BUCKETS`` that holds ``rows``; ValueError for more than the largest."""
    for size in BUCKETS:
        if 1 <= rows <= size:
            return size
    raise ValueError(f"{rows=} must lie in 1..{BUCKETS[-1]}, the rows that decode programs are compiled for")


def burst(plan: Plan) -> int:
    """Steps of a call of the programs that ``generate`` uses: several on several GPUs, where the host takes longer to queue a call
    than they take for a step (bench/STEP.md)."""
    return 1 if plan.parallel is None or plan.parallel.devices == 1 else _BURST


def programs(
    weights: Weights, config: Config, plan: Plan, pages: int, buckets: Sequence[int] = BUCKETS, jobs: int = 8
) -> dict[int, DecodeProgram]:
    """A program for each bucket, of ``burst(plan)`` steps a call; ``jobs`` of them are compiled at a time.

    All are made before any runs: loading an executable evicts the recorded graphs of those before it.
    """
    with ThreadPoolExecutor(jobs) as pool:
        make = functools.partial(DecodeProgram, weights, config, plan, pages=pages, burst=burst(plan))
        # Each in a copy of this context: ``lowering.target`` lives in it.
        made = [pool.submit(contextvars.copy_context().run, make, rows=rows) for rows in buckets]
        return {rows: future.result() for rows, future in zip(buckets, made, strict=True)}
