"""Prompts in chunks: the same state however they are cut, within a memory that does not grow with the prompt."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax import decode, prefill, shapes
from glm52_jax.cache import make_cache
from glm52_jax.config import Config
from glm52_jax.plan import Plan
from pallas_kernels.compare import rel_l2
from tests.configs import GLM52_FP8
from tests.test_program import GREEDY, decoder, tiny

# A dense layer with an indexer and one with experts, of the real widths. The vocabulary is cut: of a prompt, only its last token
# meets the head.
REAL = dataclasses.replace(
    Config.from_hf(GLM52_FP8),
    num_hidden_layers=2,
    mlp_layer_types=("dense", "sparse"),
    indexer_types=("full", "shared"),
    num_nextn_predict_layers=0,
    vocab_size=1024,
)


@cache
def temporary(config: Config, batch: int, context: int) -> int:
    """Bytes that the largest call of a prefill needs beside weights and caches: of the references, compiled for the CPU."""
    plan, pages = Plan(cache="fp8"), prefill.pages_of(context)
    width = prefill.chunk_width(context, batch)
    caches = jax.eval_shape(lambda: make_cache(config, plan, batch * pages))
    last = jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.bfloat16)
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, pages), (batch, width), (batch,), (batch,))]

    def run(*args: Any) -> Any:
        return inspect.unwrap(decode.prefill_chunk)(*args, config=config, plan=plan)

    given = (shapes.abstract_weights(config), caches, last, *ints)
    memory = jax.jit(run, donate_argnums=(1, 2)).lower(*given).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.size for leaf in jax.tree.leaves(caches)), "the caches are copied"
    return memory.temp_size_in_bytes


def test_memory_of_a_long_prompt() -> None:
    """2048 rows at a time, at GLM-5.2's widths: 3.1 GiB, most of it weights that the references widen (all layers' at once, so two
    are looked at). The kernels need 0.5 GiB, in XLA's count for an H200 (one rank of tp8): 496 MiB with 5 layers, 512 with 9."""
    assert prefill.chunk_width(32768, 1) == 2048
    short = temporary(REAL, 1, 32768)
    print(f"{short / 2**30:.2f} GiB")
    assert short < 3.5 * 2**30
    # What grows with either would show.
    assert temporary(REAL, 64, 65536) < 1.1 * short, "it grows with the batch or the context"


def test_sizes_of_chunks_and_tables() -> None:
    assert [prefill.chunk_width(longest, 1) for longest in (1, 3, 64, 2048, 99999)] == [1, 4, 64, 2048, 2048]
    assert [prefill.chunk_width(9999, batch) for batch in (2, 3, 64, 4096)] == [1024, 512, 32, 1]
    assert [prefill.pages_of(n) for n in (1, 64, 65, 513, 1024, 1025, 2**20 + 128)] == [1, 1, 2, 16, 16, 18, 18432]
    for pages in range(1, 5000):
        assert pages <= prefill.pages_of(64 * pages) <= max(2 * pages, 16) and (
            pages <= 16 or prefill.pages_of(64 * pages) <= 1.125 * pages + 1
        )
    assert len({prefill.pages_of(64 * pages) for pages in range(1, 16385)}) < 100


def test_a_prompt_in_chunks_is_the_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, the longest in four calls: the same caches, tokens and later tokens."""
    model, made = tiny(), decoder(2)
    batch = [np.arange(size, dtype=np.int32) % 89 for size in (120, 45)]

    def state() -> decode.DecodeState:
        return prefill.prefill(model.weights, model.config, model.plan, batch, made.pages, GREEDY)

    whole = state()
    monkeypatch.setattr(prefill, "CHUNK_ROWS", 64)
    pieces = state()
    assert np.asarray(pieces.drawn).tolist() == np.asarray(whole.drawn).tolist()
    for a, b in zip(jax.tree.leaves(pieces.cache), jax.tree.leaves(whole.cache), strict=True):
        assert rel_l2(a, b) < 1e-5
    after = [np.array(list(made.tokens(made.adopt(one), 6))) for one in (whole, pieces)]
    assert np.array_equal(*after) and (after[0] >= 0).all()
