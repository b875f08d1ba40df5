"""The model against the official code, and faults that must not pass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import cache, decode, loader
from glm52_jax import model as decoder
from glm52_jax.config import Config
from pallas_kernels import blocks, rotary
from pallas_kernels.experts import reference as experts
from pallas_kernels.fp8_linear import reference as fp8_linear
from pallas_kernels.index_keys import reference as index_keys
from pallas_kernels.latent_write import reference as latent_write
from pallas_kernels.mla_front import reference as mla_front
from pallas_kernels.mqa_logits import reference as mqa_logits
from pallas_kernels.norm_quant import reference as norm_quant
from pallas_kernels.products import einsum
from pallas_kernels.router import reference as router
from tests.fixtures_util import BY_NAME, assert_matches, checkpoint_dir, first_layers, golden, reference_model
from tests.oracle.models import FIXTURES, checkpoint_digests

Patch = Callable[[pytest.MonkeyPatch, glm52_jax.Model], glm52_jax.Model]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_matches_the_official_code(name: str) -> None:
    assert_matches(name, reference_model(name))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_fixture_is_the_one_that_was_recorded(name: str) -> None:
    """The checkpoint that the test writes is bit for bit the one the official code ran."""
    digests = json.loads((FIXTURES / "digests.json").read_text())["fixtures"][name]
    assert checkpoint_digests(checkpoint_dir(name)) == digests["checkpoint"]
    assert BY_NAME[name].ids() == digests["ids"]
    assert len(digests["ids"]) >= 4 * BY_NAME[name].config()["index_topk"], "sparsity must bite"
    stored = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in golden(name).items()}
    recorded = {key: array["sha256"] for key, array in digests["arrays"].items()}
    assert {"logits", "hidden.0", "topk.0"} <= stored.keys() and stored.items() <= recorded.items()


def _attribute(owner: Any, name: str, value: Any) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model) -> glm52_jax.Model:
        monkeypatch.setattr(owner, name, value)
        return model

    return apply


def _config(**changes: Any) -> Patch:
    return lambda monkeypatch, model: model.replace(config=dataclasses.replace(model.config, **changes))


def _reload(owner: Any, name: str, value: Any, fixture: str) -> Patch:
    """Patches, then loads again: for faults of the loader."""

    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model) -> glm52_jax.Model:
        monkeypatch.setattr(owner, name, value)
        broken = glm52_jax.load(checkpoint_dir(fixture), dtype="float32", latent_norm_eps=1e-6)
        return first_layers(broken, model.config.num_hidden_layers)

    return apply


def _half_split(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    if x.ndim == 3:
        cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _only_in(module: Any, rotate: Callable[..., jax.Array]) -> Patch:
    """Replaces the rotation in one operation, leaving the other rotations right."""

    class Rotary:
        apply_rotary = staticmethod(rotate)

    return _attribute(module, "rotary", Rotary)


def _all(*patches: Patch) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model) -> glm52_jax.Model:
        for patch in patches:
            model = patch(monkeypatch, model)
        return model

    return apply


def _rotate_back(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    rope = 2 * cos.shape[-1]
    return jnp.concatenate([x[..., :-rope], rotary.apply_rotary(x[..., -rope:], cos, sin)], axis=-1)


def _rms_for_layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return norm_quant.rms_norm(x, weight, eps) + bias[None, :].astype(x.dtype)


def _routing(change: str) -> Patch:
    def route(
        x: jax.Array, gate: jax.Array, bias: jax.Array, layer: int, k: int, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        products = einsum("rk,ek->re", x, gate[layer])
        if change == "logits in bfloat16":
            products = products.astype(jnp.bfloat16).astype(jnp.float32)
        scores = jax.nn.sigmoid(products)
        biased = scores + bias[layer][None, :]
        _, ids = jax.lax.top_k(scores if change == "bias not in the choice" else biased, k)
        chosen = jnp.take_along_axis(biased if change == "bias in the weights" else scores, ids, axis=-1)
        if change != "not renormalized":
            chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
        return ids.astype(jnp.int32), chosen * (1.0 if change == "not scaled" else scale)

    return _attribute(router, "route", route)


def _share(pick: Callable[[list[Any], Any, Any], Any]) -> Patch:
    """Changes what a shared layer attends to: pick(selections of the full layers so far, the right one, rows)."""

    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model) -> glm52_jax.Model:
        right, seen = decoder.add_attention, []

        def add_attention(*args: Any) -> Any:
            index_layer, rows, selection = args[3], args[7], args[8]
            if index_layer is None:
                args = (*args[:8], pick(seen, selection, rows), *args[9:])
            out = right(*args)
            if index_layer is not None:
                seen.append(out[3])
            return out

        monkeypatch.setattr(decoder, "add_attention", add_attention)
        return model

    return apply


def _everything(seen: list[Any], selection: Any, rows: cache.Rows) -> cache.Selection:
    batch, width = rows.positions.shape
    span = rows.table.shape[1] * 64
    position = jnp.broadcast_to(jnp.arange(span, dtype=jnp.int32), (batch, width, span))
    position = jnp.where(position < rows.lengths[..., None], position, -1)
    return cache.Selection(position, cache.slots_of(rows.table, position))


def _no_scale_in_one_block(w: blocks.Weight, dtype: Any = jnp.float32) -> jax.Array:
    if isinstance(w, blocks.BlockScaled):
        w = blocks.BlockScaled(w.data, w.scale.at[..., -1, -1].set(1.0))
    return blocks.dequantize(w, dtype)


def _halves_swapped(kv_b: jax.Array, heads: int, nope: int, v: int) -> tuple[jax.Array, jax.Array]:
    by_head = kv_b.reshape(heads, nope + v, -1)
    return by_head[:, v:], by_head[:, :v]


def _scale_row_of_the_head(w: blocks.Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Blocks counted from each head's first row (88 rows a head in the fixture) instead of globally."""
    assert isinstance(w, blocks.BlockScaled)
    row = np.minimum(np.arange(w.shape[0]) // 88, w.scale.shape[0] - 1)
    scale = jnp.repeat(w.scale[row], 128, axis=-1)[:, : w.shape[1]]
    return (w.data.astype(jnp.float32) * scale).astype(dtype)


def _scale_divides(w: blocks.Weight, dtype: Any = jnp.float32) -> jax.Array:
    return blocks.dequantize(blocks.BlockScaled(w.data, 1.0 / w.scale), dtype)  # type: ignore[union-attr]


def _sees_the_future(*args: Any) -> cache.Rows:
    rows = cache.make_rows(*args)
    return rows.replace(lengths=jnp.where(rows.lengths > 0, rows.lengths + 1, 0))


def _query_rope_first(q: jax.Array, w_uk: jax.Array) -> jax.Array:
    return _absorb(jnp.roll(q, 1, axis=-1), w_uk)


def _weighted_input(*args: Any) -> jax.Array:
    """Weights applied to the experts' input instead of their output."""
    x, ids, weights = args[:3]
    out = jnp.zeros_like(x)
    for j in range(ids.shape[1]):
        one = jnp.ones_like(weights[:, j : j + 1])
        shared_once = args[5:7] if j == 0 else jax.tree.map(jnp.zeros_like, args[5:7])
        scaled = x * weights[:, j : j + 1]
        out = out + _mix(scaled, ids[:, j : j + 1], one, *args[3:5], *shared_once, *args[7:])
    return out


def _shared_scaled(*args: Any) -> jax.Array:
    without = _mix(args[0], jnp.full_like(args[1], -1), *args[2:])
    return _mix(*args) + 1.5 * without


def _scores_in_bfloat16(*args: Any) -> jax.Array:
    return _paged_logits(*args).astype(jnp.bfloat16).astype(jnp.float32)


def _head_weights_in_bfloat16(*args: Any) -> tuple[jax.Array, jax.Array]:
    q, head_weights = _index_query(*args)
    return q, head_weights.astype(jnp.bfloat16).astype(jnp.float32)


_absorb, _mix = mla_front.absorb, experts.mix
_paged_logits, _index_query = mqa_logits.paged_logits, index_keys.query

# The fixture, how many of its first layers run (those that the fault is to show in), and the fault.
FAULTS: dict[str, tuple[str, int, Patch]] = {
    "latent norms with rms_norm_eps (trap 1)": ("long", 1, _config(latent_norm_eps=1e-5)),
    "input norms with 1e-6 (trap 2)": ("long", 1, _config(rms_norm_eps=1e-6)),
    "index-key norm with 1e-5 (trap 2)": ("long", 1, _attribute(index_keys, "LAYER_NORM_EPS", 1e-5)),
    "RMSNorm for the index-key LayerNorm": ("long", 1, _attribute(norm_quant, "layer_norm", _rms_for_layer_norm)),
    "half-split rope in the indexer (trap 3)": ("long", 1, _only_in(index_keys, _half_split)),
    "half-split rope everywhere (trap 5)": ("long", 1, _attribute(rotary, "apply_rotary", _half_split)),
    "half-split rope in MLA only (trap 5)": (
        "long",
        1,
        _all(_only_in(mla_front, _half_split), _only_in(latent_write, _half_split)),
    ),
    "indexer rotates its last dims (trap 4)": ("long", 1, _attribute(index_keys, "_rotate_front", _rotate_back)),
    "query rolled before absorption (trap 4)": ("long", 1, _attribute(mla_front, "absorb", _query_rope_first)),
    "no relu in the indexer (trap 6)": ("long", 1, _attribute(jax.nn, "relu", lambda x: x)),
    "IndexShare off: shared layers dense (trap 8)": ("long", 3, _share(_everything)),
    "shared layers use the first selection (trap 8)": ("long", 3, _share(lambda seen, right, rows: seen[0])),
    "routing bias in the weights (trap 9)": ("long", 2, _routing("bias in the weights")),
    "routing bias not in the choice (trap 9)": ("long", 2, _routing("bias not in the choice")),
    "routing weights not renormalized (trap 9)": ("long", 2, _routing("not renormalized")),
    "router logits in bfloat16 (trap 9)": ("long", 2, _routing("logits in bfloat16")),
    "index scores in bfloat16 (trap 15)": ("long", 1, _attribute(mqa_logits, "paged_logits", _scores_in_bfloat16)),
    "index head weights in bfloat16 (trap 17)": ("long", 1, _attribute(index_keys, "query", _head_weights_in_bfloat16)),
    "routed experts not scaled (trap 20)": ("long", 2, _routing("not scaled")),
    "shared expert scaled too (trap 20)": ("long", 2, _attribute(experts, "mix", _shared_scaled)),
    "weights on the experts' input": ("long", 2, _attribute(experts, "mix", _weighted_input)),
    "softmax scale of the nope dims (trap 10)": (
        "long",
        1,
        _attribute(Config, "softmax_scale", property(lambda c: c.qk_nope_head_dim**-0.5)),
    ),
    "softmax scale of the latent (trap 10)": (
        "long",
        1,
        _attribute(Config, "softmax_scale", property(lambda c: c.latent_dim**-0.5)),
    ),
    "default rope_theta (trap 11)": ("long", 1, _config(rope_theta=1e4)),
    "a key from the future (trap 16)": ("long", 1, _attribute(glm52_jax.decode, "make_rows", _sees_the_future)),
    "one block scale dropped (trap 13)": ("fp8", 1, _attribute(fp8_linear, "dequantize", _no_scale_in_one_block)),
    "one block scale of kv_b dropped (trap 13)": (
        "fp8",
        1,
        _reload(loader, "dequantize", _no_scale_in_one_block, "fp8"),
    ),
    "kv_b scale divides (trap 13)": ("fp8", 1, _reload(loader, "dequantize", _scale_divides, "fp8")),
    "kv_b scales by the head's own rows (trap 13)": (
        "fp8",
        1,
        _reload(loader, "dequantize", _scale_row_of_the_head, "fp8"),
    ),
    "kv_b halves swapped": ("long", 1, _reload(loader, "split_kv_b", _halves_swapped, "long")),
}


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    """Compiled programs are keyed by function and statics, not by what a fault patched: those that trace patched code go."""
    for program in (decode.score_chunk, loader._place_converted):
        program.clear_cache()
    yield
    for program in (decode.score_chunk, loader._place_converted):
        program.clear_cache()


@pytest.mark.parametrize("fixture,layers", sorted({(fixture, layers) for fixture, layers, _ in FAULTS.values()}))
def test_first_layers_match_the_official_code(fixture: str, layers: int) -> None:
    """What the faults break is right without them."""
    assert_matches(fixture, first_layers(reference_model(fixture), layers))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_turns_the_comparison_red(fault: str, monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    fixture, layers, apply = FAULTS[fault]
    broken = apply(monkeypatch, first_layers(reference_model(fixture), layers))
    # The comparison itself must fail, not an assertion on the way to it.
    with pytest.raises(AssertionError, match=r"^(logits|hidden\.\d+|topk\.\d+|experts\.\d+): "):
        assert_matches(fixture, broken)


def test_selection_changes_with_the_fault_only_beyond_index_topk(
    monkeypatch: pytest.MonkeyPatch, fresh_traces: None
) -> None:
    """Half-split rope in the indexer is invisible up to index_topk tokens: short tests prove nothing about it."""
    model, want = reference_model("long"), golden("long")
    _only_in(index_keys, _half_split)(monkeypatch, model)
    logits = np.asarray(model.score(BY_NAME["long"].ids()))
    topk = model.config.index_topk
    error = np.linalg.norm(logits - want["logits"], axis=-1) / np.linalg.norm(want["logits"], axis=-1)
    assert error[:topk].max() < 1e-4 < error[topk:].max()
