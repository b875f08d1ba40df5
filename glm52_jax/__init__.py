"""GLM-5, 5.1 and 5.2 decode in JAX: a Hugging Face checkpoint directory goes in, tokens come out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm52_jax.checkpoint import CheckpointError
    from glm52_jax.config import Config, ConfigError
    from glm52_jax.exchange import PeerMissingError
    from glm52_jax.generate import Model, NotFiniteError, Token, load
    from glm52_jax.sampling import Sampling

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Model",
    "NotFiniteError",
    "PeerMissingError",
    "Sampling",
    "Token",
    "__version__",
    "load",
]

# Resolved on first use: reading a checkpoint's headers or printing the help needs no JAX, whose import takes most of a second.
_HOME = {
    **{"CheckpointError": "checkpoint", "Config": "config", "ConfigError": "config", "Sampling": "sampling"},
    "PeerMissingError": "exchange",
    **{"Model": "generate", "NotFiniteError": "generate", "Token": "generate", "load": "generate"},
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
