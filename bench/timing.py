"""How long one call takes on the device, and what the device can do at most.

The protocol, and why each step is there (figures of one H200):
  * clocks up first: the GPU idles at 345 MHz and a cold measurement is off by up to 2x. Copies do it; a matmul would leave
    the GPU hot, which costs memory-bound kernels about 10 %;
  * many calls chained in one jit (it becomes one CUDA graph), each on other weights, so that neither the L2 nor the
    launch of the graph is what is measured;
  * the chain's state is donated, so that addresses stay and the graph is replayed, not recorded again;
  * calls are queued and waited for once a round: a wait costs 0.3-1 ms. A round lasts at least 0.1 s, which makes that
    less than 1 %. Nothing is subtracted;
  * the median of the rounds, with their spread.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.operations import Operation

_ROUND_SECONDS = 0.1
# A link through an optimization barrier is free for what is small; large arrays stay out of it for fear of copies.
_LINK_BYTES = 1 << 23


@dataclasses.dataclass(frozen=True)
class Timing:
    """microseconds: median over the rounds, of one call. spread: (slowest - fastest round) / median. calls: in all."""

    microseconds: float
    spread: float
    calls: int
    rounds: tuple[float, ...]


class Repeat:
    """Something that can be run again and again on the device: ``run(n)`` queues it n times and waits once."""

    def __init__(self, step: Callable[[Any], Any], state: Any, calls_per_step: int) -> None:
        self.calls_per_step = calls_per_step
        self._step, self._state = step, state
        self.in_flight = 1

    def run(self, steps: int) -> float:
        """Returns the seconds that ``steps`` steps took, from the first being queued to the last being done."""
        state = self._state
        start = time.perf_counter()
        for _ in range(steps):
            state = self._step(state)
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - start
        self._state = state
        return elapsed

    def warm_up(self, round_seconds: float = _ROUND_SECONDS) -> None:
        """Compiles, records the graph (call 1 runs op by op, call 2 records, call 3 replays) and sizes the rounds."""
        for _ in range(4):
            self.run(1)
        once = max(self.run(5) / 5, 1e-7)
        self.in_flight = max(20, round(round_seconds / once))

    def round(self) -> float:
        """Microseconds of one call in one round."""
        return self.run(self.in_flight) / (self.in_flight * self.calls_per_step) * 1e6


def measure(repeats: Sequence[Repeat], rounds: int = 7, round_seconds: float = _ROUND_SECONDS) -> list[Timing]:
    """Times several things interleaved, round by round, so that they see the same clocks and temperature."""
    for repeat in repeats:
        repeat.warm_up(round_seconds)
    taken = [[repeat.round() for repeat in repeats] for _ in range(rounds)]
    timings = []
    for repeat, column in zip(repeats, zip(*taken, strict=True), strict=True):
        middle = statistics.median(column)
        calls = rounds * repeat.in_flight * repeat.calls_per_step
        timings.append(
            Timing(middle, (max(column) - min(column)) / middle, calls, tuple(round(us, 3) for us in column))
        )
    return timings


def chain(operation: Operation, spec: Any, backend: str, args: tuple[Any, ...], length: int) -> Repeat:
    """Repeats one jitted step of ``length`` calls of a backend; what it updates in place is a copy of its own."""
    step, carry, fixed = chain_step(operation, spec, backend, args, length)
    return Repeat(lambda state: step(*state, fixed), carry, length)


def chain_step(
    operation: Operation, spec: Any, backend: str, args: tuple[Any, ...], length: int
) -> tuple[Any, tuple[Any, jax.Array], dict[int, Any]]:
    """(step, carry, fixed): ``step(*carry, fixed)`` makes ``length`` calls and returns the next carry; carry is donated."""
    state, token, fixed = chain_arguments(operation, args)
    carry = tuple(jax.tree.map(jnp.copy, leaf) for leaf in state), jnp.zeros(token.shape, token.dtype)
    return chain_program(operation, spec, backend, length), carry, fixed


def chain_arguments(operation: Operation, args: tuple[Any, ...]) -> tuple[Any, jax.ShapeDtypeStruct, dict[int, Any]]:
    """What ``chain_program`` takes, made of an operation's arguments or of their shapes: state, token and the rest."""
    fixed = {i: leaf for i, leaf in enumerate(args) if i not in operation.state}
    return tuple(args[i] for i in operation.state), jax.ShapeDtypeStruct((), jnp.float32), fixed


def chain_program(operation: Operation, spec: Any, backend: str, length: int) -> Any:
    """The jitted step of a chain of ``length`` calls; one and the same where the operation remembers its functions."""
    return operation.remembered(("chain", spec, backend, length), lambda: _chain(operation, spec, backend, length))


def _chain(operation: Operation, spec: Any, backend: str, length: int) -> Any:
    function = operation.function(spec, backend)

    def step(state: tuple[Any, ...], token: jax.Array, fixed: dict[int, Any]) -> tuple[tuple[Any, ...], jax.Array]:
        given = {**fixed, **dict(zip(operation.state, state, strict=True))}
        current = tuple(given[i] for i in range(len(given)))
        kept = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)}
        seen = []
        for i in range(length):
            out = function(*current)
            # What is updated in place links the calls by itself, and looking at it would force a copy.
            own = [leaf for leaf in jax.tree.leaves(out) if (leaf.shape, leaf.dtype) not in kept]
            following = operation.advance(spec, current, out, i + 1)
            current, own = _link(following, own, operation.state)
            seen += [leaf.ravel()[0].astype(jnp.float32) for leaf in own]
        token = sum(seen, start=token)
        return tuple(current[i] for i in operation.state), token

    return jax.jit(step, donate_argnums=(0, 1))


def _link(
    args: tuple[Any, ...], own: list[jax.Array], state: tuple[int, ...]
) -> tuple[tuple[Any, ...], list[jax.Array]]:
    """Makes the small arguments of a call depend on the outputs of the one before, so that XLA can merge no two calls."""
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
    pinned = {n for n, (path, _) in enumerate(jax.tree.leaves_with_path(args)) if path[0].idx in state}
    small = [n for n, leaf in enumerate(leaves) if n not in pinned and leaf.size * leaf.dtype.itemsize <= _LINK_BYTES]
    linked, own = jax.lax.optimization_barrier(([leaves[n] for n in small], own))
    for n, leaf in zip(small, linked, strict=True):
        leaves[n] = leaf
    return jax.tree.unflatten(tree, leaves), own


def copies(size: int = 1 << 30) -> Repeat:
    """A device-to-device copy of ``size`` bytes into a donated buffer; it moves twice that."""
    copy = jax.jit(lambda source, target: jnp.copy(source), donate_argnums=1, keep_unused=True)
    source, target = jnp.ones(size // 4, jnp.int32), jnp.zeros(size // 4, jnp.int32)
    return Repeat(lambda into: copy(source, into), target, 1)


def raise_clocks(seconds: float = 0.5, size: int = 1 << 30) -> None:
    """Keeps the GPU busy with copies for that long."""
    repeat, end = copies(size), time.perf_counter() + seconds
    while time.perf_counter() < end:
        repeat.run(20)


def copy_bandwidth(rounds: int = 5, size: int = 1 << 30) -> float:
    """Bytes/s of a device-to-device copy, bytes read plus bytes written: the ceiling of what is memory-bound."""
    (timing,) = measure([copies(size)], rounds)
    return 2 * size / timing.microseconds * 1e6


def matmul_rate(rounds: int = 5, n: int = 8192) -> float:
    """FLOP/s of a square bf16 matmul on random data: the ceiling of what is compute-bound. Measure it last: it heats."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) * n**-0.5 for key in keys)
    # Whatever XLA_FLAGS say: without autotuning this matmul was 65 times slower, and it is the ceiling of others.
    multiply = jax.jit(jnp.matmul, donate_argnums=0, compiler_options={"xla_gpu_autotune_level": 4})
    # Short rounds, the fastest of them: a ceiling is what the GPU reaches before it heats up and throttles.
    (timing,) = measure([Repeat(lambda x: multiply(x, b), a, 1)], rounds, round_seconds=0.02)
    return 2 * n**3 / min(timing.rounds) * 1e6
