"""Prompts into the caches, a chunk at a time, and the state that decoding begins with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm52_jax import decode, parallel
from glm52_jax.cache import contiguous_table
from glm52_jax.config import Config
from glm52_jax.decode import DecodeState
from glm52_jax.plan import Plan
from glm52_jax.sampling import Sampling, sampling_state
from glm52_jax.weights import Weights
from pallas_kernels.paged import PAGE

# Prompt tokens of all sequences in one call: each call reads all weights, so few and large ones are fast; what a call needs
# beside the caches grows with its rows (see tests/test_prefill.py for how much at GLM-5.2's widths).
CHUNK_ROWS = 2048


def chunk_width(longest: int, batch: int) -> int:
    """Tokens of each sequence in one call: a power of two, so that few programs serve all lengths."""
    return max(1, min(power_of_two(longest), CHUNK_ROWS // power_of_two(batch)))


def pages_of(longest: int) -> int:
    """Pages of a sequence's block table: few different numbers, so that nearby lengths share one compiled program.

    A power of two up to 16 pages, then within an eighth of what is needed: 1M tokens have no room to waste.
    """
    pages = -(-longest // PAGE)
    if pages <= 16:
        return power_of_two(pages)
    step = power_of_two(pages) // 16
    return -(-pages // step) * step


def power_of_two(n: int) -> int:
    """The smallest one of at least n."""
    return 1 << (n - 1).bit_length()


def table_of(batch: int, pages: int, plan: Plan) -> jax.Array:
    """Block table [batch, pages] of sequences that follow each other in the cache of the device that has them."""
    devices = parallel.sequences(1, plan)
    return jnp.tile(contiguous_table(batch // devices, pages), (devices, 1))


def prefill(
    weights: Weights,
    config: Config,
    plan: Plan,
    prompts: Sequence[np.ndarray],
    pages: int,
    sampling: Sampling,
    width: int = 1,
) -> DecodeState:
    """A state in which each prompt is cached and its first token is drawn; an empty prompt is a row without a sequence.

    pages: of each sequence's block table, room for its prompt at least. width: query rows that each sequence's steps will have.
    """
    batch = list(prompts)
    batch += [np.zeros(0, np.int32)] * (parallel.sequences(len(batch), plan) - len(batch))
    lengths = np.array([len(ids) for ids in batch], np.int32)
    longest = int(lengths.max())
    last = jnp.zeros((len(batch), config.hidden_size), plan.activation)
    each = (table_of(len(batch), pages, plan), last, jnp.asarray(lengths), sampling_state(sampling, len(batch)))
    table, last, ends, draws = parallel.place(each, plan, parallel.batch_spec(plan))
    cache = parallel.new_cache(config, plan, len(batch) * pages)
    chunk = chunk_width(longest, len(batch))
    padded = np.zeros((len(batch), -(-longest // chunk) * chunk), np.int32)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = ids
    for start in range(0, longest, chunk):
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        tokens, starts = padded[:, start : start + chunk], np.full(len(batch), start, np.int32)
        cache, last = decode.prefill_chunk(
            weights, cache, last, table, tokens, starts, counts, config=config, plan=plan
        )
    tokens, positions, drawn = decode.first_tokens(weights, last, draws, ends, config=config, plan=plan, width=width)
    return DecodeState(tokens, positions, table, cache, draws, drawn)
