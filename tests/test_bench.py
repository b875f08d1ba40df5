"""Finding, checking and timing operations on the CPU, with an operation made for it: no figure here means anything."""

import argparse
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import check, operations, timing
from bench.operations import Operation, select
from tests.toy_operation import H200, Spec, advance, backend, inputs, nan, operation, product

# --- operations


def test_layers_pass_three_times_the_l2_where_they_fit() -> None:
    made = operation(CASES={"small": Spec(), "real": Spec(n=2048), "huge": Spec(n=65536)}, advance=advance)
    real = made.sized("real", 8, H200)
    assert (real.rows, real.n, real.layers) == (8, 2048, 13)
    assert (real.layers - 1) * Spec(n=2048).bytes() >= max(3 * H200.l2_bytes, 200e6)
    assert made.cold(real, H200)
    small = made.sized("small", 1, H200)
    assert small.layers == 256 and not made.cold(small, H200)
    assert made.sized("huge", 1, H200).layers == 2
    assert made.sized("real").layers == 1
    assert made.size(Spec(n=8, layers=3)) == 4 * (8 + 3 * 64 + 1)
    assert not operation().cold(real, H200)


def test_selection() -> None:
    found = {"toy": operation(backend("triton", product))}
    assert select("toy", found).cases == ("square", "large")
    chosen = select("toy:large@triton", found)
    assert (chosen.cases, chosen.backend) == (("large",), "triton")
    for text, message in (
        ("toy:round", "no case 'round': there are square, large"),
        ("toy@cuda", "no backend 'cuda': there are triton, reference"),
        ("nothing", "there is no such operation"),
    ):
        with pytest.raises(ValueError, match=message):
            select(text, found)


def test_every_discovered_operation_keeps_the_contract() -> None:
    for name, found in operations.discover().items():
        assert found.backends[-1].name == "reference", name
        assert found.cases, name
        for case, spec in found.cases.items():
            hash(spec)
            assert found.sized(case, 8, H200).rows == 8
            assert spec.rows == 1 or hasattr(found.spec, "ROWS"), (name, case)
            assert spec.bytes() > 0 and spec.flops() >= 0, (name, case)
            assert "reference" in found.serving(spec, None), (name, case)
        assert set(getattr(found.spec, "RIVALS", {})) <= set(found.cases), name


# --- timing


def test_chain_runs_every_call_though_their_arguments_are_equal() -> None:
    made, length = operation(), 7
    args = made.inputs(Spec(rows=2), jax.random.key(0))
    step, carry, fixed = timing.chain_step(made, Spec(rows=2), "reference", args, length)
    compiled = step.lower(*carry, fixed).compile().as_text()
    assert sum(" dot(" in line or "__onednn$matmul" in line for line in compiled.splitlines()) == length


def test_chain_of_an_operation_in_place_goes_on_from_call_to_call() -> None:
    def add(spec: Spec, total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return total + x, x.sum()

    made = Operation(
        "add",
        types.SimpleNamespace(
            CASES={"one": Spec()}, STATE=(0,), advance=lambda spec, args, out, i: (out[0], args[1]), inputs=inputs
        ),
        (backend("reference", add),),
    )
    args = (jnp.zeros((3, 5)), jnp.ones((3, 5)))
    repeat = timing.chain(made, Spec(), "reference", args, 4)
    repeat.run(3)
    np.testing.assert_array_equal(repeat._state[0][0], np.full((3, 5), 12.0))
    np.testing.assert_array_equal(args[0], np.zeros((3, 5)))  # the caller's buffer is not the one that is donated


def test_chain_walks_through_the_layers() -> None:
    seen = []

    def spy(spec: Spec, args: Any, out: Any, i: int) -> Any:
        seen.append(i % spec.layers)
        return advance(spec, args, out, i)

    made = operation(advance=spy)
    spec = Spec(layers=3)
    timing.chain(made, spec, "reference", made.inputs(spec, jax.random.key(0)), 6).run(1)
    assert seen == [1, 2, 0, 1, 2, 0]


class Clock:
    """Stands for a Repeat: its rounds take given microseconds, and it notes who ran when."""

    calls_per_step, in_flight = 10, 2

    def __init__(self, name: str, times: list[float], order: list[str]) -> None:
        self.name, self.times, self.order = name, iter(times), order

    def warm_up(self, round_seconds: float) -> None:
        self.order.append(f"warm {self.name}")

    def round(self) -> float:
        self.order.append(self.name)
        return next(self.times)


def test_rounds_are_interleaved_and_the_median_is_taken() -> None:
    order: list[str] = []
    a, b = timing.measure([Clock("a", [3, 1, 2], order), Clock("b", [10, 30, 20], order)], rounds=3)  # type: ignore[list-item]
    assert order == ["warm a", "warm b", "a", "b", "a", "b", "a", "b"]
    assert (a.microseconds, a.spread, a.calls) == (2, 1.0, 60)
    assert (b.microseconds, b.rounds) == (20, (10, 30, 20))


def test_repeat_divides_by_calls() -> None:
    waits = iter([0.5, 1.0])
    repeat = timing.Repeat(lambda x: x + 1, jnp.zeros(()), calls_per_step=10)
    repeat.in_flight = 5
    repeat.run = lambda steps: next(waits) * steps  # type: ignore[method-assign]
    assert repeat.round() == pytest.approx(0.5 / 10 * 1e6)
    assert repeat.round() == pytest.approx(1.0 / 10 * 1e6)


def test_copies_copy() -> None:
    repeat = timing.copies(1 << 12)
    repeat.run(2)
    np.testing.assert_array_equal(repeat._state, np.ones(1 << 10, np.int32))


# --- check


def wrong_layer(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    return product(spec, x, w, jnp.zeros_like(layer))


def slightly_off(spec: Spec, x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    return product(spec, x, w, layer) * 1.001


@pytest.mark.parametrize(
    ("function", "tolerance", "ok"),
    [
        (product, 0.0, True),
        (slightly_off, 2e-3, True),
        (slightly_off, 5e-4, False),
        (nan, 1e9, False),
        (wrong_layer, 0.1, False),
    ],
)
def test_check_sees_what_is_wrong(function: Any, tolerance: float, ok: bool) -> None:
    made = operation(backend("triton", function), advance=advance, TOLERANCE={"triton": tolerance})
    spec = Spec(rows=2, layers=3)
    result = check.check(made, spec, "triton", made.inputs(spec, jax.random.key(1)))
    assert result.ok is ok, result
    assert ("ok" if ok else "WRONG") in str(result)


def test_another_output_structure_is_wrong() -> None:
    made = operation(backend("triton", lambda *args: (product(*args),)))
    with pytest.raises(check.WrongResult, match="another structure"):
        check.check(made, Spec(), "triton", made.inputs(Spec(), jax.random.key(0)))


def test_repeats_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made, counter = operation(), itertools.count()
    assert check.same_bits(made, Spec(), "reference", made.inputs(Spec(), jax.random.key(0)))
    monkeypatch.setattr(Operation, "function", lambda *_: lambda *_: jnp.float32(next(counter) // 3))
    assert not check.same_bits(made, Spec(), "reference", made.inputs(Spec(), jax.random.key(0)))


def test_parts_of_the_sparse_layer_are_named_on_the_command_line() -> None:
    from bench import moe_layer

    assert tuple(moe_layer._parts(",".join(moe_layer.PARTS))) == moe_layer.PARTS
    with pytest.raises(argparse.ArgumentTypeError, match=r"'unrolled'.* are no parts: there are layer, "):
        moe_layer._parts("layer,unrolled")
