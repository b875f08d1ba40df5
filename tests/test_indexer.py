"""The indexer of a layer: pieces of a long prefill, its memory, short contexts, and what a shared layer does not do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm52_jax import decode
from glm52_jax.cache import Rows, contiguous_table, make_cache, make_rows
from glm52_jax.config import Config
from glm52_jax.layers import indexer
from glm52_jax.plan import Plan
from glm52_jax.weights import IndexerWeights, weight_leaves
from pallas_kernels import arch, lowering, registry
from pallas_kernels.blocks import BlockScaled
from tests.configs import GLM52
from tests.fixtures_util import BY_NAME, reference_model

REAL = Config.from_hf(GLM52)
GIB = 1 << 30


def search(
    model: Any, starts: list[int], counts: list[int], width: int, pages: int, seed: int = 0
) -> tuple[indexer.Selection, np.ndarray]:
    """Selection and key cache of the first full layer of a model, from random hidden states over random earlier keys."""
    config, plan = model.config, model.plan
    batch = len(starts)
    table = contiguous_table(batch, pages)
    rows = make_rows(config, table, jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32), width)
    rng = np.random.default_rng(seed)
    cache = make_cache(config, plan, batch * pages).index_keys
    cache = jnp.asarray(rng.normal(size=cache.shape), cache.dtype)
    latent = jnp.asarray(rng.normal(size=(batch * width, config.q_lora_rank)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch * width, config.hidden_size)), jnp.float32)
    run = jax.jit(lambda: indexer.select(model.weights.indexer, 0, latent, x, cache, rows, config, plan))
    return run()


@pytest.mark.parametrize("starts,counts", [([70], [12]), ([70, 3, 0], [12, 5, 12])])
def test_pieces_of_a_prefill_select_what_the_whole_does(
    monkeypatch: pytest.MonkeyPatch, starts: list[int], counts: list[int]
) -> None:
    model = reference_model("long")
    whole, keys = search(model, starts, counts, 12, 2)
    for piece in (4, 1):
        monkeypatch.setattr(indexer, "SCORE_BYTES", 4 * len(starts) * 2 * 64 * piece)
        assert indexer.query_rows_at_once(len(starts), 12, 128) == piece
        parts, other = search(model, starts, counts, 12, 2)
        for a, b in zip(jax.tree.leaves((whole, keys)), jax.tree.leaves((parts, other)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("batch", "width", "span", "rows"),
    [
        (1, 512, 131072, 256),
        (1, 4096, 131072, 256),
        (1, 512, 1048576, 32),
        (32, 1, 1048576, 1),
        (1, 510, 1048576, 30),
        (1, 4096, 4096, 1024),
        (4, 512, 4096, 256),
    ],
)
def test_rows_at_once(batch: int, width: int, span: int, rows: int) -> None:
    assert indexer.query_rows_at_once(batch, width, span) == rows
    assert rows == 1 or 4 * batch * rows * span <= indexer.SCORE_BYTES
    assert batch * rows <= indexer.SEARCH_ROWS


def indexer_shapes(layers: int) -> IndexerWeights:
    """The real weights' shapes in their FP8 form."""
    leaves = weight_leaves(REAL, mtp=False).indexer

    def stacked(leaf: Any) -> Any:
        shape = (layers, *leaf.shape[1:])
        if leaf.kind != "linear" or shape[1] == REAL.index_n_heads:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        grid = (layers, *(-(-n // 128) for n in shape[1:]))
        return BlockScaled(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(grid, jnp.float32))  # type: ignore[arg-type]

    return jax.tree.map(stacked, leaves)


def real_arguments(width: int, tokens: int, batch: int = 1) -> tuple[Any, ...]:
    """Shapes of (key cache, weights, latent, x, rows) of one layer at the real sizes."""
    pages, plan = tokens // 64, Plan(cache="fp8")
    cache = jax.eval_shape(lambda: make_cache(REAL, plan, batch * pages))
    keys = jax.ShapeDtypeStruct((1, *cache.index_keys.shape[1:]), jnp.uint8)
    start = jnp.zeros(batch, jnp.int32)
    rows = jax.eval_shape(lambda: make_rows(REAL, contiguous_table(batch, pages), start, start, width))
    sides = [jax.ShapeDtypeStruct((batch * width, n), jnp.bfloat16) for n in (REAL.q_lora_rank, REAL.hidden_size)]
    return keys, indexer_shapes(1), *sides, rows


def run_real(keys: jax.Array, weights: IndexerWeights, latent: jax.Array, x: jax.Array, rows: Rows) -> Any:
    return indexer.select(weights, 0, latent, x, keys, rows, REAL, Plan(cache="fp8"))


@pytest.mark.parametrize("width", [512, 4096])
def test_memory_of_a_long_prefill(width: int) -> None:
    """The last calls of a 128K prefill, compiled: at most 1 GiB beside the caches, selection included."""
    args = real_arguments(width, 131072)
    compiled = jax.jit(run_real, donate_argnums=0).lower(*args).compile()
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert memory.alias_size_in_bytes >= args[0].size, "the key cache is not updated in place"
    print(f"{width=}: {size / 2**20:.0f} MiB beside the caches")
    assert size <= GIB, f"{size / 2**20:.0f} MiB"
    assert size >= indexer.SCORE_BYTES, "the scores are not in the count"


@pytest.mark.needs_triton
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (32, 1), (1, 4096)])
@pytest.mark.parametrize("gpu", ["A100-80", "H200-141"])
def test_lowers_to_kernels_that_need_no_sort(gpu: str, batch: int, width: int) -> None:
    text = lowering.lower_for_cuda(
        lambda *args: run_real(*args), *real_arguments(width, 131072, batch), arch=arch.by_name(gpu)
    )
    # Two of keys, two of queries or both sides in two, logits, at most two of the selection; fp8_linear may be another language.
    assert 4 <= text.count("triton_kernel_call") <= 8
    found = [word for word in ("sort", "top_k(", "chlo.top_k", "approx_top_k") if word in text]
    assert not found, found


def test_short_contexts_select_everything_without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference_model("long")
    config = dataclasses.replace(model.config, index_topk=128)
    full, keys = search(model.replace(config=config), [70, 3, 0], [12, 5, 12], 12, 2)
    monkeypatch.setattr(indexer, "_search", None)
    monkeypatch.setattr(indexer.index_keys, "query", None)
    again, other = search(model.replace(config=config), [70, 3, 0], [12, 5, 12], 12, 2)
    np.testing.assert_array_equal(np.asarray(full.slots), np.asarray(again.slots))
    np.testing.assert_array_equal(np.asarray(keys), np.asarray(other))
    # Row 2 of sequence 1 sees six keys; its sequence owns slots 128 onward.
    assert np.asarray(full.positions)[1, 2].tolist() == [*range(6), *[-1] * 122]
    assert np.asarray(full.slots)[1, 2, :7].tolist() == [*range(128, 134), -1]
    assert (np.asarray(full.positions)[1, 5:] == -1).all()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_shared_layers_cost_nothing(name: str) -> None:
    """One call of each indexer operation a full layer, and weights and keys of full layers only."""
    model = reference_model(name)
    config, full = model.config, len(model.config.full_layers)
    step = functools.partial(decode.score_chunk.__wrapped__, config=config, plan=model.plan)
    cache, one = make_cache(config, model.plan, 2), jax.ShapeDtypeStruct((1,), jnp.int32)
    table, tokens = contiguous_table(1, 2), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with registry.recorded() as choices:
        jax.eval_shape(step, model.weights, cache, table, tokens, one, one)
    names = [choice.operation for choice in choices]
    assert [names.count(name) for name in ("index_keys", "mqa_logits", "top_k")] == [full] * 3
    assert names.count("sparse_mla") == config.num_hidden_layers
    assert cache.index_keys.shape[0] == full
    extra = int(model.has_mtp)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.weights.indexer)} == {full + extra}
    assert (name == "glm5") == (full == config.num_hidden_layers), "the other fixtures share"
