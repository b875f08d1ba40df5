"""Cases of one run shared out among processes that take turns on the GPU: most of a benchmark's time is the compiler's.

``python -m bench run --jobs 8`` measures the ceilings, then starts eight workers, which are the same command with ``--worker I/8``.
Each compiles its share of the cases beside the others, and checks, times and records a case while the GPU is its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# The session that a worker joins: a file, which is also the lock that a worker holds while the GPU is its own.
SESSION = "GLM52_BENCH_SESSION"
_MEMORY = 0.92


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


ALL = Share(0, 1)


# Cores of this worker's turns: what launches a chain's graphs must not wait for what compiles.
_quiet: set[int] = set()


def leave_cores(count: int = 2) -> None:
    """Keeps this worker off the first cores, but for its turns: every worker's are on them. Before its first thread only."""
    if hasattr(os, "sched_getaffinity") and len(cores := sorted(os.sched_getaffinity(0))) >= 2 * count:
        _quiet.update(cores[:count])
        os.sched_setaffinity(0, cores[count:])


def leave_memory() -> None:
    """Keeps JAX from taking most of the GPU's memory in this process. Before its first use of the GPU only."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def that_fit(jobs: int, largest: int, memory: int) -> int:
    """How many of ``jobs`` workers, one at least, have a share of the GPU's memory that holds a case of ``largest`` bytes."""
    # What was once allocated stays a process's own, for its turns' addresses must not move.
    return max(1, min(jobs, int(_MEMORY * memory / (1.02 * largest + 1e9))))


def run_workers(
    arguments: Sequence[str],
    jobs: int,
    session: Path,
    say: Callable[[str], None] = print,
    command: Sequence[str] = (),
) -> bool:
    """Runs ``jobs`` workers of this command to their end; whether all of them did what they had to.

    session: what they join (``Session.offer``). Each may have its share of the GPU's memory, and
    prints where this process does.
    """
    environment = {
        **os.environ,
        SESSION: str(session),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / jobs:.3f}",
    }
    program = [*(command or (sys.executable, "-m", "bench")), *arguments]
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a worker must not wait until somebody reads what XLA logs.
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(jobs)]
        workers = [
            subprocess.Popen([*program, "--worker", f"{i}/{jobs}"], env=environment, stderr=errors[i])
            for i in range(jobs)
        ]
        for i, worker in enumerate(workers):
            if worker.wait():
                errors[i].seek(0)
                last = (errors[i].read().strip().splitlines() or ["it said nothing"])[-1][:300]
                say(f"worker {i} ended with status {worker.returncode}, what it had left is missing: {last}")
    return not any(worker.returncode for worker in workers)


@contextlib.contextmanager
def turn(session: Path) -> Iterator[None]:
    """The GPU is this process's own, among those that share the session; the lock goes with the process, however that ends."""
    with session.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _quiet:
            yield
            return
        compiling = os.sched_getaffinity(0)
        os.sched_setaffinity(0, _quiet)
        try:
            yield
        finally:
            os.sched_setaffinity(0, compiling)
