"""Two processes on loopback, one device each, through the command line: the text of one process, printed once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from glm52_jax.cli import main
from glm52_jax.cli.make_tiny import tiny_config, write_tiny

OPTIONS = ["--temperature", "0.7", "--seed", "3", "--max-new-tokens", "24", "--ignore-eos", "--dtype", "float32"]
SECONDS = 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A layer of each kind: three processes compile each of them.
    kinds = {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "shared"]}
    write_tiny(path := tmp_path_factory.mktemp("two") / "c", tiny_config(layers=2) | kinds, weights="float32")
    return path


def run_two(directory: Path, prompts: tuple[str, str], mode: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of processes 0 and 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # Gloo is JAX's own choice for CPUs today; one device a process, whatever XLA_FLAGS the suite runs with.
    env = os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "glm52_jax.cli", "generate", str(directory), "--prompt", prompts[i], *OPTIONS),
                *("--parallel", mode, "--coordinator", address, "--process-id", str(i), "--num-processes", "2"),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def test_two_processes_write_what_one_writes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "--prompt", "Hello", *OPTIONS]) == 0
    want = capsys.readouterr().out
    assert len(want) > 12
    first, second = run_two(checkpoint, ("Hello", "Hello"), "tp")
    assert first[:2] == (0, want), first
    assert second[:2] == (0, ""), second
    assert "24 new tokens" in first[2] and "new tokens" not in second[2]


def test_processes_with_different_prompts_are_refused(checkpoint: Path) -> None:
    for code, out, err in run_two(checkpoint, ("Hello", "Hullo"), "ep"):
        assert code == 2 and out == "", err
        assert "2 processes were given 2 different requests" in err
