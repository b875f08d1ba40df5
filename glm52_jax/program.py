"""DecodeProgram: the decode step of one batch size as one executable, compiled before it is used.

A program's state is a class of its own: only the program makes such states, and it takes no other. What would let a graph be
recorded again, another bucket, plan or cache size, is then a TypeError and not a slow step.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm52_jax import decode, exchange, parallel
from glm52_jax.config import Config
from glm52_jax.decode import NOTHING, DecodeState
from glm52_jax.plan import Plan
from glm52_jax.sampling import Sampling, sampling_state
from glm52_jax.shapes import abstract_state
from glm52_jax.small_places import small_places
from glm52_jax.weights import Weights
from glm52_jax.xla_options import step_options
from pallas_kernels import lowering, registry
from pallas_kernels.arch import Arch
from pallas_kernels.registry import Choice
from pallas_kernels.sample_logits import HAS_INF, HAS_NAN

_FAULTS = {HAS_NAN: "NaN", HAS_INF: "infinity"}


def fault(drawn: int) -> str:
    """What an entry of ``drawn`` says was in a row's logits, such as "NaN"; "" where they were finite."""
    found = [text for flag, text in _FAULTS.items() if drawn < NOTHING and ~drawn & flag]
    return " and ".join(found) or ("minus infinity alone" if drawn < NOTHING else "")


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

    Rows of the batch may hold no sequence (``DecodeState.positions``): a smaller batch runs in a larger program.

    Args:
      weights: the model's; never donated. config, plan: what the step is traced with.
      rows: sequences of the batch; any number, ``buckets.BUCKETS`` are those that ``generate`` uses (of sequences x query rows).
      pages: pages of 64 tokens in each sequence's block table. pool: pages of the cache, rows * pages unless given.
      dump: a folder for XLA's dump of this executable, for ``audit``.
      width: query rows of each sequence: its newest token and ``width - 1`` drafts, which ``with_drafts`` sets before each step.
      logits: whether the state keeps the logits of every row, ``state.arrays.logits``.
      burst: steps of one call of ``step``, in a loop of the program, so that the host queues all of them at the price of one. The
        host sees their tokens together, and the last call goes on past what is asked of it: its steps need room too.

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
        width: int = 1,
        logits: bool = False,
        burst: int = 1,
    ) -> None:
        if min(rows, pages, width, burst) < 1 or rows != parallel.sequences(rows, plan):
            raise ValueError(
                f"{rows=}, {pages=}, {width=} and {burst=} must be positive, and rows divide over the devices of {plan}"
            )
        if width > 1 and burst > 1:
            raise ValueError(f"{width=} has drafts, which are set between steps: {burst=} must be 1")
        self.config, self.plan, self.rows, self.pages, self.pool = config, plan, rows, pages, pool or rows * pages
        self.weights, self.dump, self.width, self.burst = weights, dump, width, burst
        self.State = type(f"StateOf{rows}Rows", (State,), {"__slots__": ()})
        self.avals = abstract_state(config, plan, rows, pages, self.pool, width, logits, burst)
        leaves, structure = jax.tree.flatten(weights)
        state, sizes = jax.tree.flatten(self.avals)
        shapes = (tuple(map(_aval, leaves)), structure, tuple(map(_aval, state)), sizes, lowering.default_arch())
        build = _build.__wrapped__ if dump else _build
        built = build(config, plan, *shapes, dump)
        self.executable, self._copies, self._draft, self.choices, self._count = built
        if isinstance(weights.norm, jax.Array) and next(iter(weights.norm.devices())).platform == "gpu":
            small_places(weights.norm.sharding)

    @property
    def traces(self) -> int:
        """How often the step's Python was traced: once, however many steps ran."""
        return self._count[0]

    def adopt(self, arrays: DecodeState) -> State:
        """Makes a state of arrays, which are the program's from here on; ValueError names those that do not fit.

        Where the program keeps logits or several steps' tokens and the arrays hold none, they begin as zeros.
        """
        new = {
            "logits": self._zeros(self.avals.logits, parallel.batch_spec(self.plan))
            if arrays.logits is None
            else arrays.logits,
            "history": self._zeros(self.avals.history, PartitionSpec()) if arrays.history is None else arrays.history,
        }
        arrays = arrays.replace(**new)  # type: ignore[attr-defined]
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

    def fresh(self, sampling: Sampling | None = None, positions: int = 0) -> State:
        """A state of sequences that begin: token 0 at position 0, zeroed caches, sequence b in pages b * pages onward.

        positions: -1 for a state without sequences.
        """
        rows, plan = self.rows, self.plan
        devices = parallel.sequences(1, plan)
        table = np.arange(rows // devices * self.pages, dtype=np.int32).reshape(-1, self.pages)
        each = (jnp.full(rows, positions, jnp.int32), jnp.asarray(np.tile(table, (devices, 1))))
        each = (*each, sampling_state(sampling or Sampling(), rows))
        where, table, draws = parallel.place(each, plan, parallel.batch_spec(plan))
        first = np.full((rows, self.width), NOTHING, np.int32)
        first[:, 0] = 0
        drawn = first if positions >= 0 else np.full_like(first, NOTHING)
        tokens, drawn = parallel.place(tuple(jnp.asarray(a.reshape(-1)) for a in (first, drawn)), plan, PartitionSpec())
        cache = parallel.new_cache(self.config, plan, self.pool)
        return self.adopt(DecodeState(tokens, where, table, cache, draws, drawn))

    def _zeros(self, aval: Any, where: PartitionSpec) -> jax.Array | None:
        return None if aval is None else parallel.place(jnp.zeros(aval.shape, aval.dtype), self.plan, where)

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
        """Feeds the tokens of each sequence and draws the next, ``burst`` times, without waiting; ``state`` is used up."""
        self._check(state)
        return self.State._made(self.executable(self.weights, state._taken()))

    def with_drafts(self, state: State, drafts: jax.Array | np.ndarray) -> State:
        """The state with other drafts, set in place: int32 [rows, width - 1], NOTHING for none; ``state`` is used up.

        ValueError for another shape. The next step feeds them behind each sequence's newest token, and keeps those that the model
        draws itself.
        """
        self._check(state)
        if drafts.shape != (self.rows, self.width - 1) or drafts.dtype != np.int32:
            raise ValueError(f"drafts {drafts.dtype}{list(drafts.shape)} must be int32{[self.rows, self.width - 1]}")
        arrays = state._taken()
        tokens = self._draft(arrays.tokens, drafts)
        return self.State._made(arrays.replace(tokens=tokens))  # type: ignore[attr-defined]

    def tokens(self, state: State, steps: int, lag: int = 2) -> Iterator[np.ndarray]:
        """What the state and each of ``steps`` further steps drew, int32 [rows x width] as ``DecodeState.drawn`` holds it.

        lag: while the host reads a call's tokens, so many later calls are queued already. The device runs ahead by no more than
        that: closing the iterator stops it.
        """
        waiting, left = deque([self._sent(state.arrays.drawn)]), steps + 1
        for _ in range(-(-steps // self.burst)):
            state = self.step(state)
            waiting.append(self.copied(state))
            if len(waiting) > lag:
                read = np.asarray(waiting.popleft()).reshape(-1, self.rows * self.width)
                left -= len(read)
                yield from read
        while waiting:
            read = np.asarray(waiting.popleft()).reshape(-1, self.rows * self.width)[:left]
            left -= len(read)
            yield from read

    def copied(self, state: State) -> jax.Array:
        """What the state drew as an array that outlives its next step, on its way to the host: int32 [rows x width], and with a
        ``burst`` [burst, rows]."""
        arrays = state.arrays
        return self._sent(arrays.drawn if arrays.history is None else arrays.history)

    def _sent(self, drawn: jax.Array) -> jax.Array:
        copy = self._copies[drawn.ndim](drawn)
        copy.copy_to_host_async()
        return copy


@functools.lru_cache(maxsize=64)
def _build(
    config: Config,
    plan: Plan,
    weights: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    state: tuple[jax.ShapeDtypeStruct, ...],
    sizes: Any,
    arch: Arch | None,
    dump: Path | None,
) -> tuple[Any, Any, Any, tuple[Choice, ...], list[int]]:
    """(step, copies of what it drew by dimensions, drafts into tokens, choices, [traces]), compiled; kept without weights, so that
    they can be let go. arch: the GPU it is for, None for a CPU."""
    count = [0]

    def traced(weights: Weights, state: DecodeState) -> DecodeState:
        count[0] += 1
        return inspect.unwrap(decode.decode_step)(weights, state, config=config, plan=plan)

    given = jax.tree.unflatten(sizes, state)
    with registry.recorded() as found:
        lowered = exchange.Lowered(traced, plan.parallel, jax.tree.unflatten(structure, weights), given)
    devices = 1 if plan.parallel is None else plan.parallel.devices
    step = lowered.compile(compiler_options=step_options(arch, dump, devices))
    # The state is donated to the next step, so what the host reads is a copy, made outside of the step's graph: an output of the
    # step itself would alternate addresses, and XLA would update the graph in every step.
    kept = (given.drawn, given.history)
    copies = {array.ndim: jax.jit(jnp.copy).lower(array).compile() for array in kept if array is not None}
    return step, copies, _drafts(given), tuple(found), count


def _drafts(state: DecodeState) -> Any:
    """Compiled, for states with drafts: (tokens, drafts [batch, width - 1]) -> tokens, in place."""
    batch, width = state.positions.shape[0], state.tokens.shape[0] // state.positions.shape[0]
    if width == 1:
        return None

    def run(tokens: jax.Array, drafts: jax.Array) -> jax.Array:
        return tokens.reshape(batch, width).at[:, 1:].set(drafts).reshape(-1)

    where = state.tokens.sharding
    drafts = jax.ShapeDtypeStruct((batch, width - 1), jnp.int32, sharding=where)
    return jax.jit(run, donate_argnums=0, out_shardings=where).lower(state.tokens, drafts).compile()


def _aval(array: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(array, "sharding", None)
    return jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None
    )
