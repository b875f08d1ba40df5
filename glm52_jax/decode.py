"""Compiled pieces of decoding: a chunk of prompt, and one step for a batch.

With a plan for several devices each of them is one program on all devices: weights, caches and, where devices have their own
sequences, everything else of a batch are split as ``parallel`` says; drawn tokens are whole on every device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from glm52_jax import model as decoder
from glm52_jax import mtp, parallel
from glm52_jax.cache import Cache, make_rows
from glm52_jax.config import Config
from glm52_jax.model import Taps
from glm52_jax.plan import Plan
from glm52_jax.sampling import SamplingState, sample_flagged
from glm52_jax.weights import Weights

# In ``DecodeState.drawn``: no token. What is below is ``~flags``: the flags of ``sample_logits`` for logits that are not finite.
NOTHING = -1


@struct.dataclass
class DecodeState:
    """Everything a step reads and changes; donated to it and returned with the same shapes, so addresses stay.

    A batch has ``width`` query rows for each sequence, those of a sequence together: rows = batch x width.

    tokens int32 [rows]: what is fed next: of each sequence its newest token, then ``width - 1`` drafts of what follows, NOTHING for
      none.
    positions int32 [batch]: of a sequence's newest token; -1 where there is no sequence: such rows write no key, see none, draw
      nothing and stay as they are, whatever their tokens and pages hold.
    table int32 [batch, pages]: of the device that has the sequence, where devices have their own.
    drawn int32 [rows]: what the last step added to each sequence, in order: tokens, then NOTHING. A value below NOTHING stands for
      logits that are not finite, which ends the sequence: its position is -1 from there on.
    logits float32 [rows, vocab] of the last step, or None where nobody asked for them.
    history int32 [burst, rows]: ``drawn`` of each step of the last call, where a call takes several, else None.
    """

    tokens: jax.Array
    positions: jax.Array
    table: jax.Array
    cache: Cache
    sampling: SamplingState
    drawn: jax.Array
    logits: jax.Array | None = None
    history: jax.Array | None = None


@partial(jax.jit, static_argnames=("config", "plan", "taps"), donate_argnames="cache")
def score_chunk(
    weights: Weights,
    cache: Cache,
    table: jax.Array,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    config: Config,
    plan: Plan,
    taps: bool = False,
) -> tuple[Taps, Cache]:
    """A chunk of each sequence: {"logits": float32 [batch, width, vocab]} and the taps, with the cache advanced.

    tokens int32 [batch, width]; starts, counts int32 [batch]: first position and number of real tokens of each row.
    """

    def run(
        weights: Weights, cache: Cache, table: jax.Array, tokens: jax.Array, starts: jax.Array, counts: jax.Array
    ) -> tuple[Taps, Cache]:
        rows = make_rows(config, table, starts, counts, tokens.shape[1])
        hidden, cache, found = decoder.forward(weights, tokens, cache, rows, config, plan, taps)
        return {"logits": decoder.logits(weights, hidden, plan), **found}, cache

    batch, pages = parallel.batch_spec(plan), parallel.cache_spec(plan)
    inputs = (_weight_specs(weights, config, plan), pages, *[batch] * 4)
    return parallel.spread(run, plan.parallel, inputs, (batch, pages))(weights, cache, table, tokens, starts, counts)


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="cache")
def draft_chunk(
    weights: Weights,
    cache: Cache,
    table: jax.Array,
    tokens: jax.Array,
    successors: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    config: Config,
    plan: Plan,
) -> tuple[Taps, Cache]:
    """As ``score_chunk``, with the logits of the MTP layer's draft; successors int32 [batch, width]: the tokens one further."""

    def run(
        weights: Weights,
        cache: Cache,
        table: jax.Array,
        tokens: jax.Array,
        successors: jax.Array,
        starts: jax.Array,
        counts: jax.Array,
    ) -> tuple[Taps, Cache]:
        rows = make_rows(config, table, starts, counts, tokens.shape[1])
        hidden, cache, _ = decoder.forward(weights, tokens, cache, rows, config, plan)
        hidden, cache = mtp.draft(weights, hidden, successors, cache, rows, config, plan)
        return {"logits": decoder.logits(weights, hidden, plan)}, cache

    batch, pages = parallel.batch_spec(plan), parallel.cache_spec(plan)
    inputs = (_weight_specs(weights, config, plan), pages, *[batch] * 5)
    return parallel.spread(run, plan.parallel, inputs, (batch, pages))(
        weights, cache, table, tokens, successors, starts, counts
    )


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames=("cache", "last"))
def prefill_chunk(
    weights: Weights,
    cache: Cache,
    last: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    config: Config,
    plan: Plan,
) -> tuple[Cache, jax.Array]:
    """Advances the cache by a chunk and keeps the hidden state of each sequence's last real token so far.

    last [batch, hidden]: carried from chunk to chunk; a sequence without real tokens in this chunk keeps its row.
    """

    def run(
        weights: Weights,
        cache: Cache,
        last: jax.Array,
        table: jax.Array,
        tokens: jax.Array,
        starts: jax.Array,
        counts: jax.Array,
    ) -> tuple[Cache, jax.Array]:
        rows = make_rows(config, table, starts, counts, tokens.shape[1])
        hidden, cache, _ = decoder.forward(weights, tokens, cache, rows, config, plan)
        at = jnp.maximum(counts - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
        return cache, jnp.where((counts > 0)[:, None], newest, last)

    batch, pages = parallel.batch_spec(plan), parallel.cache_spec(plan)
    inputs = (_weight_specs(weights, config, plan), pages, *[batch] * 5)
    return parallel.spread(run, plan.parallel, inputs, (pages, batch))(
        weights, cache, last, table, tokens, starts, counts
    )


@partial(jax.jit, static_argnames=("config", "plan", "width"))
def first_tokens(
    weights: Weights,
    last: jax.Array,
    sampling: SamplingState,
    lengths: jax.Array,
    config: Config,
    plan: Plan,
    width: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a DecodeState begins with, (tokens, positions, drawn): the token after each prompt, from ``last`` [batch, hidden].

    lengths int32 [batch]: of the prompts, 0 for rows without one. ``drawn`` holds NOTHING behind the first of ``width`` rows.
    """

    def run(
        weights: Weights, last: jax.Array, sampling: SamplingState, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        found, flags = sample_flagged(decoder.logits(weights, last, plan), sampling, lengths)
        drawn = jnp.where(lengths > 0, jnp.where(flags == 0, found, ~flags), NOTHING)
        positions = jnp.where(drawn >= 0, lengths, -1)
        drawn = parallel.all_tokens(drawn, plan)
        return _first_of(jnp.maximum(drawn, 0), width), positions, _first_of(drawn, width)

    batch, whole = parallel.batch_spec(plan), PartitionSpec()
    inputs = (_weight_specs(weights, config, plan), *[batch] * 3)
    return parallel.spread(run, plan.parallel, inputs, (whole, batch, whole))(weights, last, sampling, lengths)


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="state")
def decode_step(weights: Weights, state: DecodeState, config: Config, plan: Plan) -> DecodeState:
    """Feeds each sequence's rows and draws after each of them; as often as ``history`` has places, in a loop of the program.

    A drawn token counts where every draft before it is what the model drew, so a step adds one token to a sequence and one more for
    each right draft. Keys of wrong drafts lie behind the sequence's new position, where nothing sees them and the next step
    writes.
    """
    width = state.tokens.shape[0] // state.positions.shape[0]

    def one(weights: Weights, state: DecodeState) -> DecodeState:
        live = state.positions >= 0
        rows = make_rows(config, state.table, jnp.maximum(state.positions, 0), jnp.where(live, width, 0), width)
        fed = parallel.own_rows(state.tokens, live.shape[0] * width, plan).reshape(-1, width)
        hidden, cache, _ = decoder.forward(weights, fed, state.cache, rows, config, plan)
        found = decoder.logits(weights, hidden.reshape(live.shape[0] * width, -1), plan)
        draws = jax.tree.map(lambda a: _repeated(a, width), state.sampling)
        tokens, flags = sample_flagged(found, draws, rows.positions.reshape(-1) + 1)
        drawn = _counted(jnp.where(flags == 0, tokens, ~flags).reshape(-1, width), fed, live)
        positions = jnp.where(live & (drawn >= NOTHING).all(1), state.positions + _added(drawn), -1)
        drawn = parallel.all_tokens(drawn.reshape(-1), plan)
        tokens = _newest(state.tokens, drawn, width)
        drawn, kept = _in_place((state.drawn, state.logits), (drawn, None if state.logits is None else found))
        return DecodeState(tokens, positions, state.table, cache, state.sampling, drawn, kept, state.history)

    def run(weights: Weights, state: DecodeState) -> DecodeState:
        if state.history is None:
            return one(weights, state)

        def again(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
            after, number = one(weights, carry[0]), carry[1]
            assert after.history is not None
            return after.replace(history=after.history.at[number].set(after.drawn)), number + 1  # type: ignore[attr-defined]

        return parallel.repeated(again, (state, jnp.int32(0)), state.history.shape[0])[0]

    specs = state_specs(plan, logits=state.logits is not None, burst=state.history is not None)
    return parallel.spread(run, plan.parallel, (_weight_specs(weights, config, plan), specs), specs)(weights, state)


def _in_place[Tree](old: Tree, new: Tree) -> Tree:
    """``new``, in the buffers of ``old`` where that is donated: jit drops an argument that nothing reads, and reuses no buffer.

    XLA folds the choice away and reads nothing; a barrier instead would have it copy.
    """
    return jax.tree.map(lambda a, b: jnp.where(False, a, b), old, new)


def _counted(drawn: jax.Array, fed: jax.Array, live: jax.Array) -> jax.Array:
    """drawn [batch, width] with NOTHING where a draft before it was wrong; a fault is no token, so nothing follows it."""
    counts, kept = live, []
    for row in range(drawn.shape[1]):
        kept.append(jnp.where(counts, drawn[:, row], NOTHING))
        if row + 1 < drawn.shape[1]:
            counts = counts & (fed[:, row + 1] == drawn[:, row]) & (drawn[:, row] >= 0)
    return jnp.stack(kept, axis=1)


def _added(drawn: jax.Array) -> jax.Array:
    """Tokens int32 [batch] that were added to each sequence."""
    return jnp.sum((drawn >= 0).astype(jnp.int32), axis=1)


def _newest(tokens: jax.Array, drawn: jax.Array, width: int) -> jax.Array:
    """What is fed next: each sequence's last drawn token, the one it has where none was drawn, and no drafts."""
    if width == 1:
        return jnp.where(drawn >= 0, drawn, tokens)
    fed, drawn = tokens.reshape(-1, width), drawn.reshape(-1, width)
    last = jnp.take_along_axis(drawn, jnp.maximum(_added(drawn) - 1, 0)[:, None], axis=1)[:, 0]
    return _first_of(jnp.where(last >= 0, last, fed[:, 0]), width)


def _first_of(values: jax.Array, width: int) -> jax.Array:
    """int32 [batch * width]: each value, then NOTHING."""
    return jnp.pad(values[:, None], ((0, 0), (0, width - 1)), constant_values=NOTHING).reshape(-1)


def _repeated(values: jax.Array, width: int) -> jax.Array:
    return jnp.broadcast_to(values[:, None], (values.shape[0], width)).reshape(-1)


def state_specs(plan: Plan, logits: bool = False, burst: bool = False) -> DecodeState:
    """PartitionSpecs of a DecodeState; logits, burst: whether it keeps logits, and what several steps drew."""
    batch: Any = parallel.batch_spec(plan)
    whole: Any = PartitionSpec()
    cache: Any = parallel.cache_spec(plan)
    kept: Any = batch if logits else None
    return DecodeState(whole, batch, batch, cache, batch, whole, kept, whole if burst else None)


def _weight_specs(weights: Weights, config: Config, plan: Plan) -> Weights | None:
    return parallel.weight_specs(config, weights.mtp is not None, plan)
