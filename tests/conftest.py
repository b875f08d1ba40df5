"""Settings of the whole suite: the platform, JAX's strict modes and hypothesis."""

import importlib.util
import os
import re

import pytest
from hypothesis import HealthCheck, settings

# Read by JAX when it is imported, here and in the processes that tests start: mixing dtypes or ranks is an error.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Pallas' GPU interpreter runs every thread of a kernel as a callback that holds a thread of XLA's pool, which has one a core:
# on two cores a kernel of four warpgroups could deadlock.
os.environ.setdefault("PJRT_NPROC", "32")

# The same examples in every run and no time limits: CI's two cores are shared.
# To explore with fresh examples: --hypothesis-profile=default.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def selects(mark_expression: str, mark: str) -> bool:
    """Whether `-m mark_expression` asks for tests marked `mark`: the mark stands there without a `not` before it."""
    return re.search(rf"(?<!not )\b{mark}\b", mark_expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the CPU before JAX is imported, unless the run asks for GPU tests."""
    expression = config.option.markexpr
    if selects(expression, "gpu") or selects(expression, "multigpu"):
        # Several workers of pytest-xdist share the card, and no test needs the fastest of cuBLAS' kernels.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Most of the suite's time is LLVM's; unoptimized code is as exact.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuses a GPU run on a machine that cannot serve it: such a run must not end as a row of skips."""
    expression = session.config.option.markexpr
    needed = 2 if selects(expression, "multigpu") else int(selects(expression, "gpu"))
    if needed and not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        import jax

        found = [device for device in jax.devices() if device.platform == "gpu"]
        if len(found) < needed:
            raise pytest.UsageError(
                f"-m {expression!r} needs {needed} GPU(s); JAX sees {jax.devices()}. "
                "On a GPU machine run ./dev install cuda13 (or cuda12) first."
            )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this run cannot mean: tests of several GPUs under a plain ``-m gpu``, tests of Triton where it is absent.

    A run that asks for either by name is refused where it cannot be served, not emptied.
    """
    if not selects(config.option.markexpr, "multigpu"):
        deselect(config, items, "multigpu")
    if importlib.util.find_spec("triton") is not None:
        return
    if selects(config.option.markexpr, "needs_triton"):
        raise pytest.UsageError(
            f"-m {config.option.markexpr!r} needs triton, which this Python lacks: pip install triton"
        )
    deselect(config, items, "needs_triton")


def deselect(config: pytest.Config, items: list[pytest.Item], mark: str) -> None:
    """Takes the marked tests out, and counts them as deselected."""
    without = [item for item in items if item.get_closest_marker(mark)]
    if without:
        items[:] = [item for item in items if item not in without]
        config.hook.pytest_deselected(items=without)
