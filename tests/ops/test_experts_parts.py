"""What ``experts.mix`` hands to the Hopper kernel of several rows and out of it: layers, quantized rows, sums left over."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, experts, lowering
from pallas_kernels.blocks import BLOCK, E4M3
from pallas_kernels.experts import mosaic_both_sm90, mosaic_sm90
from pallas_kernels.experts.spec import CASES, Spec, inputs
from pallas_kernels.parts import Parts, combined
from pallas_kernels.router.reference import split

H200 = arch.by_name("H200-141")
THREE = Spec(3, 2, 4, 512, 128, 128, 4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the kernel, which answers with numbers of their places, NaN where a choice is no expert's."""
    calls: list[dict[str, Any]] = []

    def run(plan: Any, places: Any, x: Any, stacks: Any, mailbox: Any, **more: Any) -> tuple[jax.Array, jax.Array]:
        calls.append({"layer": places[0], "stacks": stacks, **more})
        parts = jnp.sin(jnp.arange((plan.pairs + plan.rows) * plan.hidden, dtype=jnp.float32))
        return parts.reshape(-1, plan.hidden).at[1].set(jnp.nan), mailbox

    monkeypatch.setattr(mosaic_both_sm90, "run", run)
    monkeypatch.setattr(mosaic_sm90, "sorted_pairs", lambda spec, unit, ids: (jnp.zeros((2, 4), jnp.int32), ids))
    return calls


def given(spec: Spec = THREE) -> tuple[Any, ...]:
    x, ids, weights, *stacks = inputs(spec, jax.random.key(0))[:7]
    return x, ids.at[0, 1].set(-1), weights, *stacks


def run(*args: Any, spec: Spec = THREE, **options: Any) -> Any:
    with lowering.target(H200):
        return mosaic_sm90.run(spec, *args, **options)


@pytest.mark.parametrize("mailbox", [False, True])
def test_a_sum_is_left_to_who_asks_for_that(seen: list[dict[str, Any]], mailbox: bool) -> None:
    args, box = given(), jnp.zeros((4096,), jnp.int32) if mailbox else None
    whole, apart = (run(*args, 1, spec=dataclasses.replace(THREE, apart=apart), mailbox=box) for apart in (False, True))
    if mailbox:
        assert whole[1] is box and apart[1] is box
        whole, apart = whole[0], apart[0]
    assert isinstance(apart, Parts) and apart.experts == 4 and apart.shape == (3, 512)
    want = combined(apart.parts[:6], apart.parts[6:], *args[1:3], 4).astype(jnp.bfloat16)
    for got in (whole, apart.summed(jnp.bfloat16)):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert np.isfinite(np.asarray(whole, np.float32)).all()


def test_a_known_layer_is_cut_out_and_a_traced_one_is_passed_on(seen: list[dict[str, Any]]) -> None:
    args = given()
    run(*args, 2)
    run(*args, jnp.int32(2))
    known, traced = seen
    assert known["layer"] is None and int(traced["layer"][0]) == 2 and traced["skips"] == (0, 0, 0, 0)
    for at, w in enumerate(args[3:]):
        data, scales, skip = known["stacks"][2 * at], known["stacks"][2 * at + 1], known["skips"][at]
        np.testing.assert_array_equal(np.asarray(data, np.float32).ravel(), np.asarray(w.data[2], np.float32).ravel())
        layer = np.asarray(w.scale[2]).ravel()
        np.testing.assert_array_equal(np.asarray(scales)[skip : skip + layer.size], layer)
        assert traced["stacks"][2 * at].size == w.data.size


def test_quantized_rows_reach_the_kernel_where_there_are_two_terms(seen: list[dict[str, Any]]) -> None:
    quantized = (jnp.zeros((4, 16, BLOCK), E4M3), jnp.ones((4, 8), jnp.float32))
    run(*given(), 0, quantized=quantized)
    assert seen[0]["quantized"] is quantized


def test_mix_refuses_other_quantized_rows() -> None:
    x, *rest = inputs(dataclasses.replace(CASES["small"], rows=3), jax.random.key(0))[:7]
    values, scales = jnp.zeros((8, 16, BLOCK), E4M3), jnp.ones((8, 8), jnp.float32)
    call = functools.partial(experts.mix, x, *rest, layer=0)
    jax.eval_shape(lambda: call(quantized=(values, scales)))
    for wrong in ((values[:4], scales), (values, scales[:, :3]), (values.astype(jnp.bfloat16), scales)):
        with pytest.raises(ValueError, match="quantized"):
            jax.eval_shape(lambda wrong=wrong: call(quantized=wrong))
    many = inputs(dataclasses.replace(CASES["small"], rows=9), jax.random.key(0))[:7]
    with pytest.raises(ValueError, match="1 to 8 rows"):
        jax.eval_shape(lambda: experts.mix(*many, layer=0, quantized=(values, scales)))


def test_who_takes_quantized_rows() -> None:
    with lowering.target(H200):
        assert experts.takes_quantized(8, 256, 256, "w8a16") and experts.takes_quantized(2, 128, 128, "w8a16")
        for other in ((1, 256, 256, "w8a16"), (9, 256, 256, "w8a16"), (8, 512, 512, "w8a16"), (8, 256, 256, "w8a8")):
            assert not experts.takes_quantized(*other)
    with lowering.target(arch.by_name("B200-180")):
        assert not experts.takes_quantized(8, 256, 256, "w8a16")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_parts_quantized_rows_and_known_layers_change_no_bit(rows: int) -> None:
    """Every layer of a stack whose shared expert's scales start anywhere within 256 bytes, on one mailbox."""
    spec = dataclasses.replace(CASES["small"], rows=rows, layers=3)
    x, ids, weights, *stacks = inputs(spec, jax.random.key(rows))[:7]
    ids = ids.at[0, 1].set(-1)
    box = jnp.zeros((experts.mailbox_words(rows, spec.k, spec.width, spec.shared_width),), jnp.int32)
    terms = jax.jit(split)(x)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def apart(layer: int, box: jax.Array) -> tuple[Any, jax.Array]:
        given: dict[str, Any] = {"mailbox": box, "epoch": layer + 1, "quantized": terms, "apart": True}
        return experts.mix(x, ids, weights, *stacks, layer, **given)

    whole = jax.jit(lambda layer: experts.mix(x, ids, weights, *stacks, layer))
    for layer in range(3):
        parts, box = apart(layer, box)
        assert isinstance(parts, Parts)
        got, want = parts.summed(x.dtype), whole(jnp.int32(layer))
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
