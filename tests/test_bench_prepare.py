"""Workers that compile for a benchmark's run, and how its cases are shared out among them."""

import json
import sys
from pathlib import Path

import jax
import pytest

from bench import run
from bench.operations import select
from bench.prepare import Share, run_workers
from tests.toy_operation import FAST, H200, advance, backend, nan, operation, product


def test_shares_cover_every_case_once() -> None:
    shares = [Share.parse(f"{i}/3") for i in range(3)]
    assert [[share.takes(n) for share in shares].count(True) for n in range(10)] == [1] * 10


@pytest.mark.parametrize("text", ["3/3", "a/3", "1", "-1/2", ""])
def test_share_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not I/N"):
        Share.parse(text)


def test_workers_share_one_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each worker gets its number and the cache; this process uses that cache afterwards, and a failed worker is named."""
    program = (
        "import os, sys, json, pathlib; i = sys.argv[-1][0]; "
        f"pathlib.Path(r'{tmp_path}', i).write_text(json.dumps([sys.argv[1:], dict(os.environ)])); "
        "sys.exit(int(i) and 'what was wrong')"
    )
    before = {name: jax.config.values[name] for name in _SETTINGS}
    said: list[str] = []
    try:
        run_workers(["run", "toy"], 2, said.append, command=(sys.executable, "-c", program))
        cache = jax.config.jax_compilation_cache_dir
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert said == ["worker 1 ended with status 1, the run itself compiles its cases: what was wrong"]
    for i in range(2):
        arguments, environment = json.loads((tmp_path / str(i)).read_text())
        assert arguments == ["run", "toy", "--worker", f"{i}/2"]
        assert environment["JAX_COMPILATION_CACHE_DIR"] == cache
        assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def test_worker_runs_its_share_and_leaves_wrong_results_to_the_run() -> None:
    called: list[int] = []

    def counted(spec, *args):
        called.append(spec.rows)
        return product(spec, *args)

    made = operation(backend("triton", counted), advance=advance)
    run.compile_share([select("toy:square", {"toy": made})], FAST, H200, Share(1, 2))
    assert set(called) == {2}
    run.compile_share([select("toy:square", {"toy": operation(backend("triton", nan))})], FAST, H200, Share(0, 1))
