"""Processes that share a run: which cases each takes, how they take turns, and that what is compiled ahead is what runs."""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import ahead, check, run, timing
from bench.operations import select
from bench.session import Session
from bench.workers import SESSION, Share, leave_cores, run_workers, that_fit, turn
from glm52_jax.compile_cache import Compiling
from tests.toy_operation import FAST, H200, Spec, advance, backend, inputs, operation, product

ROW = dataclasses.replace(FAST, rows=(1,))


def test_shares_cover_every_case_once() -> None:
    shares = [Share.parse(f"{i}/3") for i in range(3)]
    assert [[share.takes(n) for share in shares].count(True) for n in range(10)] == [1] * 10


@pytest.mark.parametrize("text", ["3/3", "a/3", "1", "-1/2", ""])
def test_share_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not I/N"):
        Share.parse(text)


def test_workers_join_the_session_with_their_part_of_the_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each worker gets its number and the session; what it prints comes out, and a failed worker is named."""
    program = (
        "import os, sys, json, pathlib; i = sys.argv[-1][0]; print('worker says', i); "
        f"pathlib.Path(r'{tmp_path}', i).write_text(json.dumps([sys.argv[1:], dict(os.environ)])); "
        "sys.exit(int(i) and 'what was wrong')"
    )
    said: list[str] = []
    assert not run_workers(["run", "toy"], 2, tmp_path / "s", said.append, command=(sys.executable, "-c", program))
    assert said == ["worker 1 ended with status 1, what it had left is missing: what was wrong"]
    assert sorted(capfd.readouterr().out.splitlines()) == ["worker says 0", "worker says 1"]
    for i in range(2):
        arguments, environment = json.loads((tmp_path / str(i)).read_text())
        assert arguments == ["run", "toy", "--worker", f"{i}/2"]
        assert environment[SESSION] == str(tmp_path / "s")
        assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert 0.3 < float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) <= 0.5
    assert run_workers([], 2, tmp_path / "s", said.append, command=(sys.executable, "-c", "pass"))


def test_as_many_workers_as_have_memory_for_the_largest_case() -> None:
    made = operation(backend("triton", product))
    (spec,) = (spec for case, spec in run.cases(select("toy:large", {"toy": made}), ROW, H200))
    assert run.largest([select("toy", {"toy": made})], ROW, H200) == made.size(spec) > 0
    assert run.largest([], ROW, H200) == 0
    # Sparse MLA's cache, on an H200: five workers got through with it.
    assert that_fit(8, int(23.9e9), H200.memory_bytes) == 5 and that_fit(3, int(23.9e9), H200.memory_bytes) == 3
    assert that_fit(8, 0, H200.memory_bytes) == 8 and that_fit(8, int(300e9), H200.memory_bytes) == 1


def _in_turn(session: Path, log: Path, name: str, both: Any) -> None:
    both.wait(60)
    for _ in range(20):
        with turn(session):
            for _ in range(2):
                with log.open("a") as file:
                    file.write(name)
                time.sleep(0.001)


def test_turns_do_not_overlap(tmp_path: Path) -> None:
    session, log = tmp_path / "session", tmp_path / "log"
    session.touch()
    start = multiprocessing.get_context("spawn")
    barrier = start.Barrier(2)  # they start together, or one would be through before the other is there
    both = [start.Process(target=_in_turn, args=(session, log, name, barrier)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    text = log.read_text()
    assert len(text) == 80 and set(text[i : i + 2] for i in range(0, 80, 2)) <= {"aa", "bb"}


def _cores(session: Path, found: Any) -> None:
    seen = [os.sched_getaffinity(0)]
    leave_cores(1)
    for _ in range(2):
        seen.append(os.sched_getaffinity(0))
        with turn(session):
            seen.append(os.sched_getaffinity(0))
    found.put(seen)


def test_turns_have_cores_of_their_own(tmp_path: Path) -> None:
    """A chain's graphs are launched where nothing compiles; with few cores nothing is kept apart."""
    (tmp_path / "session").touch()
    start = multiprocessing.get_context("spawn")
    found = start.Queue()
    process = start.Process(target=_cores, args=(tmp_path / "session", found))
    process.start()
    every, *seen = found.get(timeout=60)
    process.join(60)
    first = {min(every)}
    assert seen == ([every - first, first] * 2 if len(every) > 1 else [every] * 4)


def test_a_session_is_joined_as_it_was_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "raise_clocks", lambda: None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "matmul_rate", lambda: 8e14)
    first = Session(H200, tmp_path, lambda _: None)
    monkeypatch.setattr(timing, "matmul_rate", lambda: pytest.fail("a worker measured a ceiling again"))
    joined = Session(H200, tmp_path, lambda _: None, first.offer(tmp_path / "session.json"))
    assert (joined.ceilings, joined.environment, joined.name) == (first.ceilings, first.environment, first.name)
    made = operation(backend("triton", product), advance=advance)
    selection = select("toy:square", {"toy": made})
    run.run([selection], FAST, joined, Share(1, 2))
    kept = json.loads((tmp_path / "h200" / "toy.json").read_text())["records"]
    assert {record["rows"] for record in kept} == {2} and {record["run"] for record in kept} == {first.name}


def test_what_is_compiled_ahead_is_what_runs() -> None:
    """The inputs, both calls of the check, whose arguments differ in kind, and the chain; and nothing runs ahead of them."""
    ran: list[int] = []

    def first_has_no_layer(spec: Spec, key: jax.Array) -> Any:
        return *inputs(spec, key)[:2], None

    def either(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array | None) -> jax.Array:
        return product(spec, x, w, jnp.int32(0) if layer is None else layer)

    def counted(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array | None) -> jax.Array:
        jax.debug.callback(lambda: ran.append(spec.layers))
        return either(spec, x, w, layer)

    offered = {"advance": advance, "inputs": first_has_no_layer}
    made = operation(backend("triton", counted), reference=either, **offered).remembering()
    key, lengths, programs = jax.random.key(0), {"triton": 4, "reference": 2}, []
    for spec in (Spec(rows=2, layers=3), Spec(rows=2, layers=4)):  # the first warms up what JAX compiles for itself
        ahead.compile_case(made, spec, lengths)
        assert not ran
        with Compiling() as compiling:
            args = made.inputs(spec, key)
            assert check.checked(made, spec, "triton", args).ok
            for repeat in [timing.chain(made, spec, name, args, length) for name, length in lengths.items()]:
                repeat.run(2)
        programs.append(compiling.programs)
        jax.effects_barrier()
        assert len(ran) == 2 + 2 * 4
        ran.clear()
    assert programs[1] == 0, f"compiled while the GPU was needed: {programs}"
