"""The Triton kernels of sample_logits by Triton's interpreter on the CPU, bit for bit against the reference.

The interpreter must be switched on before triton is imported, so the comparison runs in a process of its own, this file as a
script. Of the kernels only the four helpers in PTX (bins in shared memory) are replaced, by numpy.
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
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HOSTILE = 8


@pytest.mark.needs_triton
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("equal") == 4 + HOSTILE


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An argument of a kernel in the interpreter."""

    array: np.ndarray


def _install() -> None:
    """jax_triton.triton_call runs kernels in the interpreter, over garbage outputs; bins are numpy's."""
    import jax_triton
    import triton.language as tl
    from triton.runtime import interpreter

    from pallas_kernels.sample_logits import bins_triton

    names = {name: getattr(tl, name) for name in ("bfloat16", "float32", "int32", "uint32")}
    convert = interpreter._implicit_cvt

    def argument(arg: Any) -> Any:
        if not isinstance(arg, Buffer):
            return convert(arg)
        kind = tl.pointer_type(names[arg.array.dtype.name])
        return tl.tensor(interpreter.TensorHandle(np.array([arg.array.ctypes.data], np.uint64), kind), kind)

    interpreter._implicit_cvt = argument
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None

    def triton_call(*args: Any, kernel: Any, out_type: Any, grid: tuple[int, ...], **options: Any) -> Any:
        for unknown in ("name", "num_warps", "num_stages", "compute_capability"):
            options.pop(unknown, None)
        results = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out_type)]
        for result in results:
            result.view(np.uint8)[...] = 0xFF
        refs = [a for a in args if isinstance(a, jax.Ref)]
        arrays = [np.array(a[...] if isinstance(a, jax.Ref) else a) for a in args]
        kernel[tuple(grid)](*(Buffer(a) for a in (*arrays, *results)), **options)
        for ref in refs:
            ref[...] = jnp.asarray(next(b for a, b in zip(args, arrays, strict=True) if a is ref))
        return jax.tree.unflatten(jax.tree.structure(out_type), [jnp.asarray(result) for result in results])

    def add(table: np.ndarray, plane: Any, digit: Any, amount: Any, live: Any) -> None:
        chosen = np.broadcast_to(live.handle.data, digit.handle.data.shape)
        np.add.at(table[int(plane)], digit.handle.data[chosen], amount.handle.data[chosen].astype(np.uint32))

    def read(table: np.ndarray, plane: Any) -> Any:
        return tl.tensor(
            interpreter.TensorHandle(table[int(plane)].copy(), tl.uint32), tl.block_type(tl.uint32, [2048])
        )

    jax_triton.triton_call = triton_call
    bins_triton.declare = lambda: np.full((3, 2048), 0xABCD, np.uint32)
    bins_triton.clear = lambda table: table.fill(0)
    bins_triton.add, bins_triton.read = add, read


def _hostile(vocab: int) -> np.ndarray:
    rng = np.random.default_rng(vocab)
    rows = [
        rng.normal(size=vocab),
        np.zeros(vocab),
        np.full(vocab, np.nan),
        np.full(vocab, -np.inf),
        rng.choice([np.nan, -np.inf, 1.0, 2.0], vocab),
        rng.choice([np.inf, 3e38, -3e38, np.nan, 0.0], vocab),
        rng.integers(-2, 2, vocab),
        rng.choice([0.0, -0.0, 1e-3, -40.0, -20.0], vocab),
    ]
    return np.stack(rows).astype(np.float32)


def _equal(spec: Any, args: tuple[Any, ...], block: int) -> None:
    from pallas_kernels.sample_logits import reference, triton

    got, want = triton.run(spec, *args, block=block), reference.run(spec, *args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    print("equal", spec, np.asarray(got[0]), np.asarray(got[1]))


def main() -> None:
    from pallas_kernels.sample_logits.spec import Spec, inputs

    _install()
    for rows, vocab, dtype, greedy in (
        *((11, 3000, "float32", False), (3, 5000, "bfloat16", False), (2, 100, "float32", False)),
        (4, 3000, "float32", True),
    ):
        spec = Spec(rows, vocab, dtype, greedy)
        _equal(spec, inputs(spec, jax.random.key(rows)), 1024)
    parameters = [
        *((1.0, 0, 1.0, 0.0), (0.5, 7, 1.0, 0.0), (2.0, 0, 0.3, 0.0), (4.0, 700, 0.9, 0.1), (1.0, 1, 1e-9, 0.0)),
        *((0.0, 0, 0.5, 1.0), (8.0, 1100, 0.999, 0.0), (1e-30, 0, 0.5, 1.0)),
    ]
    for i in range(HOSTILE):
        logits = _hostile(1500)
        temperature, top_k, top_p, min_p = zip(*(parameters[i:] + parameters[:i]), strict=True)
        args = (
            *(jnp.asarray(logits), jnp.asarray(temperature, jnp.float32), jnp.asarray(top_k, jnp.int32)),
            *(jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32)),
            *(jax.random.bits(jax.random.key(i), (8, 2), jnp.uint32), jnp.arange(8, dtype=jnp.int32) + i),
        )
        _equal(Spec(8, 1500), args, 512)


if __name__ == "__main__":
    main()
