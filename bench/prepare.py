"""Compiling side by side before timing one after the other: most of a benchmark's time is the compiler's, on one core.

``python -m bench run --jobs 8`` first starts eight workers, which are the same command with ``--worker I/8``. Each compiles and
checks its share of the cases into JAX's persistent cache and times nothing; then the run itself finds its programs there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax

# Everything is worth keeping: a chain's hundred launches are lowered anew, but neither ptxas nor XLA runs twice.
_CACHE = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


@dataclasses.dataclass(frozen=True)
class Share:
    """Worker ``index`` of ``count`` takes every count-th case."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f"--worker {text!r} is not I/N with I < N")
        return cls(int(index), int(count))

    def takes(self, number: int) -> bool:
        return number % self.count == self.index


def run_workers(
    arguments: Sequence[str], jobs: int, say: Callable[[str], None] = print, command: Sequence[str] = ()
) -> None:
    """Runs ``jobs`` workers of this command to their end, and lets this process use the cache that they filled.

    A worker that fails is reported and costs only time: the run itself compiles and checks what is missing.
    """
    settings = {**_CACHE, "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or _new_folder()}
    environment = {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}
    # Memory that a worker is done with goes back at once: the pool that JAX keeps otherwise, times the workers, fills the card.
    crowded = {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    program = [*(command or (sys.executable, "-m", "bench")), *arguments]
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a worker must not wait until somebody reads what XLA logs.
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(jobs)]
        workers = [
            subprocess.Popen(
                [*program, "--worker", f"{i}/{jobs}"], env=crowded, stdout=subprocess.DEVNULL, stderr=errors[i]
            )
            for i in range(jobs)
        ]
        for i, worker in enumerate(workers):
            if worker.wait():
                errors[i].seek(0)
                last = (errors[i].read().strip().splitlines() or ["it said nothing"])[-1][:300]
                say(f"worker {i} ended with status {worker.returncode}, the run itself compiles its cases: {last}")
    for name, value in settings.items():
        jax.config.update(name, value)


def _new_folder() -> str:
    return tempfile.mkdtemp(prefix="bench-programs-")
