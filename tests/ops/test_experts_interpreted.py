"""The Triton router and experts run by Triton's interpreter on the CPU, against their references.

The interpreter must be switched on before triton is imported: the comparisons run in a process of their own, this file as a script.
It takes buffers of torch; ``_install`` gives it numpy's, and corrects what it does to bfloat16 (truncated casts, products of bits).
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
import pytest

from pallas_kernels.compare import compare

ROOT = Path(__file__).parents[2]
ROUTED = (
    (1, 24, 6, "bfloat16"),
    (5, 24, 6, "bfloat16"),
    (20, 40, 3, "float32"),
    (70, 9, 9, "bfloat16"),
    (1, 256, 8, "float32"),
)
# rows, k, experts, width, shared width, e4m3 as a type
MIXED = (
    *((1, 4, 8, 128, 256, True), (1, 4, 8, 128, 128, False), (5, 3, 8, 128, 128, True)),
    *((20, 3, 6, 128, 256, False), (70, 2, 5, 128, 128, True)),
)


@pytest.mark.needs_triton
@pytest.mark.parametrize("what", ["router", "experts"])
def test_kernels_equal_references_in_the_interpreter(what: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("equal") == (len(ROUTED) + 2 if what == "router" else 4 * len(MIXED))


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An argument of a kernel in the interpreter."""

    array: np.ndarray


def _install() -> None:
    """Makes jax_triton.triton_call run kernels in the interpreter; outputs start as NaN or -1, never as zeros."""
    import jax_triton
    import triton.language as tl
    from triton.runtime import interpreter

    names: dict[str, Any] = {name: getattr(tl, name) for name in ("bfloat16", "float32", "int32", "uint8")}
    names["float8_e4m3fn"] = tl.float8e4nv
    convert, cast = interpreter._implicit_cvt, interpreter.InterpreterBuilder.cast_impl
    handle = interpreter.TensorHandle

    def argument(arg: Any) -> Any:
        if not isinstance(arg, Buffer):
            return convert(arg)
        kind = tl.pointer_type(names[arg.array.dtype.name])
        return tl.tensor(handle(np.array([arg.array.ctypes.data], np.uint64), kind), kind)

    def wide(value: Any) -> np.ndarray:
        return (
            value.data.view(ml_dtypes.bfloat16).astype(np.float32) if value.dtype.scalar == tl.bfloat16 else value.data
        )

    def dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        return handle(np.matmul(wide(a), wide(b)) + total.data, tl.float32)

    def rounded(builder: Any, value: Any, kind: Any) -> Any:
        if value.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return handle(value.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(builder, value, kind)

    interpreter._implicit_cvt = argument
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.cast_impl = rounded
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None

    def triton_call(*args: Any, kernel: Any, out_type: Any, grid: tuple[int, ...], **options: Any) -> Any:
        for unknown in ("name", "num_warps", "num_stages", "compute_capability"):
            options.pop(unknown, None)
        results = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out_type)]
        for result in results:
            result.view(np.uint8)[...] = 0xFF
        buffers = [Buffer(np.ascontiguousarray(a)) for a in (*args, *results)]
        kernel[tuple(grid)](*buffers, **options)
        return jax.tree.unflatten(jax.tree.structure(out_type), [jnp.asarray(result) for result in results])

    jax_triton.triton_call = triton_call


def _equal(got: Any, want: Any, tolerance: float, text: str) -> None:
    difference = compare(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert difference.rel_l2 <= tolerance, f"{text}: {difference}"
    print("equal", text, difference)


def _check_router() -> None:
    from pallas_kernels.router import reference, triton
    from pallas_kernels.router.spec import Spec, inputs

    for rows, experts, k, dtype in ROUTED:
        spec = Spec(rows, 384, experts, k, 2, dtype, dtype, 2.5)
        x, gate, bias, _, _ = inputs(spec, jax.random.key(rows))
        args = (x, gate, bias, jnp.asarray(1, jnp.int32))
        (ids, weights), (wanted, expected) = triton.run(spec, *args), reference.run(spec, *args)
        np.testing.assert_array_equal(np.asarray(ids), np.asarray(wanted))
        _equal(weights, expected, 1e-6, str(spec))
    # Ties go to the lower id, a row of NaN still names experts that exist, and the other rows do not see it.
    spec = Spec(4, 128, 24, 6, 1, "float32", "float32", 2.5)
    x, bias = np.zeros((4, 128), np.float32), np.zeros((1, 24), np.float32)
    x[1, 5], bias[0, [22, 5, 11]], bias[0, :3] = np.nan, 1.0, -1.0
    gate = jnp.ones((1, 24, 128))
    ids, weights = triton.run(spec, jnp.asarray(x), gate, jnp.asarray(bias), jnp.asarray(0, jnp.int32))
    others = [0, 2, 3]
    _equal(np.asarray(ids)[others], [[5, 11, 22, 3, 4, 6]] * 3, 0.0, "ties")
    _equal(np.asarray(weights)[others], np.full((3, 6), 2.5 / 6), 1e-6, "weights of ties")
    assert len(set(np.asarray(ids)[1].tolist()) & set(range(24))) == 6


def _check_experts() -> None:
    from pallas_kernels.experts import reference, triton
    from pallas_kernels.experts.plan import plan_for
    from pallas_kernels.experts.spec import Spec, inputs

    for rows, k, experts, width, shared, native in MIXED:
        spec = Spec(rows, k, experts, 256, width, shared, 2)
        x, ids, weights, *stacks, _, _ = inputs(spec, jax.random.key(rows))
        plan = dataclasses.replace(plan_for(spec, None), native=native)
        random = np.random.default_rng(rows).integers(-3, experts + 2, ids.shape).astype(np.int32)
        for name, chosen in (
            *(("plain", np.asarray(ids)), ("random, repeated in a row, holes", random)),
            *(("one expert", np.full_like(random, experts - 1)), ("none", np.full_like(random, -1))),
        ):
            placed = (chosen >= 0) & (chosen < experts)
            given = np.where(placed, np.asarray(weights), np.nan).astype(np.float32)
            given[0, 0] = 0.0 if placed[0, 0] else np.nan
            args = (jnp.asarray(chosen), *(jnp.asarray(w) for w in (given, np.nan_to_num(given))))
            layer = jnp.asarray(1, jnp.int32)
            got = triton.run(spec, x, args[0], args[1], *stacks, layer, plan=plan)
            want = reference.run(spec, x, args[0], args[2], *stacks, layer)
            _equal(got, want, 3e-3, f"{name} {spec}")


if __name__ == "__main__":
    _install()
    {"router": _check_router, "experts": _check_experts}[sys.argv[1]]()
