"""The soak at tiny sizes on the CPU, and that it sees what it is there to see."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import soak, soak_command
from bench.soak import Soaking, SoakSpec
from glm52_jax.config import Config
from glm52_jax.tiny import tiny_config

CONFIG = Config.from_hf(
    tiny_config(
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        first_k_dense_replace=1,
        indexer_types=["full", "shared"],
        index_topk=16,
        vocab_size=96,
    )
)
SPEC = SoakSpec(CONFIG, steps=120, rows=3, pages=1, prompts=3, poison=25, dtype="float32")


@cache
def soaking() -> Soaking:
    return Soaking(SPEC)


def again(**changes) -> Soaking:
    """The same program and weights, nothing else."""
    other = object.__new__(Soaking)
    other.__dict__ |= vars(soaking()) | {"spec": dataclasses.replace(SPEC, **changes), "rows": [None] * SPEC.rows}
    other.state, other.seen = soaking().program.fresh(soak.GREEDY, positions=-1), soak.Soak()
    other.texts, other.random = {}, np.random.default_rng(1)
    return other


def test_sequences_come_and_go_and_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_command, "Soaking", lambda spec, mark, say: soaking())
    said: list[str] = []
    monkeypatch.setattr(soaking(), "say", said.append)
    assert soak_command.soak(SPEC, tmp_path, say=said.append) == 0
    assert said[:2] == ["compiled and warm", said[1]] and said[1].startswith("12 of 120 steps after ")
    (path,) = tmp_path.glob("*/checks/soak.json")
    record = json.loads(path.read_text())
    seen = record["seen"]
    assert seen["steps"] == 120 and len(seen["memory"]) == 10 and len(set(seen["memory"])) == 1
    assert seen["poisoned"] >= 3 and seen["sequences"] > 10 and seen["tokens"] > 200
    # Float32 on the CPU, and every row of one program: the texts are the same.
    assert seen["texts_again"] == seen["texts_same"] > 5
    assert record["wrong"] == [] and "0 bytes more at the end" in said[11] and record["device_kind"]


def test_nan_where_nobody_put_it_is_a_fault() -> None:
    run = again(steps=10, poison=0)
    broken = run.program.weights.norm.at[0].set(jnp.nan)
    real, run.program.weights = run.program.weights, run.program.weights.replace(norm=broken)  # type: ignore[attr-defined]
    try:
        seen = run.run()
    finally:
        run.program.weights = real
    assert seen.faults[0].startswith("first token of prompt") and seen.wrong[0] == f"not finite: {seen.faults[0]}"


def test_a_poisoned_sequence_must_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "filled_with_nan", lambda latent, table, row: latent)
    seen = again(steps=30, poison=10).run()
    assert seen.unreported and any("poisoned before" in text for text in seen.wrong)


def test_what_grows_moves_or_compiles_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[jax.Array] = []
    run = again(steps=20, poison=0)
    real = run.program.copied

    def copied(state):
        # A leak, a program made while it runs, and a state that is copied.
        number = len(kept)
        kept.append(jax.jit(lambda a: a + number)(jnp.zeros(8, jnp.int32)))
        arrays = run.program.release(run.state)
        run.state = run.program.adopt(arrays.replace(positions=jnp.array(arrays.positions, copy=True)))
        return real(run.state)

    monkeypatch.setattr(run.program, "copied", copied)
    seen = run.run()
    assert seen.grown > 0 and seen.moved > 0 and seen.programs > 0
    assert len(seen.wrong) == 3 and "bytes of device memory more" in seen.wrong[0]


def test_the_graph_in_the_log() -> None:
    log = "\n".join(
        [
            "x] Initialized command buffer on device #0 in 9 us",
            soak.STEPS,
            "x] Recorded command buffer in 7 us",
            soak.OTHER,
            soak.START,
            soak.STEPS,
            "x] Updated command buffer in 7 us",
            "x] Execute command buffer; num_executions=1",
            soak.OTHER,
            "x] Evicted 2 command buffer thunk command buffers",
            "x] Updated command buffer in 7 us",
            soak.STEPS,
            "x] Updated command buffer in 7 us",
        ]
    )
    stepping, other = soak_command.graph_lines(log)
    assert stepping == {"Updated": 2} and other == {"Evicted": 1, "Updated": 1}


def test_a_graph_that_a_step_records_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = soak.Soak(steps=1, memory=[5], traces=1)
    monkeypatch.setattr(soak_command, "Soaking", lambda spec, mark, say: argparse.Namespace(run=lambda: seen))
    log, said = tmp_path / "log", list[str]()
    log.write_text(f"{soak.START}\n{soak.STEPS}\nx] Updated command buffer in 7 us\n")
    assert soak_command.soak(SPEC, tmp_path, log, said.append) == 1 and "WRONG: 1 graphs updated by steps" in said
    log.write_text(f"{soak.STEPS}\nx] Updated command buffer in 7 us\n{soak.START}\n")
    assert soak_command.soak(SPEC, tmp_path, log, said.append) == 0


def test_the_command_runs_it_in_a_process_with_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    soak_command.add_options(parser)
    options = parser.parse_args(["--steps", "5", "--results", str(tmp_path)])
    lines: list[list[str]] = []

    def run(line, env, stderr, **_):
        lines.append(line)
        assert env["TF_CPP_VMODULE"] == "command_buffer_thunk=3" and env["TF_CPP_MIN_LOG_LEVEL"] == "0"
        stderr.write("what happened\n")
        return argparse.Namespace(returncode=3)

    monkeypatch.setattr(soak_command.subprocess, "run", run)
    assert soak_command.main(options) == 3
    asked: list[object] = []
    monkeypatch.setattr(soak_command, "soak", lambda spec, results, log: asked.extend((spec, results, log)) or 0)
    assert soak_command.worker(lines[0][3:]) == 0
    spec, results, log = asked
    assert isinstance(spec, SoakSpec) and (spec.steps, spec.rows, spec.config.hidden_size) == (5, 8, 512)
    assert results == tmp_path and log is not None
