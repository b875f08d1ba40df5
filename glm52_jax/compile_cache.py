"""JAX's persistent compilation cache, kept under the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

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
