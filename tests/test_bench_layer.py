"""The benchmark of the whole MLA layer, at small sizes on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import check, layer, records, timing
from pallas_kernels.compare import compare

SMALL = layer.LayerSpec(rows=2, layers=2, tokens=256, hidden=256, heads=4, q_lora_rank=128, kv_lora_rank=128, topk=64)


def test_all_ways_of_calling_a_layer_agree() -> None:
    state, fixed = layer.inputs(SMALL, jax.random.key(0))
    results = {}
    for way in layer.WAYS:
        repeat = layer.repeat(SMALL, way, state, fixed, length=SMALL.layers)
        repeat.run(1)
        results[way] = repeat._state
        assert repeat.calls_per_step == SMALL.layers
    want = results["chain"]
    assert not np.array_equal(np.asarray(want[0]), np.asarray(state[0]))
    for way, got in results.items():
        assert compare(got[0].astype(jnp.float32), want[0].astype(jnp.float32)).rel_l2 < 2e-3, way


def test_layer_is_checked_against_the_references_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # A round of one step: twenty of the references' take seconds on a CPU.
    monkeypatch.setattr(timing.Repeat, "warm_up", lambda repeat, seconds: repeat.run(1))
    made = layer.run(SMALL, ("chain", "graph"), rounds=1, say=lambda _: None)
    first, second = (make(records.Ceilings(4e12, 8e14), "now") for make in made)
    assert (first.case, second.case) == ("w8a16 chain", "w8a16 graph")
    assert first.error == 0.0 and "sparse_mla: reference" in first.reason
    weights = sum(
        leaf[0].size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer.inputs(SMALL, jax.random.key(0))[1][0])
    )
    assert 0.98 < first.bytes / (weights + 2 * 64 * 260 + 2 * 2 * 2 * 256) <= 1.0  # all but norms and scales
    monkeypatch.setattr(layer, "TOLERANCE", {"w8a16": -1.0})
    with pytest.raises(check.WrongResult, match="mla_layer w8a16 rows=2 WRONG"):
        layer.run(SMALL, ("chain",), rounds=1, say=lambda _: None)


def test_layer_whose_bits_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state, fixed = layer.inputs(SMALL, jax.random.key(0))
    same = np.zeros(2)
    monkeypatch.setattr(layer, "_calls", lambda *_: [(same, same), (same, same), (same, same + 1e-16)])
    with pytest.raises(check.WrongResult, match="call 3 differs from call 1 in its bits"):
        layer.check(SMALL, state, fixed)


def test_layer_counts_at_the_real_sizes() -> None:
    """Spec sizes written out: q_a, kv_a, q_b, o_proj one byte a number, W_UK and W_UV two."""
    spec = layer.LayerSpec()
    eight = 2048 * 6144 + 576 * 6144 + 16384 * 2048 + 6144 * 16384
    two = 64 * 192 * 512 + 64 * 256 * 512
    assert spec.bytes() == eight + 2 * two + 2048 * 656 + 4 * 6144
    assert spec.flops() == 2 * (eight + two) + 2 * 64 * 2048 * (576 + 512)
