"""Sequences that begin and end in the rows of a running program, while the other rows go on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm52_jax import decode, parallel
from glm52_jax.cache import Cache
from glm52_jax.decode import DecodeState
from glm52_jax.program import DecodeProgram, State
from glm52_jax.sampling import Sampling, SamplingState
from glm52_jax.weights import Weights
from pallas_kernels.paged import PAGE


class Slots:
    """Starts and stops sequences in a program's rows, in place: no address of its state changes, so its graph is replayed.

    Args:
      program: of a plan whose devices share every sequence (ValueError for "ep+dp", where each row has a device of its own).
      chunks: tokens of a prompt in one call, sizes that are compiled here; a prompt goes through the largest that it fills, its
        end through the smallest that holds it.

    Everything is compiled when this is made; make it before the program's first step.
    """

    def __init__(self, program: DecodeProgram, chunks: Sequence[int] = (64, 512)) -> None:
        share = program.plan.parallel
        if share is not None and share.own_sequences:
            raise ValueError(f"rows of a program of {share.mode!r} belong to devices: start all sequences together")
        if not chunks or min(chunks) < 1:
            raise ValueError(f"{chunks=} must be sizes of at least 1")
        self.program, self.chunks = program, tuple(sorted(set(chunks)))
        state, scalar = program.avals, np.int32(0)
        self._prefill = {}
        for width in self.chunks:
            prompt = (np.zeros((1, width), np.int32), scalar, scalar, scalar)
            given = (program.weights, state.cache, self._no_hidden(), state.table, *prompt)
            self._prefill[width] = self._compiled(self._chunk, (1, 2), given)
        kept = (state.tokens, state.positions, state.drawn, state.sampling)
        begin = (program.weights, kept, self._no_hidden(), scalar, scalar, _numbers(Sampling(), 0))
        self._begin = self._compiled(self._enter, (1,), begin)
        self._end = self._compiled(
            lambda positions, rows: jnp.where(rows, -1, positions),
            (0,),
            (state.positions, np.zeros(program.rows, bool)),
        )

    def start(
        self, state: State, row: int, ids: Sequence[int], sampling: Sampling | None = None, number: int = 0
    ) -> State:
        """The state with a new sequence in ``row``, whatever was there: its prompt cached, its first token in ``drawn``.

        number: its draws are those of sequence ``number`` in a batch of this seed. ``state`` is used up. ValueError for a row or a
        prompt that the program has no room for.
        """
        program, tokens = self.program, np.asarray(ids, np.int32)
        if not 0 <= row < program.rows:
            raise ValueError(f"{row=} must be one of the program's {program.rows} rows")
        if not 0 < len(tokens) < program.pages * PAGE:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens must have 1..{program.pages * PAGE - 1}: room for one more"
            )
        arrays = program.release(state)
        cache, last = arrays.cache, self._no_hidden()
        for start, count, width in pieces(len(tokens), self.chunks):
            piece = np.pad(tokens[None, start : start + count], ((0, 0), (0, width - count)))
            where = (np.int32(row), np.int32(start), np.int32(count))
            cache, last = self._prefill[width](program.weights, cache, last, arrays.table, piece, *where)
        kept = (arrays.tokens, arrays.positions, arrays.drawn, arrays.sampling)
        how = _numbers(sampling or Sampling(), number)
        fed, positions, drawn, draws = self._begin(
            program.weights, kept, last, np.int32(row), np.int32(len(tokens)), how
        )
        kept = (arrays.logits, arrays.history)
        return program.adopt(DecodeState(fed, positions, arrays.table, cache, draws, drawn, *kept))

    def stop(self, state: State, rows: Sequence[int]) -> State:
        """The state without the sequences in these rows; ``state`` is used up."""
        arrays, ended = self.program.release(state), np.zeros(self.program.rows, bool)
        ended[list(rows)] = True
        return self.program.adopt(arrays.replace(positions=self._end(arrays.positions, ended)))  # type: ignore[attr-defined]

    def _no_hidden(self) -> jax.Array:
        program = self.program
        zeros = jnp.zeros((1, program.config.hidden_size), program.plan.activation)
        return parallel.place(zeros, program.plan, PartitionSpec())

    def _compiled(self, run: Any, donated: tuple[int, ...], given: tuple[Any, ...]) -> Any:
        """``run`` for these shapes; what is donated comes back where it was."""
        where: dict[str, Any] = {}
        if self.program.plan.parallel is not None:
            shardings = [jax.tree.map(lambda a: a.sharding, given[i]) for i in donated]
            where = {"out_shardings": shardings[0] if len(shardings) == 1 else tuple(shardings)}
        return jax.jit(run, donate_argnums=donated, **where).lower(*given).compile()

    def _chunk(
        self,
        weights: Weights,
        cache: Cache,
        last: jax.Array,
        table: jax.Array,
        tokens: jax.Array,
        row: jax.Array,
        start: jax.Array,
        count: jax.Array,
    ) -> tuple[Cache, jax.Array]:
        own = jax.lax.dynamic_slice_in_dim(table, row, 1)
        given = (weights, cache, last, own, tokens, start[None], count[None])
        return inspect.unwrap(decode.prefill_chunk)(*given, config=self.program.config, plan=self.program.plan)

    def _enter(
        self,
        weights: Weights,
        kept: tuple[jax.Array, jax.Array, jax.Array, SamplingState],
        last: jax.Array,
        row: jax.Array,
        length: jax.Array,
        how: dict[str, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, SamplingState]:
        tokens, positions, drawn, draws = kept
        program, width = self.program, self.program.width
        key = jax.random.fold_in(jax.random.key(how["seed"]), how["number"])
        own = SamplingState(how["temperature"], how["top_k"], how["top_p"], how["min_p"], key)
        first = inspect.unwrap(decode.first_tokens)(
            *(weights, last, jax.tree.map(lambda a: a[None], own), length[None]),
            config=program.config,
            plan=program.plan,
            width=width,
        )
        fed, position, new = first
        draws = jax.tree.map(lambda a, b: a.at[row].set(b), draws, own)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, fed, row * width, 0)
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, new, row * width, 0)
        return tokens, positions.at[row].set(position[0]), drawn, draws


def pieces(length: int, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, tokens, size of the call) of a prompt's calls; chunks ascend."""
    found, start = list[tuple[int, int, int]](), 0
    while start < length:
        left = length - start
        # The largest that is filled; an end that fills none goes through the smallest, which is larger than it.
        width = max((chunk for chunk in chunks if chunk <= left), default=chunks[0])
        found.append((start, min(width, left), width))
        start += width
    return found


def _numbers(sampling: Sampling, number: int) -> dict[str, np.generic]:
    return {
        "temperature": np.float32(sampling.temperature),
        "top_k": np.int32(min(sampling.top_k, 2**31 - 1)),
        "top_p": np.float32(sampling.top_p),
        "min_p": np.float32(sampling.min_p),
        "seed": np.uint32(sampling.seed),
        "number": np.uint32(number),
    }
