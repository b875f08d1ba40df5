"""Several devices and several processes, for the commands that run a model."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from glm52_jax.cli.common import CliError

Parallel = Literal["tp", "ep", "ep+dp"]
ParallelOption = Annotated[
    Parallel | None,
    typer.Option(
        "--parallel",
        help="How devices share the model. tp: every weight sliced; ep: whole experts on devices; ep+dp: and sequences too.",
    ),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices", min=1, help="Share the model over the first N devices; default one, or all with --parallel."
    ),
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator", metavar="HOST:PORT", help="Where process 0 of several listens; all get the same command."
    ),
]
ProcessIdOption = Annotated[int | None, typer.Option("--process-id", min=0, help="Which of the processes this is.")]
NumProcessesOption = Annotated[int | None, typer.Option("--num-processes", min=1, help="How many there are.")]


_SHUTDOWN_SECONDS = 30


@dataclass(frozen=True)
class Several:
    """The options above, as given."""

    parallel: str | None = None
    devices: int | None = None
    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Joins the other processes, before JAX is used; only process 0 prints to stdout and stderr inside."""
        if not self._distributed():
            yield
            return
        import jax

        import pallas_kernels.collectives  # noqa: F401  keeps NVLink multicast off, before the first collective

        with contextlib.ExitStack() as stack:
            stack.enter_context(_only_python_writes_to_stdout())
            # An interrupted process must not wait for the others for minutes.
            jax.distributed.initialize(
                self.coordinator, self.num_processes, self.process_id, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
            )
            stack.callback(jax.distributed.shutdown)
            if self.process_id:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield

    def load_options(self) -> dict[str, Any]:
        """What ``glm52_jax.load`` gets: nothing for one device. ValueError for devices that are not there."""
        if self.parallel is None and self.devices is None and self.coordinator is None:
            return {}
        from glm52_jax.parallel import make_mesh

        return {"mesh": make_mesh(self.devices), "parallel": self.parallel or "tp"}

    def agree(self, *request: object) -> None:
        """CliError where the processes were asked for different things: they would wait for each other for ever."""
        if self.coordinator is None:
            return
        import numpy as np
        from jax.experimental import multihost_utils

        mine = zlib.crc32(repr((self.parallel, self.devices, request)).encode()) >> 1
        all_of_them = multihost_utils.process_allgather(np.array(mine, np.int32))
        if len(differing := sorted(set(np.asarray(all_of_them).ravel().tolist()))) > 1:
            raise CliError(
                f"the {self.num_processes} processes were given {len(differing)} different requests: each needs the same prompt, "
                "sampling and model options"
            )

    def _distributed(self) -> bool:
        """Whether there are several processes; CliError unless their three options are all given and possible."""
        given = {
            "--coordinator": self.coordinator,
            "--process-id": self.process_id,
            "--num-processes": self.num_processes,
        }
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return False
        if missing:
            raise CliError(f"{' and '.join(missing)} missing: several processes need {', '.join(given)}")
        assert self.coordinator is not None and self.process_id is not None and self.num_processes is not None
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[^\]\s]+\]:\d{1,5}", self.coordinator):
            raise CliError(f"--coordinator {self.coordinator}: must be HOST:PORT, as 10.0.0.1:8476")
        if self.process_id >= self.num_processes:
            raise CliError(f"--process-id {self.process_id} must be below --num-processes {self.num_processes}")
        return True


@contextlib.contextmanager
def _only_python_writes_to_stdout() -> Iterator[None]:
    """Sends what libraries print to file descriptor 1 (Gloo announces its connections there) to stderr: stdout is the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding=sys.stdout.encoding, closefd=False) as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
