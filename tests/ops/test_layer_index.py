"""The index of a layer in a Triton launch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, experts, fp8_linear, lowering, norm_quant
from pallas_kernels.blocks import BlockScaled
from pallas_kernels.layer_index import KnownLayer, cut_index, layer_index, layer_slice, scale_slice

LAYERS, ROWS, WIDTH = 4, 3, 256


def lowered(layer: int | None) -> str:
    """add_norm for an H200; None: a traced layer."""

    def call(x: jax.Array, delta: jax.Array, weight: jax.Array, traced: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm_quant.add_norm(x, delta, weight, traced if layer is None else layer, 1e-5)

    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, WIDTH), (LAYERS, WIDTH)))
    given = (x, x, weight, jax.ShapeDtypeStruct((), jnp.int32))
    return lowering.lower_for_cuda(call, *given, arch=arch.by_name("H200-141"))


def test_an_int_stays_one_and_everything_else_is_an_int32_scalar() -> None:
    assert layer_index(3) == 3 and isinstance(layer_index(3), int)
    for given in (np.int64(3), jnp.int8(3)):
        found = layer_index(given)
        assert isinstance(found, jax.Array) and found.dtype == jnp.int32 and found.shape == () and int(found) == 3


def test_layers_are_cut_out_of_traced_stacks_only() -> None:
    """Outside of jit a slice is a copy: a layer of all experts, for instance."""
    stack = BlockScaled(jnp.zeros((3, 128, 128), jnp.float8_e4m3fn), jnp.zeros((3, 1, 1)))
    found: list[int | jax.Array] = [cut_index(layer, stack) for layer in (2, KnownLayer(2))]
    assert all(isinstance(at, jax.Array) and at.dtype == jnp.int32 and int(at) == 2 for at in found)
    jax.jit(lambda stack: found.append(cut_index(2, stack)))(stack)
    assert found[-1] == 2 and isinstance(found[-1], int)


def test_operations_outside_of_jit_cut_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int | jax.Array, ...]] = []
    monkeypatch.setattr(fp8_linear.registry, "call", lambda name, backends, spec, args, forced=None: given.append(args))
    shapes = ((2, 4, 2, 128, 128), (2, 4, 128, 128), (2, 2, 128, 128), (2, 128, 128))
    a, b, c, d = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    x, ids, weights = jnp.zeros((1, 128), jnp.bfloat16), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2))
    fp8_linear.linears(x, (d,), (1,))
    experts.mix(x, ids, weights, a, b, c, d, 1)
    jax.jit(lambda w: fp8_linear.linears(x, (w,), (1,)))(d)
    jax.jit(lambda a, b, c, d: experts.mix(x, ids, weights, a, b, c, d, 1))(a, b, c, d)
    layers = [given[0][2][0], given[1][7], given[2][2][0], given[3][7]]  # type: ignore[index]
    assert [isinstance(layer, int) for layer in layers] == [False, False, True, True]


def test_a_layer_of_a_stack_keeps_its_axes() -> None:
    stack = jnp.arange(6 * 4).reshape(6, 4)
    np.testing.assert_array_equal(layer_slice(stack, 2), [[8, 9, 10, 11]])
    np.testing.assert_array_equal(layer_slice(stack, 2, 2), stack[4:6])


@pytest.mark.parametrize(
    ("layers", "size", "least"), [(8, 240, 64), (78, 240, 0), (5, 64, 32), (4, 96, 128), (3, 1152, 64)]
)
def test_scales_of_a_layer_are_whole_256_bytes(layers: int, size: int, least: int) -> None:
    """That is what XLA makes a pointer of and Mosaic accepts; few places, so few kernels."""
    flat, places = jnp.arange(float(layers * size)), []
    for layer in range(layers):
        part, offset = scale_slice(flat, size, layer, least)
        np.testing.assert_array_equal(part[offset : offset + size], flat[layer * size : (layer + 1) * size])
        assert part.size >= least and (part.size == flat.size or (part.size % 64 == 0 and part[0] % 64 == 0))
        places.append(offset)
    assert len(set(places)) <= (1 if size % 64 == 0 else 5)


@pytest.mark.parametrize(("layers", "size", "least"), [(2, 16, 64), (1, 256, 32), (9, 15, 32)])
def test_scales_that_are_few_or_start_anywhere_stay_a_stack(layers: int, size: int, least: int) -> None:
    flat = jnp.arange(float(layers * size))
    part, offset = scale_slice(flat, size, layers - 1, least)
    assert part.size == flat.size and offset == (layers - 1) * size


@pytest.mark.needs_triton
def test_known_layers_share_a_kernel_that_reads_none() -> None:
    from pallas_kernels.layer_index import layer_argument

    assert [layer_argument(layer) for layer in range(4)] == [17, 49, 81, 113]
    assert all(layer_argument(layer) >> 5 == layer and layer_argument(layer) % 16 == 1 for layer in range(128))
    first, second, traced = lowered(0), lowered(3), lowered(None)
    assert first != second

    # A traced layer is an operand of the call, a known one is not.
    def operands(text: str) -> int:
        (call,) = re.findall(r"stablehlo\.custom_call @triton_kernel_call\w*\(([^)]*)\)", text)
        return len(call.split(","))

    assert operands(traced) == operands(first) + 1 == operands(second) + 1
