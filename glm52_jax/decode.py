"""Compiled pieces of decoding: a chunk of prompt, and one step for a batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from glm52_jax import model as decoder
from glm52_jax import mtp
from glm52_jax.cache import Cache, make_rows
from glm52_jax.config import Config
from glm52_jax.model import Taps
from glm52_jax.plan import Plan
from glm52_jax.sampling import SamplingState, sample
from glm52_jax.weights import Weights


@struct.dataclass
class DecodeState:
    """Everything a step reads and changes; donated to it and returned with the same shapes, so addresses stay.

    tokens int32 [batch]: next token to feed; positions int32 [batch]: its position; table int32 [batch, pages]; cache; sampling.
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
    rows = make_rows(config, table, starts, counts, tokens.shape[1])
    hidden, cache, found = decoder.forward(weights, tokens, cache, rows, config, plan, taps)
    return {"logits": decoder.logits(weights, hidden, plan), **found}, cache


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
    rows = make_rows(config, table, starts, counts, tokens.shape[1])
    hidden, cache, _ = decoder.forward(weights, tokens, cache, rows, config, plan)
    hidden, cache = mtp.draft(weights, hidden, successors, cache, rows, config, plan)
    return {"logits": decoder.logits(weights, hidden, plan)}, cache


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
    rows = make_rows(config, table, starts, counts, tokens.shape[1])
    hidden, cache, _ = decoder.forward(weights, tokens, cache, rows, config, plan)
    at = jnp.maximum(counts - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
    return cache, jnp.where((counts > 0)[:, None], newest, last)


@partial(jax.jit, static_argnames=("plan",))
def first_token(
    weights: Weights, last: jax.Array, sampling: SamplingState, positions: jax.Array, plan: Plan
) -> jax.Array:
    """The token after each prompt, int32 [batch], from ``last`` [batch, hidden]; positions: those tokens' positions."""
    return sample(decoder.logits(weights, last, plan), sampling, positions)


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="state")
def decode_step(weights: Weights, state: DecodeState, config: Config, plan: Plan) -> DecodeState:
    """Feeds one token of each sequence and draws the next; ``state.tokens`` of the result are the new tokens."""
    ones = jnp.ones_like(state.positions)
    rows = make_rows(config, state.table, state.positions, ones, 1)
    hidden, cache, _ = decoder.forward(weights, state.tokens[:, None], state.cache, rows, config, plan)
    positions = state.positions + 1
    tokens = sample(decoder.logits(weights, hidden[:, 0], plan), state.sampling, positions)
    return DecodeState(tokens, positions, state.table, cache, state.sampling)
