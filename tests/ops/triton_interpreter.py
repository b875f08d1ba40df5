"""Triton kernels on the CPU: ``install()`` makes ``jax_triton.triton_call`` run them in Triton's interpreter, over numpy's memory.

The interpreter must be switched on (``TRITON_INTERPRET=1``) before triton is imported, so a test runs itself as a script:
``run_script(__file__)``. The interpreter takes buffers of torch; here it is given numpy's, and what it does to bfloat16 is
corrected (truncated casts, products of bits). Outputs start as NaN or -1, never as zeros.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[2]
# What only a launch on a GPU has.
_LAUNCH = ("name", "num_warps", "num_stages", "compute_capability")


def run_script(path: str, *arguments: str) -> str:
    """Runs a test's file under the interpreter; its standard output, or an AssertionError with the end of what it said."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, path, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An argument of a kernel."""

    array: np.ndarray


def install() -> None:
    """Call it once, before a kernel's module is imported."""
    import jax_triton
    from triton.runtime import interpreter

    _take_buffers(interpreter)
    _mend_bfloat16(interpreter)
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    jax_triton.triton_call = triton_call


def _take_buffers(interpreter: Any) -> None:
    import triton.language as tl

    names: dict[str, Any] = {name: getattr(tl, name) for name in ("bfloat16", "float32", "int32", "uint32", "uint8")}
    names["float8_e4m3fn"] = tl.float8e4nv
    convert = interpreter._implicit_cvt

    def argument(arg: Any) -> Any:
        if not isinstance(arg, Buffer):
            return convert(arg)
        kind = tl.pointer_type(names[arg.array.dtype.name])
        return tl.tensor(interpreter.TensorHandle(np.array([arg.array.ctypes.data], np.uint64), kind), kind)

    interpreter._implicit_cvt = argument


def _mend_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    cast, handle = interpreter.InterpreterBuilder.cast_impl, interpreter.TensorHandle

    def wide(value: Any) -> np.ndarray:
        narrow = value.dtype.scalar == tl.bfloat16
        return value.data.view(ml_dtypes.bfloat16).astype(np.float32) if narrow else value.data

    def dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        return handle(np.matmul(wide(a), wide(b)) + total.data, tl.float32)

    def rounded(builder: Any, value: Any, kind: Any) -> Any:
        if value.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return handle(value.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(builder, value, kind)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.cast_impl = rounded


def triton_call(*args: Any, kernel: Any, out_type: Any, grid: tuple[int, ...], **options: Any) -> Any:
    """jax_triton's, eagerly; what a kernel writes into a jax.Ref is there afterwards."""
    constants = {name: value for name, value in options.items() if name not in _LAUNCH}
    results = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out_type)]
    for result in results:
        result.view(np.uint8)[...] = 0xFF
    refs = [(at, a) for at, a in enumerate(args) if isinstance(a, jax.Ref)]
    arrays = [np.array(a[...] if isinstance(a, jax.Ref) else a) for a in args]
    kernel[tuple(grid)](*(Buffer(array) for array in (*arrays, *results)), **constants)
    for at, ref in refs:
        ref[...] = jnp.asarray(arrays[at])
    return jax.tree.unflatten(jax.tree.structure(out_type), [jnp.asarray(result) for result in results])
