"""The router without a GPU: choices, counts, refusals, and its kernels compiled for more rows."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import arch, experts, lowering, registry, router
from pallas_kernels.experts import spec as experts_spec
from pallas_kernels.router.spec import CASES, Spec, inputs, mailbox_words, slices_of

H200 = arch.by_name("H200-141")
GPUS = ["A100-80", "H200-141", "B200-180", "RTX PRO 6000"]


@pytest.mark.needs_triton
@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("gpu", GPUS)
def test_triton_compiles(gpu: str, rows: int) -> None:
    for case in ("glm", "glm_f32_gate"):
        spec = dataclasses.replace(CASES[case], rows=rows)
        args = jax.eval_shape(lambda spec=spec: inputs(spec, jax.random.key(0)))
        backend = next(b for b in router.BACKENDS if b.name == "triton")
        text = lowering.lower_for_cuda(lambda *a, s=spec, b=backend: b.load()(s, *a), *args, arch=arch.by_name(gpu))
        assert text.count("triton_kernel_call") == 2


@pytest.mark.needs_triton
@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (8, 1), (9, 3)])
@pytest.mark.parametrize("gpu", GPUS)
def test_launches_with_a_norm(gpu: str, rows: int, launches: int) -> None:
    spec = dataclasses.replace(CASES["glm_norm"], rows=rows, layers=2, unit=8, split=True)
    args = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))
    backend = next(b for b in router.BACKENDS if b.name == "triton")
    text = lowering.lower_for_cuda(lambda *a: backend.load()(spec, *a), *args, arch=arch.by_name(gpu))
    assert text.count("triton_kernel_call") == launches
    # No e4m3 on an A100.
    assert ("f8E4M3FN" in text) == (rows <= 8 and gpu != "A100-80")


def test_who_shares_a_launch() -> None:
    """Slices of the hidden size, and rows whose experts are listed in the launch."""
    spec = dataclasses.replace(CASES["glm_norm"], rows=8, unit=8)
    assert (slices_of(spec), spec.unit_here) == (8, 8)
    for hidden, slices in ((128, 1), (512, 4), (640, 5), (11 * 128, 1)):
        assert slices_of(dataclasses.replace(spec, hidden=hidden)) == slices
    for change in ({"rows": 9}, {"experts": 257}, {"gate_dtype": "float32"}):
        other = dataclasses.replace(spec, **change)  # type: ignore[arg-type]
        assert (slices_of(other), other.unit_here) == (0, 0), change
    for change in ({"rows": 1}, {"k": 9}, {"unit": 4}):
        assert dataclasses.replace(spec, **change).unit_here == 0  # type: ignore[arg-type]
    terms = dataclasses.replace(spec, split=True)
    assert terms.split_by(None) and terms.split_by(H200) and not terms.split_by(arch.by_name("A100-80"))
    for change in ({"split": False}, {"norm": ""}, {"rows": 9}, {"gate_dtype": "float32"}):
        assert not dataclasses.replace(terms, **change).split_by(H200), change  # type: ignore[arg-type]
    # 77 KB at eight rows: logits of eight slices, 1 / RMS for each of the 128 programs, choices of eight rows for eight.
    assert [mailbox_words(rows, 6144, 256) for rows in (1, 8, 9)] == [
        128 * (16 + 8) + 32,
        128 * (8 * 16 + 8) + 8 * 8 * 32,
        1,
    ]


@pytest.mark.needs_triton
def test_a_layer_that_is_known_goes_along_with_the_launch() -> None:
    """Other launches, but one kernel: also of layers 0, 1 and 16, of which Triton would make constants."""
    triton_lib = importlib.import_module("jax_triton.triton_lib")
    compiled, compile_kernel = [], triton_lib.TritonFunction._compile_kernel
    spec = dataclasses.replace(CASES["glm_norm"], rows=2, layers=32, unit=8)
    x, gate, bias, _, _, norm, delta, mailbox = jax.eval_shape(lambda: inputs(spec, jax.random.key(0)))

    def counted(self: object, *a: object, **k: object) -> object:
        compiled.append(1)
        return compile_kernel(self, *a, **k)

    def routed(layer: object) -> str:
        def call(x: object, gate: object, bias: object, norm: object, delta: object, mailbox: object) -> object:
            how = {"eps": 1e-5, "k": 8, "scale": 2.5, "unit": 8, "backend": "triton"}
            return router.add_norm_route(x, delta, norm, gate, bias, layer, mailbox, **how)  # type: ignore[arg-type]

        return lowering.lower_for_cuda(call, x, gate, bias, norm, delta, mailbox, arch=H200)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_lib.TritonFunction, "_compile_kernel", counted)
        texts = [routed(n) for n in (0, 1, 16, 31)]
        assert len(compiled) <= 1 and len(set(texts)) == 4


def changed(**changes: object) -> Spec:
    return dataclasses.replace(CASES["glm"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (changed(dtype="float16"), "float16 rows"),
        (changed(gate_dtype="float8_e4m3fn"), "float8_e4m3fn gate"),
        (changed(hidden=6100), "hidden 6100"),
        (changed(experts=2048), "2048 experts"),
        (changed(dtype="float32", norm="float32", delta=True), "rows of float32 with a norm of float32"),
    ],
)
def test_refusals_name_the_number(spec: Spec, words: str) -> None:
    choice = registry.resolve("router", router.BACKENDS, spec, H200)
    assert choice.backend == "reference" and words in choice.reason


def test_who_serves_what() -> None:
    for spec in CASES.values():
        for gpu in GPUS:
            assert registry.resolve("router", router.BACKENDS, spec, arch.by_name(gpu), "triton").backend == "triton"
        assert registry.resolve("router", router.BACKENDS, spec, None).backend == "reference"


def test_bytes_of_the_real_shape() -> None:
    assert CASES["glm"].bytes() == 256 * (6144 * 2 + 4) + 6144 * 2 + 8 * 8
    # Its norm, and three rows more: what is added, the sum and the norm.
    assert CASES["glm_norm"].bytes() == CASES["glm"].bytes() + 6144 * 2 * (1 + 3)


@pytest.mark.parametrize("k", [0, 9])
def test_k_must_be_possible(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be within 1 .. experts=8"):
        router.route(jnp.zeros((2, 16)), jnp.zeros((1, 8, 16)), jnp.zeros((1, 8)), 0, k=k, scale=1.0)


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(2, 15\)"):
        router.route(jnp.zeros((2, 15)), jnp.zeros((1, 8, 16)), jnp.zeros((1, 8)), 0, k=2, scale=1.0)


@pytest.mark.needs_triton
def test_lists_save_the_experts_a_launch() -> None:
    spec = dataclasses.replace(experts_spec.CASES["small"], rows=4)
    x, ids, weights, *stacks, layer = jax.eval_shape(lambda: experts_spec.inputs(spec, jax.random.key(0)))[:8]
    lists = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, spec.experts), (spec.pairs,)))
    for given, launches in ((None, 1), (lists, 0)):
        text = lowering.lower_for_cuda(
            lambda *a: experts.mix(*a[:-1], lists=a[-1], backend="mosaic_sm90"),
            *(x, ids, weights, *stacks, layer, given),
            arch=H200,
        )
        assert text.count("triton_kernel_call") == launches
    with lowering.target(H200):
        assert experts.list_unit() == 8
    with lowering.target(arch.by_name("A100-80")):
        assert experts.list_unit() == 0
