"""The benchmark of one layer's indexer, at small sizes on the CPU."""

import jax
import numpy as np
import pytest

from bench import check, indexer, records, timing

SMALL = indexer.IndexerSpec(rows=2, context="x", tokens=300, hidden=256, q_lora_rank=128, heads=16, topk=64)


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "_ROTATION", 1e5)


def test_indexer_is_checked_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "_CHAIN", 3)
    # A round of one step: twenty of the references' take half a minute on a CPU.
    monkeypatch.setattr(timing.Repeat, "warm_up", lambda repeat, seconds: repeat.run(1))
    monkeypatch.setattr(indexer, "TARGET_US", {("x", 2): 7.0})
    made = indexer.run(SMALL, ("chain", "logits"), rounds=1, say=lambda _: None)
    first, second = (make(records.Ceilings(4e12, 8e14), "now") for make in made)
    assert (first.case, second.case) == ("w8a16 x chain", "w8a16 x logits")
    assert first.rivals_us == {"target": 7.0} and second.rivals_us == {}
    assert first.error == 0.0 and "index_keys: reference" in first.reason
    monkeypatch.setattr(indexer, "TOLERANCE", -1.0)
    with pytest.raises(check.WrongResult, match="indexer w8a16 x rows=2 WRONG"):
        indexer.run(SMALL, ("chain",), rounds=1, say=lambda _: None)


def test_every_layer_of_a_chain_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, fixed = indexer.inputs(SMALL, jax.random.key(0))
    assert keys.shape[0] == SMALL.layers == 2
    slots = [np.asarray(indexer.index(SMALL, keys, fixed, layer)[0]) for layer in range(2)]
    assert not np.array_equal(*slots)
    table = np.asarray(fixed[3].table)
    assert sorted(table.ravel()) == list(range(table.size)) and not np.array_equal(table.ravel(), np.arange(table.size))
    for row, pages in zip(slots[0], table, strict=True):
        assert set(row // 64) <= set(pages) and len(set(row)) == SMALL.topk


def test_distance_to_the_kth_score() -> None:
    """Pages 3 and 1 of a cache; scores fall with the position."""
    table, scores = np.array([[3, 1]]), -np.arange(1.0, 129.0)[None]
    want = np.array([[3 * 64, 3 * 64 + 1, 3 * 64 + 2]])
    rms = np.sqrt(np.mean(scores**2))
    assert indexer.distance(want[:, ::-1], want, scores, table)[0] == 0.0
    swapped = np.array([[3 * 64, 3 * 64 + 1, 64]])  # position 64: score -65, against -3
    assert np.isclose(indexer.distance(swapped, want, scores, table)[0], 62 / rms)
    assert indexer.distance(np.array([[192, 193, 193]]), want, scores, table)[0] == np.inf
    assert indexer.distance(np.array([[192, 193, 0]]), want, scores, table)[0] == np.inf


def test_indexer_counts_at_the_real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """wq_b and wk one byte a number, weights_proj two; 132 bytes a key."""
    monkeypatch.setattr(indexer, "_ROTATION", 200e6)
    spec = indexer.IndexerSpec()
    weights = 4096 * 2048 + 128 * 6144 + 2 * 32 * 6144
    assert spec.bytes() == weights + 32768 * 132 + 2 * 6144 + 2 * 2048 + 4 * 2048
    # A part's bound is its own: what it hands on included.
    assert spec.bytes("keys and queries") == weights + 2 * 6144 + 2 * 2048 + 32 * 132
    assert spec.bytes("logits") == 32 * 132 + 32768 * (132 + 4) and spec.bytes("selection") == 4 * (32768 + 2048)
    assert spec.flops() == spec.flops("keys and queries") + spec.flops("logits") and spec.flops("selection") == 0
    assert spec.flops() == 2 * (4096 * 2048 + 160 * 6144 + 32 * 128 * 32768)
    assert spec.layers * (weights + 32768 * 132) > 200e6
