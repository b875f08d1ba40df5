"""The multi-token-prediction layer against the official decoder layer (tests/oracle), faults, and checkpoints without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import cache, decode, generate, mtp, tiny
from glm52_jax import model as decoder
from glm52_jax.checkpoint import CheckpointError
from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.rope import rope_tables
from glm52_jax.weights import Weights
from pallas_kernels import mla_front, norm_quant
from pallas_kernels.compare import rel_l2
from pallas_kernels.paged import PAGE
from tests.fixtures_util import BY_NAME, TOLERANCE, golden, reference_model

FIXTURES = [name for name, model in BY_NAME.items() if model.mtp]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the layer is given, for n = T - 1 rows: hidden [1, n, hidden], successors int32 [1, n] and the geometry."""

    hidden: jax.Array
    successors: jax.Array
    rows: cache.Rows


Change = Callable[[glm52_jax.Model, Inputs], dict[str, Any]]
Fault = Callable[[pytest.MonkeyPatch, glm52_jax.Model, Inputs], None]


@pytest.mark.parametrize("name,chunk", [("glm52", 512), ("fp8", 32)])
def test_drafts_match_the_official_layer(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, and in two, of which the second attends to what the first left in the layer's own caches."""
    monkeypatch.setattr(generate, "_CHUNK", chunk)
    got = reference_model(name).score_mtp(BY_NAME[name].ids())
    want = golden(name)["mtp_logits"]
    assert got.dtype == want.dtype and got.shape == want.shape == (BY_NAME[name].tokens - 1, want.shape[1])
    assert rel_l2(got, want) <= TOLERANCE


# From here on the layer alone runs, on the official hidden states.


def raw_hidden(name: str) -> np.ndarray:
    """The official residual stream before the final norm, float32 [T - 1, hidden], without the last position."""
    return golden(name)[f"hidden.{BY_NAME[name].config()['num_hidden_layers'] - 1}"][:-1]


def rows_from(model: glm52_jax.Model, start: int, count: int) -> cache.Rows:
    """One sequence's positions start .. start + count - 1."""
    table = cache.contiguous_table(1, -(-(start + count) // PAGE))
    return cache.make_rows(model.config, table, jnp.array([start]), jnp.array([count]), count)


def inputs_of(name: str, model: glm52_jax.Model) -> Inputs:
    """The right inputs."""
    hidden = norm_quant.rms_norm(jnp.asarray(raw_hidden(name)), model.weights.norm, model.config.rms_norm_eps)
    successors = jnp.array([BY_NAME[name].ids()[1:]], jnp.int32)
    return Inputs(hidden[None], successors, rows_from(model, 0, successors.shape[1]))


@partial(jax.jit, static_argnames=("config", "plan"))
def layer(
    weights: Weights, hidden: jax.Array, successors: jax.Array, rows: cache.Rows, config: Config, plan: Plan
) -> dict[str, jax.Array]:
    """Draft logits and the layer's choices, named as in the fixture.

    The model's own layers have NaN in the caches: the MTP layer must read no entry but its own.
    """
    attention, moe, found = mtp.attention, mtp.moe, {}

    def recorded_attention(*args: Any) -> Any:
        out, entries, selection = attention(*args)
        found["mtp_topk"] = selection.positions[0]
        return out, entries, selection

    def recorded_moe(*args: Any) -> Any:
        out, found["mtp_experts"] = moe(*args)
        return out, found["mtp_experts"]

    empty = cache.make_cache(config, plan, rows.table.shape[1], mtp=True)
    empty = jax.tree.map(lambda a: a.at[:-1].set(jnp.nan), empty)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mtp, "attention", recorded_attention)
        monkeypatch.setattr(mtp, "moe", recorded_moe)
        out, _ = mtp.draft(weights, hidden, successors, empty, rows, config, plan)
    return {**found, "mtp_logits": decoder.logits(weights, out, plan)[0]}


def run_layer(model: glm52_jax.Model, inputs: Inputs) -> dict[str, np.ndarray]:
    given = (inputs.hidden, inputs.successors, inputs.rows)
    return jax.tree.map(np.asarray, layer(model.weights, *given, config=model.config, plan=model.plan))


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    """Compiled programs are keyed by function and statics, not by what a fault patched: those that trace patched code go."""
    for program in (layer, decode.draft_chunk):
        program.clear_cache()
    yield
    for program in (layer, decode.draft_chunk):
        program.clear_cache()


def assert_layer_matches(name: str, found: dict[str, np.ndarray]) -> None:
    """Logits within TOLERANCE, selections and experts equal as sets; AssertionError otherwise."""
    want = golden(name)
    for key in ("mtp_topk", "mtp_experts"):
        differing = np.sort(found[key], -1) != np.sort(want[key], -1)
        assert not differing.any(), f"{key}: {int(differing.any(-1).sum())} rows differ"
    error = rel_l2(found["mtp_logits"], want["mtp_logits"])
    assert error <= TOLERANCE, f"mtp_logits: {error:.2e}"


@pytest.mark.parametrize("name", FIXTURES)
def test_layer_chooses_what_the_official_layer_chooses(name: str) -> None:
    model = reference_model(name)
    assert_layer_matches(name, run_layer(model, inputs_of(name, model)))


def _jnp(**replaced: Any) -> Fault:
    """Replaces functions of jax.numpy in mtp.py only."""

    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model, inputs: Inputs) -> None:
        monkeypatch.setattr(mtp, "jnp", SimpleNamespace(**{**vars(jnp), **replaced}))

    return apply


def _norm(name: str, norm: Callable[[jax.Array, jax.Array, float], jax.Array]) -> Fault:
    """Replaces one of the layer's norms: enorm, hnorm or norm (shared_head.norm)."""

    def apply(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model, inputs: Inputs) -> None:
        right = mtp.draft

        def draft(weights: Any, *args: Any) -> Any:
            def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
                chosen = norm if weight is getattr(weights.mtp, name) else norm_quant.rms_norm
                return chosen(x, weight, eps)

            monkeypatch.setattr(mtp, "norm_quant", SimpleNamespace(rms_norm=rms_norm))
            return right(weights, *args)

        monkeypatch.setattr(mtp, "draft", draft)

    return apply


def _twice(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return norm_quant.rms_norm(norm_quant.rms_norm(x, weight, eps), weight, eps)


def _tight(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return norm_quant.rms_norm(x, weight, 1e-6)


def _model_selection(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model, inputs: Inputs) -> None:
    """The layer treated as a shared one: it attends to the set of the model's last full layer."""
    right, last = mtp.attention, model.config.full_layers[-1]
    positions = jnp.asarray(golden("fp8")[f"topk.{last}"][None, :-1])
    selection = cache.Selection(positions, cache.slots_of(inputs.rows.table, positions))

    def attention(*args: Any) -> Any:
        return right(*args[:3], None, *args[4:7], selection, *args[8:])

    monkeypatch.setattr(mtp, "attention", attention)


def _queries_rotated_later(monkeypatch: pytest.MonkeyPatch, model: glm52_jax.Model, inputs: Inputs) -> None:
    """MLA queries at rope position p + 1, keys at p."""
    right, turned = mla_front.query_and_write, _turned(model.config, inputs.rows, 1)

    def query_and_write(*args: Any, **kwargs: Any) -> Any:
        """The key keeps its rotation; only the query is turned."""
        assert args[9].shape == args[10].shape == turned["cos"].shape, "cos and sin stand elsewhere"
        latent, _, written = right(*args, **kwargs)
        _, query = mla_front.query(*args[:4], args[7], turned["cos"], turned["sin"], **kwargs)
        return latent, query, written

    monkeypatch.setattr(mla_front, "query_and_write", query_and_write)


def _turned(config: Config, rows: cache.Rows, shift: int) -> dict[str, jax.Array]:
    cos, sin = rope_tables(rows.positions.reshape(-1) + shift, config.rope_theta, config.qk_rope_head_dim)
    return {"cos": cos, "sin": sin}


WRONG_INPUTS: dict[str, Change] = {
    "hidden before model.norm": lambda model, inputs: {"hidden": jnp.asarray(raw_hidden("fp8"))[None]},
    "the token at p, not at p + 1": lambda model, inputs: {
        "successors": jnp.array([BY_NAME["fp8"].ids()[:-1]], jnp.int32)
    },
    "works at position p + 1": lambda model, inputs: {"rows": rows_from(model, 1, inputs.successors.shape[1])},
}
LAYER_FAULTS: dict[str, Fault] = {
    "embedding not zeroed at position 0": _jnp(where=lambda condition, x, y: y),
    "hidden half first": _jnp(concatenate=lambda parts, axis: jnp.concatenate(parts[::-1], axis=axis)),
    "queries rotated at p + 1": _queries_rotated_later,
    "the model's selection reused": _model_selection,
    "shared_head.norm twice": _norm("norm", _twice),
    "shared_head.norm left out": _norm("norm", lambda x, weight, eps: x),
    "shared_head.norm with eps 1e-6": _norm("norm", _tight),
    "enorm with eps 1e-6": _norm("enorm", _tight),
    "hnorm left out": _norm("hnorm", lambda x, weight, eps: x),
}


def assert_red(found: dict[str, np.ndarray]) -> None:
    error = rel_l2(found["mtp_logits"], golden("fp8")["mtp_logits"])
    assert error > 10 * TOLERANCE, f"the logits hardly move: {error:.1e}"
    with pytest.raises(AssertionError):
        assert_layer_matches("fp8", found)


@pytest.mark.parametrize("fault", WRONG_INPUTS)
def test_wrong_input_turns_the_comparison_red(fault: str) -> None:
    model = reference_model("fp8")
    inputs = inputs_of("fp8", model)
    assert_red(run_layer(model, dataclasses.replace(inputs, **WRONG_INPUTS[fault](model, inputs))))


def test_turning_queries_and_keys_alike_changes_nothing() -> None:
    """RoPE is relative: a layer that rotates both at p + 1 cannot be told from the right one, so no test tries to."""
    model = reference_model("fp8")
    inputs = inputs_of("fp8", model)
    inputs = dataclasses.replace(inputs, rows=inputs.rows.replace(**_turned(model.config, inputs.rows, 1)))
    assert_layer_matches("fp8", run_layer(model, inputs))


@pytest.mark.parametrize("fault", LAYER_FAULTS)
def test_fault_turns_the_comparison_red(fault: str, monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    model = reference_model("fp8")
    inputs = inputs_of("fp8", model)
    LAYER_FAULTS[fault](monkeypatch, model, inputs)
    assert_red(run_layer(model, inputs))


# Checkpoints and arguments

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "index_topk": 8}
PREFIX = "model.layers.2."


def write_small(directory: Path, keep: Callable[[str], bool] = lambda name: True, **overrides: Any) -> Path:
    """A two-layer checkpoint with an MTP layer, of which `keep` (called with names without the prefix) says what stays."""
    config = tiny.tiny_config(**{**SMALL, **overrides})
    specs = tiny.tensor_specs(config, mtp=True)
    kept = {n: s for n, s in specs.items() if not n.startswith(PREFIX) or keep(n.removeprefix(PREFIX))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiny, "tensor_specs", lambda *args: kept)
        tiny.write_checkpoint(directory, config, weights="float32", mtp=True)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> glm52_jax.Model:
    return glm52_jax.load(write_small(tmp_path_factory.mktemp("mtp")), dtype="float32")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> glm52_jax.Model:
    """Announces an MTP layer and lacks it, like many copies of the real checkpoint."""
    directory = write_small(tmp_path_factory.mktemp("bare"), keep=lambda name: False)
    return glm52_jax.load(directory, dtype="float32")


def test_announced_but_absent_layer_is_refused_only_when_used(bare: glm52_jax.Model) -> None:
    assert bare.config.num_nextn_predict_layers == 1 and not bare.has_mtp
    with pytest.raises(ValueError, match=r"model\.layers\.2\b.*MTP"):
        bare.score_mtp([1, 2, 3])


def test_scores_do_not_depend_on_the_mtp_layer(small: glm52_jax.Model, bare: glm52_jax.Model) -> None:
    ids = [int(x) % 320 for x in tiny.hash_bits("mtp/ids", 24) >> 11]
    (want, taps), (got, found) = bare.score(ids, taps=True), small.score(ids, taps=True)
    assert small.has_mtp and set(found) == set(taps)
    assert np.array_equal(got, want) and all(np.array_equal(found[key], taps[key]) for key in taps)


@pytest.mark.parametrize("missing", ["eh_proj.weight", "self_attn.indexer.k_norm.bias", "mlp.experts.3.up_proj.weight"])
def test_incomplete_layer_is_refused_by_name(missing: str, tmp_path: Path) -> None:
    write_small(tmp_path, keep=lambda name: name != missing)
    with pytest.raises(CheckpointError) as caught:
        glm52_jax.load(tmp_path, dtype="float32")
    assert "1 missing" in str(caught.value) and PREFIX + missing in str(caught.value)


def test_lone_tensor_of_the_layer_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, keep=lambda name: name == "enorm.weight")
    count = sum(name.startswith(PREFIX) for name in tiny.tensor_specs(tiny.tiny_config(**SMALL), mtp=True)) - 1
    with pytest.raises(CheckpointError, match=rf"{count} missing:\n.*{PREFIX}input_layernorm.weight"):
        glm52_jax.load(tmp_path, dtype="float32")


def test_unannounced_layer_is_unexpected(tmp_path: Path) -> None:
    write_small(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="unexpected"):
        glm52_jax.load(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    "ids,words",
    [([7], "ids of 1 token"), ([], "non-empty"), ([1, 320], "320, outside 0..319"), ([1.0, 2.0], "integers")],
)
def test_ids_that_hold_no_pair_are_refused(ids: list[Any], words: str, small: glm52_jax.Model) -> None:
    with pytest.raises(ValueError, match=words):
        small.score_mtp(ids)


def test_raw_residual_turns_the_drafts_red(monkeypatch: pytest.MonkeyPatch, fresh_traces: None) -> None:
    """The same fault as in WRONG_INPUTS, in the way from the model to the layer."""
    model, ids = reference_model("fp8"), BY_NAME["fp8"].ids()
    hidden = jnp.pad(jnp.asarray(raw_hidden("fp8")), ((0, 1), (0, 0)))[None]  # padded to the width of a chunk, 64

    def raw(weights: Any, tokens: jax.Array, entries: cache.Cache, *args: Any) -> Any:
        assert tokens.shape == hidden.shape[:2]
        return hidden, entries, {}

    monkeypatch.setattr(decode.decoder, "forward", raw)
    assert rel_l2(model.score_mtp(ids), golden("fp8")["mtp_logits"]) > 10 * TOLERANCE
