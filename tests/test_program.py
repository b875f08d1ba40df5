"""DecodeProgram: compiled once, its state its own, its tokens those of the step by step path."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, decode, generate, program
from glm52_jax.decode import DecodeState
from glm52_jax.program import DecodeProgram, State
from glm52_jax.tiny import tiny_config, write_checkpoint

GREEDY = Sampling(temperature=0.0)
PAGES = 2


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
    return [[(17 * i + 31 * n) % 96 for n in range(30 + i)] for i in range(count)]


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
    assert [program.bucket(rows) for rows in (1, 2, 3, 8, 9, 64)] == [1, 2, 4, 8, 16, 64]
    for rows in (0, 65):
        with pytest.raises(ValueError, match=f"rows={rows}"):
            program.bucket(rows)


def test_tokens_are_those_of_single_steps_however_late_they_are_read() -> None:
    made, batch = decoder(2), prompts(2)
    want = stepped(batch, 20)
    for lag in (0, 1, 2, 50):
        read = [tokens.tolist() for tokens in made.tokens(prefilled(made, batch), 20, lag)]
        assert read == want, lag
    assert made.traces == 1


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
        prefilled(decoder(2), prompts(1))
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
    made = program.programs(model.weights, model.config, model.plan, PAGES, buckets=(1, 8), jobs=2)
    assert {rows: (one.rows, one.pool, one.traces) for rows, one in made.items()} == {1: (1, 2, 1), 8: (8, 16, 1)}
    one, eight = (np.array(list(made[rows].tokens(made[rows].fresh(GREEDY), 6))) for rows in (1, 8))
    assert np.array_equal(eight, np.tile(one, 8)) and len(set(one[:, 0].tolist())) > 1
    # An executable is shared by programs of its shapes; their states are not.
    again = DecodeProgram(model.weights, model.config, model.plan, 8, PAGES)
    assert again.executable is made[8].executable and again.State is not made[8].State


def test_generate_runs_it_on_gpus_and_never_emits_what_follows_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt in a bucket of two; a stop is seen two steps late."""
    model, (prompt,) = tiny(), prompts(1)

    def drawn(stop_ids: tuple[int, ...]) -> list[tuple[int, int, bool]]:
        tokens = model.generate(prompt, max_new_tokens=40, sampling=GREEDY, stop_ids=stop_ids)
        return [(token.sequence, token.id, token.finished) for token in tokens]

    steps: list[int] = []
    real = DecodeProgram.step
    monkeypatch.setattr(DecodeProgram, "step", lambda self, state: (steps.append(self.rows), real(self, state))[1])
    free = drawn(())
    assert not steps and len(free) == 40
    monkeypatch.setattr(glm52_jax.Model, "_on_gpu", lambda self: True)
    monkeypatch.setattr(generate, "bucket", lambda rows: 2 * rows)
    assert drawn(()) == free and steps == [2] * 39
    steps.clear()
    stop = free[3][1]
    first = [token for _, token, _ in free].index(stop)
    assert drawn((stop,)) == [*free[:first], (0, stop, True)]
    assert len(steps) == first + 2


# --- batch invariance -------------------------------------------------------------------------------------------------------------


def in_row(made: DecodeProgram, alone: DecodeState, row: int) -> State:
    """A state with one sequence in ``row``, the others' pages and scales being NaN and their positions behind it."""

    def poisoned(a: jax.Array) -> jax.Array:
        # As bytes, 0x7f is the NaN of e4m3 and part of a huge scale.
        nan = 0x7F if a.dtype == jnp.uint8 else jnp.nan
        full = jnp.full((a.shape[0], made.pool, *a.shape[2:]), nan, a.dtype)
        return full.at[:, row * made.pages : (row + 1) * made.pages].set(a)

    fresh = made.fresh(GREEDY).arrays
    return made.adopt(
        DecodeState(
            tokens=fresh.tokens.at[row].set(alone.tokens[0]),
            positions=jnp.full((made.rows,), 5, jnp.int32).at[row].set(alone.positions[0]),
            table=fresh.table,
            cache=jax.tree.map(poisoned, alone.cache),
            sampling=fresh.sampling,
        )
    )


def run(made: DecodeProgram, state: State, row: int, steps: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a row, and the bytes of its caches in the end."""
    tokens = []
    for _ in range(steps):
        state = made.step(state)
        tokens.append(int(state.arrays.tokens[row]))
    own = slice(row * made.pages, (row + 1) * made.pages)
    return tokens, [np.asarray(leaf[:, own]) for leaf in jax.tree.leaves(state.arrays.cache)]


def test_a_sequence_gets_the_same_tokens_in_any_row_of_any_bucket() -> None:
    """Padding rows hold NaN. The tokens are the same. Bits of the caches are not promised on the CPU: XLA's products of one row
    and of eight are summed in another order; between the rows of one bucket they are the same."""
    model, steps = tiny(), 12
    one, eight = (decoder(rows) for rows in (1, 8))
    prompt = np.arange(7, 37, dtype=np.int32)
    start = model._prefill([prompt], 90, GREEDY)
    want, cached = run(one, one.adopt(jax.tree.map(jnp.copy, start)), 0, steps)
    rows = [run(eight, in_row(eight, start, row), row, steps) for row in (0, 3, 7)]
    for tokens, caches in rows:
        assert tokens == want
        for a, b in zip(caches, rows[0][1], strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(caches, cached, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
