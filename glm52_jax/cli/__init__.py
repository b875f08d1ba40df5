"""The ``glm52`` command: generate, score, inspect, plan, make-tiny; one file a command.

JAX and everything that needs it is imported inside the commands: ``glm52 --help`` and ``glm52 inspect`` start at once
and need no JAX.
"""

from glm52_jax.cli.app import app, main

__all__ = ["app", "main"]
