"""The choice of a backend: order, refusals, forcing, the device it is made for."""

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.operations import discover
from pallas_kernels import arch, lowering
from pallas_kernels.registry import Backend, BackendRefused, Choice, Module, Refusal, call, recorded, resolve

H200 = arch.by_name("H200-141")
A100 = arch.by_name("A100-80")


@dataclasses.dataclass(frozen=True)
class Spec:
    rows: int
    k: int = 256


def hopper(spec: Spec, target: arch.Arch | None) -> Refusal | None:
    if target is None or target.sm != 90:
        return Refusal(f"needs SM90, got {target.sm if target else None}")
    return Refusal(f"{spec.rows=} is more than 64") if spec.rows > 64 else None


def portable(spec: Spec, target: arch.Arch | None) -> Refusal | None:
    return None if target else Refusal("needs an NVIDIA GPU")


def never(*_: object) -> None:
    raise AssertionError("a backend was loaded that was not chosen")


BACKENDS = (
    Backend("mosaic_sm90", hopper, lambda: lambda spec, x: x * spec.rows),
    Backend("triton", portable, lambda: lambda spec, x: x - spec.rows),
    Backend("reference", lambda *_: None, lambda: lambda spec, x: x + spec.rows),
)


@pytest.mark.parametrize(
    ("target", "rows", "name"),
    [(H200, 1, "mosaic_sm90"), (H200, 65, "triton"), (A100, 1, "triton"), (None, 1, "reference")],
)
def test_first_that_does_not_refuse(target: arch.Arch | None, rows: int, name: str) -> None:
    choice = resolve("op", BACKENDS, Spec(rows), target)
    assert (choice.operation, choice.backend) == ("op", name)


def test_reason_has_the_refusals_before_it() -> None:
    choice = resolve("op", BACKENDS, Spec(1), None)
    assert choice.reason == "mosaic_sm90 refused: needs SM90, got None; triton refused: needs an NVIDIA GPU"
    assert resolve("op", BACKENDS, Spec(1), H200).reason == "first choice on H200-141"
    assert hash(choice) == hash(Choice("op", "reference", choice.reason))


def test_forced_refusal_raises_with_its_text() -> None:
    with pytest.raises(
        BackendRefused, match=r"op: backend 'mosaic_sm90' refuses .*on H200-141: spec.rows=65 is more than 64"
    ):
        resolve("op", BACKENDS, Spec(65), H200, forced="mosaic_sm90")
    with pytest.raises(BackendRefused, match="no NVIDIA GPU: needs SM90"):
        call("op", BACKENDS, Spec(1), (jnp.ones(2),), forced="mosaic_sm90")


def test_forced_is_taken_over_a_faster_one() -> None:
    assert resolve("op", BACKENDS, Spec(1), H200, forced="triton") == Choice("op", "triton", "forced")


def test_on_request_only_serves_when_forced() -> None:
    fast = dataclasses.replace(BACKENDS[0], on_request="never run on a GPU")
    backends = (fast, *BACKENDS[1:])
    choice = resolve("op", backends, Spec(1), H200)
    assert (choice.backend, choice.reason) == ("triton", "mosaic_sm90 on request only: never run on a GPU")
    assert resolve("op", backends, Spec(1), H200, forced="mosaic_sm90").backend == "mosaic_sm90"
    with pytest.raises(BackendRefused, match="65 is more than 64"):
        resolve("op", backends, Spec(65), H200, forced="mosaic_sm90")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda': there are mosaic_sm90, triton, reference"):
        resolve("op", BACKENDS, Spec(1), H200, forced="cuda")


def test_nobody_serves() -> None:
    with pytest.raises(BackendRefused, match=r"no backend serves .* mosaic_sm90 refused: .*; triton refused"):
        resolve("op", BACKENDS[:2], Spec(1), None)


def test_call_runs_the_choice_and_loads_no_other() -> None:
    backends = (dataclasses.replace(BACKENDS[0], load=never), BACKENDS[2])
    got = jax.jit(lambda x: call("op", backends, Spec(3), (x,)))(jnp.ones(2))
    np.testing.assert_array_equal(got, [4.0, 4.0])


def test_error_of_a_backend_reaches_the_caller() -> None:
    def broken() -> None:
        raise RuntimeError("kernel is broken")

    backends = (Backend("broken", lambda *_: None, lambda: lambda *_: broken()), BACKENDS[2])
    with pytest.raises(RuntimeError, match="kernel is broken"):
        call("op", backends, Spec(1), (jnp.ones(2),))


def test_default_arch_of_this_run_and_of_a_target() -> None:
    assert lowering.default_arch() is None
    with lowering.target(H200):
        assert lowering.default_arch() is H200
        with lowering.target(A100):
            assert resolve("op", BACKENDS, Spec(1)).backend == "triton"
        assert resolve("op", BACKENDS, Spec(1)).backend == "mosaic_sm90"
        with lowering.target(None):
            assert resolve("op", BACKENDS, Spec(1)).backend == "reference"
    assert lowering.default_arch() is None


def test_choices_are_recorded_while_tracing() -> None:
    @jax.jit
    def twice(x: jax.Array) -> jax.Array:
        return call("second", BACKENDS, Spec(3), (call("first", BACKENDS, Spec(2), (x,)),))

    with recorded() as choices, lowering.target(H200):
        twice(jnp.ones(2))
    call("outside", BACKENDS, Spec(2), (jnp.ones(2),))
    assert [(c.operation, c.backend) for c in choices] == [("first", "mosaic_sm90"), ("second", "mosaic_sm90")]


def test_lowering_for_cuda_takes_the_gpus_backend() -> None:
    x = jnp.ones(2)

    def function(x: jax.Array) -> jax.Array:
        return call("op", BACKENDS, Spec(3), (x,))

    np.testing.assert_array_equal(jax.jit(function)(x), [4.0, 4.0])
    assert "stablehlo.multiply" in lowering.lower_for_cuda(function, x, arch=H200)
    assert "stablehlo.subtract" in lowering.lower_for_cuda(function, x, arch=A100)


class FakeGpu:
    def __init__(self, kind: str, platform: str = "gpu") -> None:
        self.platform, self.device_kind = platform, kind
        self.compute_capability, self.core_count = "8.6", 84


def test_arch_of_devices() -> None:
    assert lowering.device_arch(FakeGpu("NVIDIA H200")) is H200
    assert lowering.device_arch(FakeGpu("cpu", "cpu")) is None
    assert lowering.device_arch(FakeGpu("AMD Instinct MI300X")) is None
    unknown = lowering.device_arch(FakeGpu("NVIDIA RTX A6000"))
    assert unknown is not None
    assert (unknown.sm, unknown.num_sms, unknown.copy_bandwidth) == (86, 84, None)
    assert np.isnan(unknown.bandwidth)


def test_default_arch_starts_no_backend_where_jax_is_held_to_the_cpu() -> None:
    code = (
        "import jax; from pallas_kernels import lowering; from jax._src import xla_bridge as b\n"
        "assert lowering.default_arch() is None; assert not b.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kernel_file_is_there() -> None:
    """``Module`` names files that nothing imports before a kernel is chosen, which without a GPU is never."""
    loads = [backend.load for operation in discover().values() for backend in operation.backends]
    names = [load.name for load in loads if isinstance(load, Module)]
    assert len(names) > 12
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        tree = ast.parse(Path(spec.origin).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body), name
