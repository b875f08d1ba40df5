"""What compiling takes, as JAX reports it."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from glm52_jax.compile_cache import Compiling


def test_programs_are_counted_while_it_is_entered() -> None:
    x = jnp.ones(7)
    with Compiling() as compiling:
        start = time.perf_counter()
        jax.jit(lambda a: jnp.sin(a) * 3 + 1)(x).block_until_ready()
        took = time.perf_counter() - start
        first = compiling.programs
    assert first == 1 and 0 < compiling.seconds <= took and compiling.from_cache == 0
    jax.jit(lambda a: jnp.cos(a) * 5)(x)
    assert compiling.programs == first


def test_spans_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function traced inside another, and programs compiled side by side."""
    compiling, clock = Compiling(), iter([10.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for seconds in (1.0, 4.0, 2.0, 0.5):  # 9-10 inside 8-12, 11-13 beside it, 19.5-20 apart
        compiling._took("/jax/core/compile/jaxpr_trace_duration", seconds)
    assert compiling.seconds == pytest.approx(5.5) and compiling.programs == 0


def test_what_comes_from_the_cache_is_told() -> None:
    with Compiling() as compiling:
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.25)
        jax.monitoring.record_event_duration_secs("/jax/other", 3.0)
    assert (compiling.programs, compiling.from_cache) == (1, 1)
    assert compiling.seconds == pytest.approx(0.25)
