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
from glm52_jax.sampling import SamplingState, sample
from glm52_jax.weights import Weights


@struct.dataclass
class DecodeState:
    """Everything a step reads and changes; donated to it and returned with the same shapes, so addresses stay.

    tokens int32 [batch]: next token to feed; positions int32 [batch]: its position; table int32 [batch, pages]: of the device that
    has the sequence, where devices have their own; cache; sampling.
    """

    tokens: jax.Array
    positions: jax.Array
    table: jax.Array
    cache: Cache
    sampling: SamplingState


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


@partial(jax.jit, static_argnames=("config", "plan"))
def first_token(
    weights: Weights, last: jax.Array, sampling: SamplingState, positions: jax.Array, config: Config, plan: Plan
) -> jax.Array:
    """The token after each prompt, int32 [batch], from ``last`` [batch, hidden]; positions: those tokens' positions."""

    def run(weights: Weights, last: jax.Array, sampling: SamplingState, positions: jax.Array) -> jax.Array:
        return parallel.all_tokens(sample(decoder.logits(weights, last, plan), sampling, positions), plan)

    inputs = (_weight_specs(weights, config, plan), *[parallel.batch_spec(plan)] * 3)
    return parallel.spread(run, plan.parallel, inputs, PartitionSpec())(weights, last, sampling, positions)


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="state")
def decode_step(weights: Weights, state: DecodeState, config: Config, plan: Plan) -> DecodeState:
    """Feeds one token of each sequence and draws the next; ``state.tokens`` of the result are the new tokens."""

    def run(weights: Weights, state: DecodeState) -> DecodeState:
        ones = jnp.ones_like(state.positions)
        rows = make_rows(config, state.table, state.positions, ones, 1)
        tokens = parallel.own_rows(state.tokens, ones.shape[0], plan)
        hidden, cache, _ = decoder.forward(weights, tokens[:, None], state.cache, rows, config, plan)
        positions = state.positions + 1
        tokens = sample(decoder.logits(weights, hidden[:, 0], plan), state.sampling, positions)
        return DecodeState(parallel.all_tokens(tokens, plan), positions, state.table, cache, state.sampling)

    specs = state_specs(plan)
    return parallel.spread(run, plan.parallel, (_weight_specs(weights, config, plan), specs), specs)(weights, state)


def state_specs(plan: Plan) -> DecodeState:
    """PartitionSpecs of a DecodeState."""
    batch: Any = parallel.batch_spec(plan)
    whole: Any = PartitionSpec()
    return DecodeState(whole, batch, batch, parallel.cache_spec(plan), batch)  # type: ignore[arg-type]


def _weight_specs(weights: Weights, config: Config, plan: Plan) -> Weights | None:
    return parallel.weight_specs(config, weights.mtp is not None, plan)
