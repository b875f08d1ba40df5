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


def bucket(rows: int) -> int:
    """The smallest of ``BUCKETS`` that holds ``rows``; ValueError for more than the largest."""
    for size in BUCKETS:
        if 1 <= rows <= size:
            return size
    raise ValueError(f"{rows=} must lie in 1..{BUCKETS[-1]}, the rows that decode programs are compiled for")


def programs(
    weights: Weights, config: Config, plan: Plan, pages: int, buckets: Sequence[int] = BUCKETS, jobs: int = 8
) -> dict[int, DecodeProgram]:
    """A program for each bucket, ``jobs`` of them being compiled at a time.

    All are made before any runs: loading an executable evicts the recorded graphs of those before it.
    """
    with ThreadPoolExecutor(jobs) as pool:
        make = functools.partial(DecodeProgram, weights, config, plan, pages=pages)
        # Each in a copy of this context: ``lowering.target`` lives in it.
        made = [pool.submit(contextvars.copy_context().run, make, rows=rows) for rows in buckets]
        return {rows: future.result() for rows, future in zip(buckets, made, strict=True)}
