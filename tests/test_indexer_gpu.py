"""The indexer of a layer on a GPU's kernels: against the references, against float64, against the official code's sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from bench import indexer as bench
from glm52_jax.cache import make_rows
from glm52_jax.layers import indexer
from glm52_jax.tiny import KERNEL_TINY, hash_bits, tiny_config, write_checkpoint
from pallas_kernels import index_keys, lowering, mqa_logits, paged, registry, top_k
from tests.fixtures_util import BY_NAME, assert_matches, reference_model

pytestmark = pytest.mark.gpu

OPERATIONS = {"index_keys", "mqa_logits", "top_k"}
SMALL = bench.IndexerSpec(rows=3, context="5000", tokens=5000, hidden=1024, q_lora_rank=512)


def assert_on_kernels(choices: list[registry.Choice]) -> None:
    served = {choice.operation: choice.backend for choice in choices if choice.operation in OPERATIONS}
    assert served.keys() == OPERATIONS and "reference" not in served.values(), served


@pytest.mark.parametrize("arithmetic", ["w8a16", "w8a8"])
@pytest.mark.parametrize("rows", [1, 33])
def test_decode_selects_what_the_references_do(rows: int, arithmetic: str) -> None:
    """Scattered pages; bits of repeated calls agree (``bench.indexer.check`` raises otherwise)."""
    spec = dataclasses.replace(SMALL, rows=rows, arithmetic=arithmetic)
    keys, fixed = bench.inputs(spec, jax.random.key(rows))
    result, choices = bench.check(spec, keys, fixed)
    assert_on_kernels(choices)
    print(result)
    assert result.ok, str(result)


def hostile(width: int, starts: list[int], counts: list[int], pages: int) -> tuple[bench.IndexerSpec, jax.Array, Any]:
    """A prefill of sequences with scattered pages; every byte of a cached key that no row may see is NaN."""
    batch = len(starts)
    spec = dataclasses.replace(SMALL, rows=batch, tokens=64 * pages, topk=128)
    keys, (_, _, weights, _) = bench.inputs(spec, jax.random.key(5))
    count = batch * spec.pages
    order = np.random.default_rng(1).permutation(count).astype(np.int32)
    table = order.reshape(batch, spec.pages)
    config = spec.model().config()
    rows = make_rows(config, jnp.asarray(table), *(jnp.asarray(a, jnp.int32) for a in (starts, counts)), width)
    raw = np.full(keys.shape, 0xFF, np.uint8)
    values, scales = raw[..., : 64 * 128].reshape(*raw.shape[:2], 64, 128), raw[..., 64 * 128 :]
    scales = scales.reshape(*raw.shape[:2], 64, 4)
    given = np.asarray(keys)
    for sequence, start in enumerate(starts):
        for position in range(start):
            page, offset = table[sequence, position // 64], position % 64
            values[:, page, offset] = given[:, page, : 64 * 128].reshape(-1, 64, 128)[:, offset]
            scales[:, page, offset] = given[:, page, 64 * 128 :].reshape(-1, 64, 4)[:, offset]
    kl, kx = jax.random.split(jax.random.key(6))
    latent = jax.random.normal(kl, (batch * width, spec.q_lora_rank), jnp.bfloat16)
    x = jax.random.normal(kx, (batch * width, spec.hidden), jnp.bfloat16)
    return spec, jnp.asarray(raw), (latent, x, weights, rows)


def search(spec: bench.IndexerSpec, keys: jax.Array, fixed: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, slots) [rows, k] and the key cache of layer 1."""
    latent, x, weights, rows = fixed
    config, plan = spec.model().config(), spec.model().plan()
    step = jax.jit(lambda k, a, b, w, r: indexer.select(w, 1, a, b, k, r, config, plan))
    selection, cache = step(keys, latent, x, weights, rows)
    flat = (np.asarray(a).reshape(-1, a.shape[-1]) for a in (selection.positions, selection.slots))
    return (*flat, np.asarray(cache))


# Sequences whose rows stand at page boundaries and around k = 128; one of no row, one of fewer rows than the others.
STARTS, COUNTS = [0, 63, 64, 126, 127, 128, 1000, 5], [3, 3, 3, 3, 3, 3, 3, 0]


@pytest.mark.parametrize("score_bytes", [1 << 27, 4 * 8 * 1024 * 1])
def test_boundaries_in_a_cache_of_nan(monkeypatch: pytest.MonkeyPatch, score_bytes: int) -> None:
    monkeypatch.setattr(indexer, "SCORE_BYTES", score_bytes)
    spec, keys, fixed = hostile(3, STARTS, COUNTS, 16)
    with registry.recorded() as choices:
        positions, slots, cache = search(spec, keys, fixed)
    assert_on_kernels(choices)
    with lowering.target(None):
        want_positions, want_slots, want_cache = search(spec, keys, fixed)
    rows = fixed[3]
    lengths, table = np.asarray(rows.lengths).reshape(-1), np.asarray(rows.table)
    for row, length in enumerate(lengths):
        got, k = positions[row], min(length, spec.topk)
        assert (got[:k] >= 0).all() and (got[k:] == -1).all() and got.max(initial=-1) < max(length, 1)
        assert len(set(got[:k])) == k
        # Queries are rounded to e4m3 by either side: near ties may differ, and only them (bench.indexer.check is exact here).
        assert len(set(got) & set(want_positions[row])) >= 0.9 * k, row
        slot = np.where(got >= 0, table[row // 3][got // 64] * 64 + got % 64, -1)
        np.testing.assert_array_equal(slots[row], slot)
    np.testing.assert_array_equal((slots >= 0).sum(1), (want_slots >= 0).sum(1))
    # Written are the rows' slots of layer 1 and nothing else; the sequence without rows writes none.
    written = np.asarray(rows.slots)
    written = written[written >= 0]
    assert len(written) == sum(COUNTS)
    codes, scales = np.zeros(keys.shape, bool), np.zeros(keys.shape, bool)
    for slot in written:
        page, offset = slot // 64, slot % 64
        codes[1, page, offset * 128 : offset * 128 + 128] = True
        scales[1, page, 8192 + 4 * offset : 8196 + 4 * offset] = True
    kept = ~(codes | scales)
    np.testing.assert_array_equal(cache[kept], np.asarray(keys)[kept])
    assert (cache[codes] != want_cache[codes]).mean() < 0.01
    found, expected = (a[scales].reshape(-1, 4).view(np.float32) for a in (cache, want_cache))
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), rtol=2e-5)


def test_selection_against_float64_at_128k() -> None:
    """Of the same FP8 values, every position that is farther from the k-th score than the accumulation error is chosen rightly.

    The error: 2^-13 of the sum of the products' magnitudes, weighted as the heads are. Hopper's FP8 units cut each product off at
    some 13 bits of the largest of an instruction; such cuts are of either sign and mostly cancel.
    """
    spec = bench.IndexerSpec(rows=2, context="128K", tokens=131072)
    keys, (latent, x, weights, rows) = bench.inputs(spec, jax.random.key(7))
    sides = (weights.wq_b, weights.weights_proj)
    q, w = index_keys.query(latent, x, *sides, 1, rows.cos, rows.sin, quantized=True)

    @jax.jit
    def select(q: jax.Array, w: jax.Array) -> jax.Array:
        scores = mqa_logits.paged_logits(q[:, None], w[:, None], keys, 1, rows.table, rows.lengths)
        return top_k.top_k(scores[:, 0], rows.lengths[:, 0], spec.topk)

    with registry.recorded() as choices:
        chosen = np.asarray(select(q, w))
    assert all(choice.backend != "reference" for choice in choices) and len(choices) == 2
    pages = np.asarray(keys[1])[np.asarray(rows.table)]
    for row in range(spec.rows):
        values = pages[row][:, : 64 * 128].reshape(-1, 128).view(jnp.float8_e4m3fn).astype(np.float64)
        scale = np.ascontiguousarray(pages[row][:, 64 * 128 :]).view(np.float32).reshape(-1).astype(np.float64)
        query, head = np.asarray(q[row], np.float64), np.asarray(w[row], np.float64)
        scores = scale * (np.maximum(values @ query.T, 0.0) @ head)
        error = 2.0**-13 * scale * (np.abs(values) @ np.abs(query.T) @ np.abs(head))
        kth_at = np.argsort(-scores, kind="stable")[spec.topk - 1]
        margin = error + error[kth_at]
        inside = np.zeros(len(scores), bool)
        inside[chosen[row]] = True
        assert inside.sum() == spec.topk
        sure_in, sure_out = scores > scores[kth_at] + margin, scores < scores[kth_at] - margin
        undecided = int((~sure_in & ~sure_out).sum())
        wrong = int((sure_in & ~inside).sum() + (sure_out & inside).sum())
        ideal = np.argsort(-scores, kind="stable")[: spec.topk]
        print(
            f"row {row}: {undecided} of {spec.topk} undecided, {len(set(ideal) - set(chosen[row]))} chosen differently"
        )
        assert wrong == 0 and undecided < spec.topk // 10


def test_a_prefill_in_pieces_selects_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections of other numbers of rows may round otherwise: near ties only."""
    spec, keys, fixed = hostile(128, [1000], [128], 64)
    whole, _, cache = search(spec, keys, fixed)
    monkeypatch.setattr(indexer, "SCORE_BYTES", 32 * 4 * 64 * spec.pages)
    assert indexer.query_rows_at_once(1, 128, 64 * spec.pages) == 32
    parts, _, other = search(spec, keys, fixed)
    np.testing.assert_array_equal(cache, other)
    differing = [len(set(a) ^ set(b)) // 2 for a, b in zip(whole, parts, strict=True)]
    print(f"{sum(differing)} of {whole.size} positions differ")
    assert max(differing) <= 0.1 * spec.topk and sum(differing) <= 0.01 * whole.size


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_official_sets_with_the_selection_kernel(name: str) -> None:
    """The fixtures' sizes are not the other kernels'; what selects is the kernel, on float32 scores."""
    jax.clear_caches()
    with registry.recorded() as choices:
        assert_matches(name, reference_model(name))
    assert "reference" not in {choice.backend for choice in choices if choice.operation == "top_k"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**(KERNEL_TINY | {"index_topk": 64}))
    write_checkpoint(path := tmp_path_factory.mktemp("kernel") / "c", config, weights="fp8")
    return path


def test_whole_model_selects_on_kernels(directory: Path) -> None:
    """Positions of the first layer, whose inputs the backends before it hardly change; the same bits in every run."""
    model = glm52_jax.load(directory, cache="fp8")
    ids = [int(x) % model.config.vocab_size for x in hash_bits("indexer/ids", 200) >> 11]
    jax.clear_caches()
    with registry.recorded() as choices:
        logits, taps = model.score(ids, taps=True)
    assert_on_kernels(choices)
    again, _ = model.score(ids, taps=True)
    assert np.asarray(logits).tobytes() == np.asarray(again).tobytes()
    jax.clear_caches()
    with lowering.target(None):
        _, plain = model.score(ids, taps=True)
    jax.clear_caches()
    for layer in model.config.full_layers:
        got, want = (np.asarray(found[f"topk.{layer}"])[64:] for found in (taps, plain))
        shared = np.mean([len(set(a) & set(b)) / 64 for a, b in zip(got, want, strict=True)])
        print(f"layer {layer}: {shared:.1%} of the positions agree")
        assert np.unique(got[-1]).size == 64
        if layer == 0:
            assert shared > 0.95


def test_caches_stay_at_their_address() -> None:
    keys, fixed = bench.inputs(SMALL, jax.random.key(0))
    step = jax.jit(lambda k: bench.index(SMALL, k, fixed, 0), donate_argnums=0)
    addresses = set()
    for _ in range(5):
        slots, keys = step(keys)
        addresses.add(keys.unsafe_buffer_pointer())
    assert len(addresses) == 1 and (np.asarray(slots) // paged.PAGE < SMALL.rows * SMALL.pages).all()
