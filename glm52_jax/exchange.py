"""Exchanges over peer pointers for compiled programs: who owns the peers' memory, and how a program gets it.

One ``Exchange`` for a mesh, shared by every program on it. It owns the epoch too, which is no part of a program's state on purpose:
a state that is copied, kept and run again would bring an old epoch back, and with it the packets of an earlier call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glm52_jax import parallel
from glm52_jax.plan import Parallel
from pallas_kernels.collectives import workspace


class PeerMissingError(RuntimeError):
    """A device waited for another one in vain; what was computed since is NaN."""


class Exchange:
    """The workspace of a mesh and where its calls stand; programs that use it take turns."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._lock = mesh, threading.Lock()
        self.work, self.state = workspace.make(mesh)

    def run(self, executable: Callable[..., Any], *args: Any) -> Any:
        """``executable(*args, work, state) -> (result, state)``: queued with the state that the call before left."""
        with self._lock:
            result, self.state = executable(*args, self.work, self.state)
        return result

    def check(self) -> None:
        """Waits for all that is queued. PeerMissingError names who missed whom; the workspace is made anew then."""
        with self._lock:
            status = np.asarray(self.state.status)[:, 0]
            if not status.any():
                return
            missed = {rank: workspace.missing(int(bits)) for rank, bits in enumerate(status) if bits}
            self.work, self.state = workspace.make(self._mesh)
        told = "; ".join(
            f"device {rank} missed {', '.join('its own blocks' if peer == 30 else f'device {peer}' for peer in peers)}"
            for rank, peers in missed.items()
        )
        raise PeerMissingError(f"{told}. Results since then are NaN: begin the sequences again")


def of(share: Parallel | None) -> Exchange | None:
    """The exchange of a mesh of 2, 4 or 8 GPUs of this process; None where XLA's collectives serve instead."""
    if share is None or share.devices not in workspace.WORLDS:
        return None
    devices = list(share.mesh.devices.flat)
    if any(device.platform != "gpu" or device.process_index != devices[0].process_index for device in devices):
        return None
    return _of(share.mesh)


@cache
def _of(mesh: Mesh) -> Exchange:
    return Exchange(mesh)


class Lowered:
    """``function(weights, state) -> state``, traced and lowered for shapes, with its exchanges over peer pointers where they serve.

    The state is donated, and so is the epoch; the workspace is an argument that is not.
    """

    def __init__(self, function: Callable[[Any, Any], Any], share: Parallel | None, weights: Any, state: Any) -> None:
        """weights, state: arrays or ``jax.ShapeDtypeStruct``, with shardings on a mesh."""
        self._exchange = exchange = of(share)

        def exchanged(weights: Any, state: Any, work: workspace.Workspace, calls: workspace.State) -> Any:
            with parallel.exchanging(work, calls) as box:
                result = function(weights, state)
            return result, box.state

        if exchange is None:
            self._lowered = jax.jit(function, donate_argnums=1).lower(weights, state)
        else:
            args = (weights, state, exchange.work, exchange.state)
            self._lowered = jax.jit(exchanged, donate_argnums=(1, 3)).lower(*args)

    def compile(self, compiler_options: Any = None) -> Step:
        """compiler_options: XLA's, such as those that dump."""
        return Step(self._lowered.compile(compiler_options=compiler_options), self._exchange)


class Step:
    """What ``Lowered.compile`` gives: called as the function is."""

    def __init__(self, executable: Any, exchange: Exchange | None) -> None:
        self._executable, self._exchange = executable, exchange

    def __call__(self, weights: Any, state: Any) -> Any:
        if self._exchange is None:
            return self._executable(weights, state)
        return self._exchange.run(self._executable, weights, state)

    def as_text(self) -> str | None:
        """The optimized HLO; the state's leaves come first among the outputs."""
        return self._executable.as_text()
