"""Several devices give what one gives: eight fake CPU devices, in processes of their own so that the suite keeps one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm52_jax.cli import main

ROOT = Path(__file__).parents[1]
EIGHT = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"


# The short ones share a process, whose start is most of their time.
@pytest.mark.parametrize("checks", ["floats", "blocks", "faults", "refusals exchanges peers benches"])
def test_on_eight_devices(checks: str) -> None:
    env = os.environ | {"XLA_FLAGS": EIGHT}
    command = [sys.executable, "-W", "error", "-m", "tests.parallel_worker", *checks.split()]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "options,problem",
    [
        (["--devices", "2"], "between 1 and 1"),
        (["--coordinator", "h:1"], "--process-id and --num-processes missing"),
        (["--coordinator", "h", "--process-id", "0", "--num-processes", "2"], "must be HOST:PORT"),
        (["--coordinator", "h:1", "--process-id", "2", "--num-processes", "2"], "must be below --num-processes 2"),
    ],
)
def test_options_that_cannot_be(options: list[str], problem: str, tmp_path: Path, capsys) -> None:
    from glm52_jax.cli.make_tiny import tiny_config, write_tiny

    write_tiny(tmp_path / "c", tiny_config(layers=1))
    assert main(["generate", str(tmp_path / "c"), "--prompt", "a", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err
