"""The Triton kernels of sample_logits by Triton's interpreter on the CPU, bit for bit against the reference.

Of the kernels only the four helpers in PTX (bins in shared memory) are replaced, by numpy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import triton_interpreter

HOSTILE = 8


@pytest.mark.needs_triton
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    assert triton_interpreter.run_script(__file__).count("equal") == 4 + HOSTILE


def _install() -> None:
    """The interpreter, with bins of numpy's."""
    triton_interpreter.install()
    import triton.language as tl
    from triton.runtime import interpreter

    from pallas_kernels.sample_logits import bins_triton

    def add(table: np.ndarray, plane: Any, digit: Any, amount: Any, live: Any) -> None:
        chosen = np.broadcast_to(live.handle.data, digit.handle.data.shape)
        np.add.at(table[int(plane)], digit.handle.data[chosen], amount.handle.data[chosen].astype(np.uint32))

    def read(table: np.ndarray, plane: Any) -> Any:
        return tl.tensor(
            interpreter.TensorHandle(table[int(plane)].copy(), tl.uint32), tl.block_type(tl.uint32, [2048])
        )

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
