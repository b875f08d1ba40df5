"""DecodeProgram: compiled once, its state its own, its tokens those of the step by step path."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, audit, buckets, decode, generate, program
from glm52_jax.decode import NOTHING, DecodeState
from glm52_jax.plan import Parallel
from glm52_jax.prefill import prefill
from glm52_jax.program import DecodeProgram, State
from glm52_jax.tiny import tiny_config, write_checkpoint
from pallas_kernels.compare import rel_l2
from pallas_kernels.sample_logits import EMPTY, HAS_INF, HAS_NAN

GREEDY = Sampling(temperature=0.0)
PAGES = 2
# Its embedding is NaN where a test wants that; no prompt holds it.
NAN_TOKEN = 95


@cache
def tiny(dtype: str = "float32") -> glm52_jax.Model:
    """A dense layer with an indexer, and one with experts that shares its selection; FP8 weights."""
    config = tiny_config(
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        first_k_dense_replace=1,
        indexer_types=["full", "shared"],
        vocab_size=96,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, weights="fp8")
        return glm52_jax.load(folder, dtype=dtype)


@cache
def decoder(rows: int, pages: int = PAGES) -> DecodeProgram:
    model = tiny()
    return DecodeProgram(model.weights, model.config, model.plan, rows, pages)


def prompts(count: int) -> list[list[int]]:
    return [[(17 * i + 31 * n) % NAN_TOKEN for n in range(30 + i)] for i in range(count)]


def prefilled(made: DecodeProgram, batch: list[list[int]]) -> State:
    # 128 tokens of room: two pages for each prompt.
    return made.adopt(tiny()._prefill([np.array(ids, np.int32) for ids in batch], 90, GREEDY))


def stepped(batch: list[list[int]], steps: int) -> list[list[int]]:
    """Tokens [steps + 1][batch] by the jitted step, each read before the next."""
    model = tiny()
    state = prefilled(decoder(len(batch)), batch).arrays
    read = [state.tokens.tolist()]
    for _ in range(steps):
        state = decode.decode_step(model.weights, state, config=model.config, plan=model.plan)
        read.append(state.tokens.tolist())
    return read


def test_buckets() -> None:
    assert [buckets.bucket(rows) for rows in (1, 2, 3, 8, 9, 64)] == [1, 2, 4, 8, 16, 64]
    for rows in (0, 65):
        with pytest.raises(ValueError, match=f"rows={rows}"):
            buckets.bucket(rows)


def test_tokens_are_those_of_single_steps_however_late_they_are_read() -> None:
    made, batch = decoder(2), prompts(2)
    want = stepped(batch, 20)
    for lag in (0, 1, 2, 50):
        read = [tokens.tolist() for tokens in made.tokens(prefilled(made, batch), 20, lag)]
        assert read == want, lag
    assert made.traces == 1


def test_a_burst_draws_what_its_steps_draw_one_by_one() -> None:
    """Also where the last call has steps that nobody asked for, and one after the other on one state."""
    model, batch = tiny(), prompts(2)
    want = stepped(batch, 21)
    made = DecodeProgram(model.weights, model.config, model.plan, 2, PAGES, burst=4)
    for steps, lag in ((20, 2), (21, 0), (3, 1), (0, 2)):
        read = [tokens.tolist() for tokens in made.tokens(prefilled(made, batch), steps, lag)]
        assert read == want[: steps + 1], (steps, lag)
    state = made.step(made.step(prefilled(made, batch)))
    assert np.asarray(made.copied(state)).tolist() == want[5:9] and state.arrays.drawn.tolist() == want[8]
    assert made.traces == 1
    found, _ = audit.audit(made, prefilled(made, batch), steps=4)
    assert found.ok and found.burst == 4 and not found.moved and not found.not_donated


def test_a_burst_has_no_place_for_drafts() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="width=2 has drafts, which are set between steps: burst=3 must be 1"):
        DecodeProgram(model.weights, model.config, model.plan, 2, PAGES, width=2, burst=3)


def test_the_device_runs_ahead_by_the_lag_and_stops_when_the_reader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made, steps = decoder(2), []
    real = DecodeProgram.step
    monkeypatch.setattr(DecodeProgram, "step", lambda self, state: (steps.append(1), real(self, state))[1])
    reader = made.tokens(prefilled(made, prompts(2)), 20, lag=2)
    next(reader)
    assert len(steps) == 2
    next(reader)
    reader.close()
    assert len(steps) == 3


def poison(state: DecodeState, pages: slice) -> DecodeState:
    """NaN in the latents of some pages: of one sequence."""
    latent = state.cache.latent.at[:, pages].set(jnp.nan)
    return state.replace(cache=state.cache.replace(latent=latent))  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_poisoned_sequence_ends_alone_and_is_reported(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """NaN in one sequence's cache after its prompt: its first token is drawn, the next is not, and the others never notice."""
    model, batch, got = tiny(), prompts(2), dict[int, list[int]]()
    want = np.array(stepped(batch, 11)).T.tolist()
    real = glm52_jax.Model._prefill
    own = slice(PAGES, 2 * PAGES)
    monkeypatch.setattr(generate, "pages_of", lambda longest: PAGES)
    monkeypatch.setattr(glm52_jax.Model, "_prefill", lambda *given: poison(real(*given), own))
    monkeypatch.setattr(glm52_jax.Model, "_on_gpu", lambda self: on_gpu)
    tokens = model.generate(batch, 12, GREEDY, ())
    with pytest.raises(generate.NotFiniteError, match="sequence 1 ended at its new token 1: NaN") as caught:
        for token in tokens:
            got.setdefault(token.sequence, []).append(token.id)
    assert caught.value.found == {1: (1, "NaN")}
    assert got == {0: want[0], 1: want[1][:1]}


def test_what_is_not_finite_is_told_late_but_where_it_was() -> None:
    """A fault stands in the report of its step, once; the sequence is gone after it, and the reader is two steps behind."""
    made, batch = decoder(2), prompts(2)
    want = stepped(batch, 8)
    state = prefilled(made, batch)
    for _ in range(3):
        state = made.step(state)
    state = made.adopt(poison(made.release(state), slice(0, PAGES)))
    read = np.array(list(made.tokens(state, 5, lag=2)))
    assert read[:, 1].tolist() == [row[1] for row in want[3:]]
    assert read[0, 0] == want[3][0] and program.fault(read[1, 0]) and (read[2:, 0] == NOTHING).all()
    assert program.fault(read[1, 0]) == "NaN" and program.fault(~HAS_INF) == "infinity"
    assert program.fault(~EMPTY) == "minus infinity alone" and program.fault(~(HAS_NAN | HAS_INF)) == "NaN and infinity"
    assert program.fault(NOTHING) == program.fault(0) == program.fault(7) == ""


def test_a_prompt_that_is_not_finite_has_no_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(), prompts(2)
    want, got = [row[1] for row in stepped(batch, 1)], []
    monkeypatch.setattr(generate, "pages_of", lambda longest: PAGES)
    weights = model.weights.replace(embed=model.weights.embed.at[NAN_TOKEN].set(jnp.inf))
    broken = model.replace(weights=weights).generate([[*batch[0], NAN_TOKEN], batch[1]], 2, GREEDY, ())
    with pytest.raises(generate.NotFiniteError, match="sequence 0 ended at its new token 0: NaN"):
        for token in broken:
            got.append((token.sequence, token.id))
    assert got == [(1, token) for token in want]


def test_a_state_belongs_to_the_program_that_made_it() -> None:
    one, two = (
        decoder(2),
        DecodeProgram(*(getattr(tiny(), n) for n in ("weights", "config", "plan")), 2, 2),
    )
    # Of the same shapes: it is not the shapes that are compared.
    assert jax.tree.map(lambda a: a.shape, one.avals) == jax.tree.map(lambda a: a.shape, two.avals)
    state = two.fresh()
    assert isinstance(state, State) and not isinstance(state, one.State)
    with pytest.raises(TypeError, match="was not made by this program of 2 rows"):
        one.step(state)
    with pytest.raises(TypeError, match="DecodeState was not made"):
        one.step(state.arrays)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is made by its program"):
        one.State()
    after = two.step(state)
    assert type(after) is two.State
    with pytest.raises(ValueError, match="already given to a step"):
        two.step(state)


def test_arrays_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tokens is int32\[1\], not int32\[2\].*cache\.latent is"):
        decoder(2).adopt(decoder(1).fresh().arrays)
    with pytest.raises(ValueError, match="rows=0"):
        decoder(0)


def test_the_plan_is_recorded_while_it_is_traced() -> None:
    first, second = decoder(2).choices, decoder(1).choices
    config = tiny().config
    assert [choice.operation for choice in first].count("sparse_mla") == config.num_hidden_layers
    assert second == first and {choice.backend for choice in first} == {"reference"}
    assert all(choice.spec.rows == 2 for choice in first if choice.operation == "sparse_mla")


def test_programs_of_several_buckets() -> None:
    model = tiny()
    made = buckets.programs(model.weights, model.config, model.plan, PAGES, buckets=(1, 8), jobs=2)
    assert {rows: (one.rows, one.pool, one.traces) for rows, one in made.items()} == {1: (1, 2, 1), 8: (8, 16, 1)}
    one, eight = (np.array(list(made[rows].tokens(made[rows].fresh(GREEDY), 6))) for rows in (1, 8))
    assert np.array_equal(eight, np.tile(one, 8)) and len(set(one[:, 0].tolist())) > 1
    # An executable is shared by programs of its shapes; their states are not.
    again = DecodeProgram(model.weights, model.config, model.plan, 8, PAGES)
    assert again.executable is made[8].executable and again.State is not made[8].State


def test_generate_runs_it_on_gpus_and_never_emits_what_follows_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt in a bucket of two; a stop is seen two steps late."""
    model, (prompt,) = tiny(), prompts(1)

    def drawn(stop_ids: tuple[int, ...], batch: list = prompt) -> list[tuple[int, int, bool]]:
        tokens = model.generate(batch, max_new_tokens=40, sampling=GREEDY, stop_ids=stop_ids)
        return [(token.sequence, token.id, token.finished) for token in tokens]

    steps: list[int] = []
    real = DecodeProgram.step
    monkeypatch.setattr(DecodeProgram, "step", lambda self, state: (steps.append(self.rows), real(self, state))[1])
    # Twice the prompt: the programs of two rows are there already.
    free = [token for token in drawn((), [prompt, prompt]) if token[0] == 0]
    assert not steps and len(free) == 40
    monkeypatch.setattr(glm52_jax.Model, "_on_gpu", lambda self: True)
    monkeypatch.setattr(generate, "bucket", lambda rows: 2 * rows)
    assert drawn(()) == free and steps == [2] * 39
    steps.clear()
    stop = free[3][1]
    first = [token for _, token, _ in free].index(stop)
    assert drawn((stop,)) == [*free[:first], (0, stop, True)]
    assert len(steps) == first + 2
    # As on several GPUs: four steps a call, the last of them for nothing; the prompt's pages have room for it.
    steps.clear()
    asked, pages_of = set[int](), generate.pages_of
    monkeypatch.setattr(generate, "burst", lambda plan: 4)
    monkeypatch.setattr(generate, "pages_of", lambda longest: (asked.add(longest), pages_of(longest))[1])
    assert drawn(()) == free and steps == [2] * 10 and asked == {len(prompt) + 40 + 3}
    assert drawn((stop,)) == [*free[:first], (0, stop, True)]


def test_bursts_are_for_several_devices() -> None:
    plan = tiny().plan
    meshes = [jax.sharding.AbstractMesh((count,), ("d",)) for count in (1, 2)]
    several = [dataclasses.replace(plan, parallel=Parallel(mesh, "tp")) for mesh in meshes]  # type: ignore[arg-type]
    assert [buckets.burst(one) for one in (plan, *several)] == [1, 1, 4]


# --- several query rows -----------------------------------------------------------------------------------------------------------


@cache
def verifier(width: int) -> DecodeProgram:
    model = tiny()
    return DecodeProgram(model.weights, model.config, model.plan, 2, PAGES, width=width, logits=True)


def verified(made: DecodeProgram, batch: list[list[int]]) -> State:
    model = tiny()
    arrays = [np.array(ids, np.int32) for ids in batch]
    return made.adopt(prefill(model.weights, model.config, model.plan, arrays, PAGES, GREEDY, made.width))


def one_row_logits(batch: list[list[int]], steps: int) -> list[np.ndarray]:
    made = verifier(1)
    state, found = verified(made, batch), []
    for _ in range(steps):
        state = made.step(state)
        found.append(np.asarray(state.arrays.logits))
    return found


def test_right_drafts_are_the_tokens_of_as_many_steps() -> None:
    """Three query rows a sequence: the second sequence's last draft is wrong, so it keeps one token less."""
    batch, made = prompts(2), verifier(3)
    want, rows = np.array(stepped(batch, 4)), one_row_logits(batch, 3)
    drafts = np.array([[want[1, 0], want[2, 0]], [want[1, 1], (want[2, 1] + 1) % 96]], np.int32)
    state = made.with_drafts(verified(made, batch), drafts)
    assert np.asarray(state.arrays.drawn).tolist() == [want[0, 0], NOTHING, NOTHING, want[0, 1], NOTHING, NOTHING]
    state = made.step(state)
    drawn = np.asarray(state.arrays.drawn).reshape(2, 3)
    assert drawn.tolist() == [want[1:4, 0].tolist(), [*want[1:3, 1].tolist(), NOTHING]]
    assert np.asarray(state.arrays.positions).tolist() == [len(batch[0]) + 3, len(batch[1]) + 2]
    assert np.asarray(state.arrays.tokens).tolist() == [want[3, 0], NOTHING, NOTHING, want[2, 1], NOTHING, NOTHING]
    logits = np.asarray(state.arrays.logits).reshape(2, 3, -1)
    for row in range(3):
        for sequence in range(2):
            if row < 2 or sequence == 0:  # The row of the wrong draft belongs to another text.
                assert rel_l2(logits[sequence, row], rows[row][sequence]) < 1e-5
    # Causality: a later row changes nothing before it. And what a wrong draft wrote is written over.
    state = made.step(state)
    assert np.asarray(state.arrays.drawn).reshape(2, 3)[:, 0].tolist() == [want[4, 0], want[3, 1]]


def test_drafts_right_and_wrong_give_the_greedy_text() -> None:
    """Drafts from the text itself, every third wrong: the same tokens in fewer steps, and no address of the state changes."""
    batch, made, steps = prompts(2), verifier(3), 30
    want = np.array(stepped(batch, steps + 4)).T
    state = verified(made, batch)
    texts: list[list[int]] = [[int(token)] for token in np.asarray(made.copied(state))[::3]]
    taken = 0
    while min(map(len, texts)) < steps:
        drafts = np.array([want[i, len(text) : len(text) + 2] for i, text in enumerate(texts)], np.int32)
        drafts[:, taken % 2] += np.int32(taken % 3 == 0)
        before = audit.addresses(state.arrays)
        state = made.step(made.with_drafts(state, drafts))
        assert audit.addresses(state.arrays) == before
        taken += 1
        for text, row in zip(texts, np.asarray(made.copied(state)).reshape(2, 3), strict=True):
            text.extend(int(token) for token in row if token != NOTHING)
    for text, found in zip(texts, want.tolist(), strict=True):
        assert text == found[: len(text)] and len(text) > 1.9 * taken
    assert made.traces == 1


def test_a_fault_behind_right_drafts_ends_the_sequence() -> None:
    batch, made = prompts(2), verifier(3)
    want = np.array(stepped(batch, 2))
    state = verified(made, batch)
    drafts = np.array([[NAN_TOKEN, 0], [want[1, 1], want[2, 1]]], np.int32)
    weights = made.weights.replace(embed=made.weights.embed.at[NAN_TOKEN].set(jnp.nan))  # type: ignore[attr-defined]
    other = DecodeProgram(weights, made.config, made.plan, 2, PAGES, width=3, logits=True)
    assert other.executable is made.executable
    state = other.adopt(made.release(state))
    # The first sequence's draft is wrong, so the fault in its row does not count; then it is right.
    state = other.step(other.with_drafts(state, drafts))
    drawn = np.asarray(state.arrays.drawn).reshape(2, 3)
    assert drawn[0].tolist() == [want[1, 0], NOTHING, NOTHING] and (drawn[1] >= 0).all()
    arrays = other.release(state)
    arrays = arrays.replace(tokens=arrays.tokens.at[0].set(NAN_TOKEN))  # type: ignore[attr-defined]
    state = other.step(other.adopt(arrays))
    drawn = np.asarray(state.arrays.drawn).reshape(2, 3)
    assert program.fault(drawn[0, 0]) and drawn[0, 1:].tolist() == [NOTHING, NOTHING] and drawn[1, 0] >= 0
    assert np.asarray(state.arrays.positions)[0] == -1
    with pytest.raises(ValueError, match=r"must be int32\[2, 2\]"):
        made.with_drafts(verified(made, batch), np.zeros((2, 3), np.int32))


# --- batch invariance -------------------------------------------------------------------------------------------------------------


def in_row(made: DecodeProgram, alone: DecodeState, row: int, filler: int) -> State:
    """A state with one sequence in ``row``. The other rows hold none: their pages and scales are NaN, their token is ``filler``."""

    def poisoned(a: jax.Array) -> jax.Array:
        # As bytes, 0x7f is the NaN of e4m3 and part of a huge scale.
        nan = 0x7F if a.dtype == jnp.uint8 else jnp.nan
        full = jnp.full((a.shape[0], made.pool, *a.shape[2:]), nan, a.dtype)
        return full.at[:, row * made.pages : (row + 1) * made.pages].set(a)

    fresh = made.fresh(GREEDY, positions=-1).arrays
    return made.adopt(
        fresh.replace(  # type: ignore[attr-defined]
            tokens=jnp.full_like(fresh.tokens, filler).at[row].set(alone.tokens[0]),
            positions=fresh.positions.at[row].set(alone.positions[0]),
            cache=jax.tree.map(poisoned, alone.cache),
        )
    )


def run(made: DecodeProgram, state: State, row: int, steps: int, filler: int = 0) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a row, and the bytes of its caches in the end; the other rows draw nothing and write nothing."""
    tokens, others = [], np.delete(np.arange(made.rows), row)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.arrays.cache)]
    for _ in range(steps):
        state = made.step(state)
        tokens.append(int(state.arrays.drawn[row]))
        assert (np.asarray(state.arrays.drawn)[others] == NOTHING).all()
        assert (np.asarray(state.arrays.tokens)[others] == filler).all()
    own = slice(row * made.pages, (row + 1) * made.pages)
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(state.arrays.cache)]
    for old, new in zip(before, after, strict=True):
        assert np.delete(old, np.r_[own], axis=1).tobytes() == np.delete(new, np.r_[own], axis=1).tobytes()
    return tokens, [leaf[:, own] for leaf in after]


# A token whose embedding is NaN spreads it where rows mix; one that is finite would write keys that are seen in pages of NaN.
@pytest.mark.parametrize("filler", [NAN_TOKEN, 3])
def test_a_sequence_gets_the_same_tokens_in_any_row_of_any_bucket(filler: int) -> None:
    """Rows without a sequence hold NaN. The tokens are the same. Bits of the caches are not promised on the CPU: XLA's products of
    one row and of eight are summed in another order; between the rows of one bucket they are the same."""
    model, steps = tiny(), 12
    weights = model.weights.replace(embed=model.weights.embed.at[NAN_TOKEN].set(jnp.nan))
    one, eight = (DecodeProgram(weights, model.config, model.plan, rows, PAGES) for rows in (1, 8))
    prompt = np.arange(7, 37, dtype=np.int32)
    start = model._prefill([prompt], 90, GREEDY)
    want, cached = run(one, one.adopt(jax.tree.map(jnp.copy, start)), 0, steps)
    rows = [run(eight, in_row(eight, start, row, filler), row, steps, filler) for row in (0, 3, 7)]
    for tokens, caches in rows:
        assert tokens == want and min(tokens) >= 0
        for a, b in zip(caches, rows[0][1], strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(caches, cached, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
