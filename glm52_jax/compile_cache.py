"""JAX's persistent compilation cache, kept under the user's cache folder, and what compiling takes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Self

# A folder to use instead, or "off".
VARIABLE = "GLM52_COMPILE_CACHE"
_OFF = ("off", "0", "no", "false")


def cache_root() -> Path:
    """$XDG_CACHE_HOME/glm52_jax, else ~/.cache/glm52_jax."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG rules: a relative path there is to be ignored.
    root = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "glm52_jax"


def enable() -> Path | None:
    """Keeps compiled programs from one process to the next, however short their compilation was.

    In ``cache_root()/compiled``, in the folder that GLM52_COMPILE_CACHE names, or nowhere where that is "off". A cache that the
    user gave JAX (JAX_COMPILATION_CACHE_DIR) stays as it is. Returns the folder in use. Call it before anything is compiled: JAX
    looks once.
    """
    import jax

    given = jax.config.jax_compilation_cache_dir
    if given:
        return Path(given)
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in _OFF:
        return None
    folder = Path(wanted).expanduser() if wanted else cache_root() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A decode step is hundreds of small programs beside a large one; JAX's own limit leaves out what compiles in under a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


class Compiling:
    """What JAX traces, lowers and compiles while it is entered, on any thread.

    programs: executables made; from_cache: those of them that the persistent cache held.
    """

    def __init__(self) -> None:
        self.programs = self.from_cache = 0
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Time during which something was being traced, lowered or compiled: spans that overlap count once."""
        total, until = 0.0, float("-inf")
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def __enter__(self) -> Self:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._took)
        monitoring.register_event_listener(self._happened)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._took)
        monitoring.unregister_event_listener(self._happened)

    def _took(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            with self._lock:
                self._spans.append((now - duration_secs, now))
                self.programs += event.endswith("/backend_compile_duration")

    def _happened(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            with self._lock:
                self.from_cache += 1
