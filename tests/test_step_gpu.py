"""The decode step of a small model of kernel sizes on a GPU: one graph, replayed and not recorded again; rows on their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm52_jax
from glm52_jax import Sampling, audit
from glm52_jax.program import DecodeProgram, State
from glm52_jax.tiny import KERNEL_TINY, tiny_config, write_checkpoint
from pallas_kernels.compare import rel_l2

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
# More positions than index_topk: full layers search. Sequences begin where they have room for some hundred steps.
PAGES = 8
STEPS = 24
REAL = {0: 5, 3: 11, 6: 23}  # of eight rows, and their first tokens


def load(folder: Path) -> glm52_jax.Model:
    if not (folder / "config.json").exists():
        write_checkpoint(folder, tiny_config(**KERNEL_TINY), weights="fp8")
    return glm52_jax.load(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> glm52_jax.Model:
    return load(tmp_path_factory.mktemp("kernel") / "c")


def made(model: glm52_jax.Model, rows: int, dump: Path | None = None) -> DecodeProgram:
    return DecodeProgram(model.weights, model.config, model.plan, rows, PAGES, dump=dump, logits=True)


def begun(program: DecodeProgram, first: dict[int, int], padding: int) -> State:
    """Greedy sequences in the rows of ``first``, each about to feed that token; other rows' caches hold the byte ``padding``."""
    arrays = program.release(program.fresh(Sampling(temperature=0.0)))
    own = np.repeat(np.isin(np.arange(program.rows), list(first)), PAGES)
    cache = jax.tree.map(lambda a: _padded(a, own, padding), arrays.cache)
    tokens, positions = np.zeros(program.rows, np.int32), np.full(program.rows, -1, np.int32)
    tokens[list(first)], positions[list(first)] = list(first.values()), 0
    return program.adopt(
        arrays.replace(tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), cache=cache)  # type: ignore[attr-defined]
    )


def _padded(array: jax.Array, own: np.ndarray, padding: int) -> jax.Array:
    assert array.dtype == jnp.uint8, "FP8 caches"
    keep = jnp.asarray(own).reshape(1, -1, *(1,) * (array.ndim - 2))
    return jnp.where(keep, array, jnp.uint8(padding))


def run(program: DecodeProgram, state: State, forced: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [STEPS, rows] and logits [STEPS, rows, vocab] of a state's steps; forced: tokens to feed instead, of each step."""
    tokens, logits = [], []
    for step in range(STEPS):
        if forced is not None and step:
            arrays = program.release(state)
            state = program.adopt(arrays.replace(tokens=jnp.asarray(forced[step - 1])))  # type: ignore[attr-defined]
        state = program.step(state)
        tokens.append(np.asarray(state.arrays.drawn))
        logits.append(np.asarray(state.arrays.logits))
    return np.stack(tokens), np.stack(logits)


@pytest.mark.parametrize("rows", [1, 8])
def test_one_graph_whose_replays_equal_the_first_call(model: glm52_jax.Model, tmp_path: Path, rows: int) -> None:
    program = made(model, rows, tmp_path)
    found, _ = audit.audit(program, begun(program, {row: 7 + row for row in range(rows)}, 0), steps=64)
    assert found.ok and found.graph is not None and found.graph.whole, str(found)
    print(found)


def test_a_burst_is_one_graph_in_a_loop_and_draws_what_steps_draw(model: glm52_jax.Model, tmp_path: Path) -> None:
    single, first = made(model, 2), {0: 5, 1: 9}
    burst = DecodeProgram(model.weights, model.config, model.plan, 2, PAGES, dump=tmp_path, burst=4)
    want, _ = run(single, begun(single, first, 0))
    read = np.stack(list(burst.tokens(begun(burst, first, 0), STEPS)))
    assert (read[1:] == want).all()
    found, _ = audit.audit(burst, begun(burst, first, 0), steps=64 // burst.burst)
    assert found.ok and found.graph is not None and found.graph.looped and not found.graph.whole, str(found)
    print(found)


def test_rows_without_sequences_are_not_seen(model: glm52_jax.Model) -> None:
    """NaN or zeros in the caches of the other rows: the same bits in the rows that count."""
    program, rows = made(model, 8), list(REAL)
    tokens, logits = run(program, begun(program, REAL, 0xFF))
    others = [row for row in range(8) if row not in REAL]
    assert np.isfinite(logits[:, rows]).all() and (tokens[:, rows] >= 0).all() and (tokens[:, others] == -1).all()
    clean, expected = run(program, begun(program, REAL, 0))
    np.testing.assert_array_equal(tokens, clean)
    np.testing.assert_array_equal(logits[:, rows], expected[:, rows])


def test_a_row_of_eight_is_the_row_alone(model: glm52_jax.Model) -> None:
    """Fed the same tokens, bucket 1 and a row of bucket 8 differ by what other sums round; where the best token leads by more than
    that, it is the same. (Linear layers, the router and the head add in other orders for one row.)"""
    one, eight = made(model, 1), made(model, 8)
    for row, first in REAL.items():
        tokens, alone = run(one, begun(one, {0: first}, 0xFF))
        forced = np.zeros((STEPS, 8), np.int32)
        forced[:, row] = tokens[:, 0]
        _, together = run(eight, begun(eight, {row: first}, 0xFF), forced)
        assert np.median([rel_l2(a, b) for a, b in zip(together[:, row], alone[:, 0], strict=True)]) < 0.1
        for a, b in zip(together[:, row], alone[:, 0], strict=True):
            second, best = np.sort(b)[-2:]
            if best - second > 2 * np.abs(a - b).max():
                assert a.argmax() == b.argmax()


def test_nothing_is_recorded_again(tmp_path: Path) -> None:
    """XLA's own log of a process of its own, over 64 steps: the graph is recorded once and no address changes."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_buffer_thunk=3"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, str(tmp_path / "c")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    log = done.stderr.partition("steps begin")[2]
    found = audit.records(log)
    assert found.launched >= 64 and (found.recorded, found.updated, found.evicted) == (0, 0, 0), (
        f"{found} {log[-2000:]}"
    )


def _steps_in_a_log(folder: Path) -> None:
    program = made(load(folder), 1)
    state = begun(program, {0: 7}, 0)
    for step in range(4 + 64):
        if step == 4:
            jax.block_until_ready(state.arrays.drawn)
            print("steps begin", file=sys.stderr, flush=True)
        state = program.step(state)
    jax.block_until_ready(state.arrays.drawn)


if __name__ == "__main__":
    _steps_in_a_log(Path(sys.argv[1]))
