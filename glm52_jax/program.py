"""DecodeProgram: the decode step of one batch size as one executable, compiled before it is used.

A program's state is a class of its own: only the program makes such states, and it takes no other. What would let a graph be
recorded again, another bucket, plan or cache size, is then a TypeError and not a slow step.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm52_jax import decode, parallel
from glm52_jax.config import Config
from glm52_jax.decode import DecodeState
from glm52_jax.plan import Plan
from glm52_jax.sampling import Sampling, sampling_state
from glm52_jax.shapes import abstract_state
from glm52_jax.weights import Weights
from pallas_kernels import lowering, registry
from pallas_kernels.arch import Arch
from pallas_kernels.registry import Choice

# Rows of a step that programs are compiled for: one query row for each sequence.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def bucket(rows: int) -> int:
    """The smallest of ``BUCKETS`` that holds ``rows``; ValueError for more than the largest."""
    for size in BUCKETS:
        if 1 <= rows <= size:
            return size
    raise ValueError(f"{rows=} must lie in 1..{BUCKETS[-1]}, the rows that decode programs are compiled for")


class State:
    """What one DecodeProgram keeps on the device; made by it, and used up by the step that takes it.

    Each program has a subclass of its own, ``program.State``.
    """

    __slots__ = ("_arrays",)
    _arrays: DecodeState | None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made by its program: call adopt() or fresh() of the DecodeProgram")

    @classmethod
    def _made(cls, arrays: DecodeState) -> Self:
        state = object.__new__(cls)
        state._arrays = arrays
        return state

    @property
    def arrays(self) -> DecodeState:
        """The arrays, still owned by this state; ValueError once a step took them."""
        if self._arrays is None:
            raise ValueError(
                "this state was already given to a step, which took its buffers: use the state it returned"
            )
        return self._arrays

    def _taken(self) -> DecodeState:
        arrays, self._arrays = self.arrays, None
        return arrays


class DecodeProgram:
    """One decode step of ``rows`` sequences, compiled for the shapes of these weights.

    Args:
      weights: the model's; never donated. config, plan: what the step is traced with.
      rows: sequences of the batch; any number, ``BUCKETS`` are those that ``generate`` uses.
      pages: pages of 64 tokens in each sequence's block table. pool: pages of the cache, rows * pages unless given.
      dump: a folder for XLA's dump of this executable, for ``audit``.

    The step is traced and compiled once, here; programs of the same shapes share the executable. ``choices`` are the backends that
    it took, in the order of the calls.
    """

    def __init__(
        self,
        weights: Weights,
        config: Config,
        plan: Plan,
        rows: int,
        pages: int,
        pool: int | None = None,
        dump: Path | None = None,
    ) -> None:
        if rows < 1 or pages < 1 or rows != parallel.sequences(rows, plan):
            raise ValueError(f"{rows=} and {pages=} must be positive, and rows divide over the devices of {plan}")
        self.config, self.plan, self.rows, self.pages, self.pool = config, plan, rows, pages, pool or rows * pages
        self.weights, self.dump = weights, dump
        self.State = type(f"StateOf{rows}Rows", (State,), {"__slots__": ()})
        self.avals = abstract_state(config, plan, rows, pages, self.pool)
        leaves, structure = jax.tree.flatten(weights)
        sizes = (rows, pages, self.pool, tuple(map(_aval, leaves)), structure, lowering.default_arch())
        build = _build.__wrapped__ if dump else _build
        built = build(config, plan, *sizes, dump)
        self.executable, self._copy, self.choices, self._count = built

    @property
    def traces(self) -> int:
        """How often the step's Python was traced: once, however many steps ran."""
        return self._count[0]

    def adopt(self, arrays: DecodeState) -> State:
        """Makes a state of arrays, which are the program's from here on; ValueError names those that do not fit."""
        wrong = [
            f"{jax.tree_util.keystr(path, simple=True, separator='.')} is {array.dtype}{list(array.shape)}, "
            f"not {aval.dtype}{list(aval.shape)}"
            for (path, aval), array in zip(jax.tree.leaves_with_path(self.avals), jax.tree.leaves(arrays), strict=True)
            if (array.shape, array.dtype) != (aval.shape, aval.dtype)
        ]
        if wrong:
            raise ValueError(
                f"a state of a program of {self.rows} rows and {self.pages} pages each: {'; '.join(wrong)}"
            )
        return self.State._made(arrays)

    def fresh(self, sampling: Sampling | None = None) -> State:
        """A state of empty sequences: token 0 at position 0, zeroed caches, sequence b in pages b * pages onward."""
        rows, plan = self.rows, self.plan
        devices = parallel.sequences(1, plan)
        table = np.arange(rows // devices * self.pages, dtype=np.int32).reshape(-1, self.pages)
        each = (jnp.zeros(rows, jnp.int32), jnp.asarray(np.tile(table, (devices, 1))))
        each = (*each, sampling_state(sampling or Sampling(), rows))
        positions, table, draws = parallel.place(each, plan, parallel.batch_spec(plan))
        tokens = parallel.place(jnp.zeros(rows, jnp.int32), plan, PartitionSpec())
        return self.adopt(
            DecodeState(tokens, positions, table, parallel.new_cache(self.config, plan, self.pool), draws)
        )

    def release(self, state: State) -> DecodeState:
        """The arrays of a state, which is used up: for changing them in place, and adopting them again."""
        self._check(state)
        return state._taken()

    def _check(self, state: State) -> None:
        if type(state) is not self.State:
            raise TypeError(
                f"{type(state).__name__} was not made by this program of {self.rows} rows and {self.pages} pages each: "
                "states stay with their program"
            )

    def step(self, state: State) -> State:
        """Feeds one token of each sequence and draws the next, without waiting; ``state`` is used up."""
        self._check(state)
        return self.State._made(self.executable(self.weights, state._taken()))

    def tokens(self, state: State, steps: int, lag: int = 2) -> Iterator[np.ndarray]:
        """The state's tokens and those of ``steps`` further steps, each int32 [rows].

        lag: while the host reads a step's tokens, so many later ones are queued already. The device runs ahead by no more than
        that: closing the iterator stops it.
        """
        waiting = deque([self.copied(state)])
        for _ in range(steps):
            state = self.step(state)
            waiting.append(self.copied(state))
            if len(waiting) > lag:
                yield np.asarray(waiting.popleft())
        while waiting:
            yield np.asarray(waiting.popleft())

    def copied(self, state: State) -> jax.Array:
        """The state's tokens as an array that outlives its next step, on its way to the host."""
        tokens = self._copy(state.arrays.tokens)
        tokens.copy_to_host_async()
        return tokens


@functools.lru_cache(maxsize=64)
def _build(
    config: Config,
    plan: Plan,
    rows: int,
    pages: int,
    pool: int,
    avals: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    arch: Arch | None,
    dump: Path | None,
) -> tuple[Any, Any, tuple[Choice, ...], list[int]]:
    """(step, copy of its tokens, choices, [traces]), compiled; kept without weights, so that they can be let go. arch: a key."""
    count = [0]

    def traced(weights: Weights, state: DecodeState) -> DecodeState:
        count[0] += 1
        return inspect.unwrap(decode.decode_step)(weights, state, config=config, plan=plan)

    state = abstract_state(config, plan, rows, pages, pool)
    with registry.recorded() as found:
        lowered = jax.jit(traced, donate_argnums=1).lower(jax.tree.unflatten(structure, avals), state)
    options = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} if dump else None
    step = lowered.compile(compiler_options=options)  # type: ignore[arg-type]
    # The state's tokens are donated to the next step, so what the host reads is a copy, made outside of the step's graph: an
    # output of the step itself would alternate addresses, and XLA would update the graph in every step.
    copy = jax.jit(jnp.copy).lower(state.tokens).compile()
    return step, copy, tuple(found), count


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


def _aval(array: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(array, "sharding", None)
    return jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None
    )
