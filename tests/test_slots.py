"""Sequences that begin and end in the rows of a running program."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, audit, generate
from glm52_jax.compile_cache import Compiling
from glm52_jax.decode import NOTHING
from glm52_jax.plan import Parallel
from glm52_jax.program import State
from glm52_jax.slots import Slots, pieces
from tests.test_program import GREEDY, PAGES, decoder, prefilled, prompts, tiny


@cache
def slots() -> Slots:
    return Slots(decoder(2), chunks=(8, 16))


def drawn(state: State) -> list[int]:
    return np.asarray(state.arrays.drawn).tolist()


def texts(batch: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy tokens of sequences that begin together."""
    made = slots().program
    return np.array(list(made.tokens(prefilled(made, batch), steps))).T.tolist()


def test_pieces_of_prompts() -> None:
    assert pieces(31, (8, 16)) == [(0, 16, 16), (16, 8, 8), (24, 7, 8)]
    assert pieces(5, (8, 16)) == [(0, 5, 8)] and pieces(16, (8, 16)) == [(0, 16, 16)]
    assert pieces(9, (8,)) == [(0, 8, 8), (8, 1, 8)]


def test_a_sequence_that_begins_late_gets_the_tokens_of_one_that_did_not() -> None:
    """Chunks of another size, another row, what an older sequence left in its pages: the same greedy text."""
    made, (first, second) = slots().program, prompts(2)
    want = texts([first, second], 20)
    state = made.fresh(GREEDY, positions=-1)
    assert drawn(made.step(made.fresh(GREEDY, positions=-1))) == [NOTHING, NOTHING]
    state, got = slots().start(state, 1, first, GREEDY), {"first": [], "second": []}
    got["first"].append(drawn(state)[1])
    for _ in range(6):
        state = made.step(state)
        assert drawn(state)[0] == NOTHING
        got["first"].append(drawn(state)[1])
    state = slots().start(state, 0, second, GREEDY)
    # What the rows drew last stays in the others' report.
    got["second"].append(drawn(state)[0])
    for _ in range(5):
        state = made.step(state)
        for name, token in zip(("second", "first"), drawn(state), strict=True):
            got[name].append(token)
    state = slots().stop(state, [1])
    state = made.step(state)
    assert drawn(state) == [want[1][6], NOTHING]
    # The rows change places: each writes over the other's pages.
    state = slots().start(state, 1, second, GREEDY)
    state = slots().start(state, 0, first, GREEDY)
    again = [drawn(state := made.step(state)) for _ in range(8)]
    assert got["first"] == want[0][:12] and got["second"] == want[1][:6]
    assert [row[0] for row in again] == want[0][1:9] and [row[1] for row in again] == want[1][1:9]


def test_nothing_moves_and_nothing_is_compiled() -> None:
    made = slots().program
    state = prefilled(made, prompts(2))
    state = slots().stop(slots().start(state, 0, prompts(1)[0], GREEDY), [])  # eager helpers, once
    before = audit.addresses(state.arrays)
    with Compiling() as compiling:
        for row in (0, 1, 1):
            state = slots().start(state, row, prompts(2)[row], Sampling(temperature=0.7, seed=5), number=row)
            state = slots().stop(made.step(state), [1 - row])
    assert compiling.programs == 0 and audit.addresses(state.arrays) == before


def test_draws_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed and number decide, not the row; another sequence's parameters stay its own."""
    model, batch = tiny(), prompts(2)
    hot = Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=7)
    want: dict[int, list[int]] = {0: [], 1: []}
    # The same program, for the time that its compilation takes.
    monkeypatch.setattr(generate, "pages_of", lambda longest: PAGES)
    monkeypatch.setattr(glm52_jax.Model, "_on_gpu", lambda self: True)
    for token in model.generate(batch, 8, hot, ()):
        want[token.sequence].append(token.id)
    made = slots().program
    state = slots().start(made.fresh(GREEDY, positions=-1), 0, batch[1], hot, number=1)
    state = slots().start(state, 1, batch[0], GREEDY)
    got = [drawn(state), *(drawn(state := made.step(state)) for _ in range(7))]
    assert [row[0] for row in got] == want[1] != want[0]
    assert [row[1] for row in got] == texts(batch, 7)[0]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = slots().program
    with pytest.raises(ValueError, match="row=2 must be one of the program's 2 rows"):
        slots().start(made.fresh(GREEDY), 2, [1])
    for ids in ([], [1] * (64 * PAGES)):
        with pytest.raises(ValueError, match=f"prompt of {len(ids)} tokens must have 1..127"):
            slots().start(made.fresh(GREEDY), 0, ids)
    with pytest.raises(ValueError, match="chunks"):
        Slots(made, ())
    share = Parallel(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",)), "ep+dp")
    monkeypatch.setattr(made, "plan", dataclasses.replace(made.plan, parallel=share))
    with pytest.raises(ValueError, match=r"'ep\+dp' belong to devices"):
        Slots(made)
