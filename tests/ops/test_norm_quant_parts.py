"""The launch that sums the experts' parts, adds and norms: in numpy with a thread a block, its order, lowering, choice."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, lowering, norm_quant, registry
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.norm_quant import reference
from pallas_kernels.norm_quant.spec import CASES, inputs
from tests.ops import numpy_gluon
from tests.ops.numpy_gluon import BF16, Block, Number, Pointer, Programs, Shared, raw
from tests.ops.numpy_ops import wide

H200 = arch.by_name("H200-141")
EIGHT = dataclasses.replace(CASES["add_parts_norm_6144"], rows=8, layers=2)


class Cluster:
    """Blocks as threads: what each is sent, and one barrier for both waits."""

    def __init__(self, blocks: int, groups: int) -> None:
        self.memory = np.full((blocks, groups), np.nan, np.float32)
        self.barrier = threading.Barrier(blocks)


def _asm(now: list[Cluster], program: Programs) -> Callable[..., Block]:
    def run(text: str, constraints: str, args: list[Block], dtype: Any, is_pure: bool, pack: int) -> Block:
        memory = now[0].memory
        if text.startswith("ld.shared"):
            return Block(memory[program[0], raw(args[0]) // 4])
        assert "st.async" in text and f"and.b32 t, t, {len(memory) - 1};" in text
        x, at, live, barrier = (raw(arg) for arg in args)
        at = at[live != 0] // 4
        assert (barrier == 4 * memory.shape[1]).all() and np.isnan(memory[:, at]).all()
        memory[:, at] = x.view(np.float32)[live != 0]
        return Block(np.zeros(1, np.uint32))

    return run


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's module over numpy; ``now`` and ``program`` are its cluster and its threads' places."""
    now, program = [Cluster(1, 1)], Programs()
    gl = numpy_gluon.language([0])
    allocate = gl.allocate_shared_memory

    def filled(dtype: Any, shape: list[int], layout: Any, value: Block) -> Shared:
        memory = allocate(dtype, shape, layout)
        memory.store(value)
        return memory

    gl.__dict__.update(
        uint32=np.uint32, inline_asm_elementwise=_asm(now, program), allocate_shared_memory=filled,
        expand_dims=lambda x, axis: Block(np.expand_dims(x.a, axis)), minimum=lambda a, b: Block(np.minimum(raw(a), raw(b))),
        rsqrt=lambda x: Block(1 / np.sqrt(x.a)), program_id=lambda axis: Block(np.asarray(program[axis], np.int32)),
    )  # fmt: skip
    wait = lambda *a: now[0].barrier.wait()  # noqa: E731
    loaded = numpy_gluon.load(monkeypatch, ("norm_quant.gluon_parts",), gl, wait)
    loaded.__dict__.update(now=now, program=program)
    return loaded


def launched(module: Any, arrays: list[Any], rows: int, cluster: int, sizes: dict[str, Any]) -> None:
    """A launch, a cluster after the other."""
    failures: list[BaseException] = []

    def one(index: tuple[int, int, int]) -> None:
        module.program.index = index
        try:
            with np.errstate(all="ignore"):
                module.add_parts_norm_kernel(*arrays, **sizes)
        except BaseException as error:
            failures.append(error)
            module.now[0].barrier.abort()

    for row in range(rows):
        module.now[0] = Cluster(cluster, sizes["WIDTH"] // 128)
        threads = [threading.Thread(target=one, args=((i, row, 0),)) for i in range(cluster)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert not np.isnan(module.now[0].memory).any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("rows", "width", "k", "cluster"), [(2, 6144, 8, 8), (3, 1024, 4, 8), (2, 3072, 2, 4), (1, 2048, 2, 8)]
)
def test_the_kernel_gives_the_bits_of_the_reference(module: Any, rows: int, width: int, k: int, cluster: int) -> None:
    spec = dataclasses.replace(EIGHT, rows=rows, width=width, parts=k)
    x, parts, weight, _ = inputs(spec, jax.random.key(rows))
    total, normed = (np.full((rows, width), np.nan, BF16) for _ in range(2))
    given = (parts.parts, parts.ids, parts.weights, x, weight)
    memory = [Pointer(np.array(a).reshape(-1)) for a in given]
    layer = Number(layer_argument(1)) if rows == 2 else Pointer(np.ones(1, np.int32))
    arrays = [*memory, layer, Pointer(total.reshape(-1)), Pointer(normed.reshape(-1))]
    launched(module, arrays, rows, cluster, module.sizes_of(spec, parts, cluster))
    want, want_normed = reference.fused(spec, x, parts, weight, jnp.int32(1))
    np.testing.assert_array_equal(wide(total), wide(want))
    # The sum of squares is added in another order.
    np.testing.assert_allclose(wide(normed), wide(want_normed), rtol=2**-7)
    assert (wide(normed) != wide(want_normed)).mean() < 1e-3


def _row_kernel_order(groups: np.ndarray, warps: int) -> np.float32:
    """The sum of the squares of groups in ``triton.row_kernel``: in a thread, of neighbouring groups, of warps."""
    here = groups[: 2 * warps]
    for first in range(2 * warps, len(groups), 2 * warps):
        here = here + groups[first : first + 2 * warps]
    here = here[0::2] + here[1::2]
    while len(here) > 1:
        here = here[: len(here) // 2] + here[len(here) // 2 :]
    return here[0]


@pytest.mark.parametrize(("groups", "warps"), [(64, 16), (32, 16), (128, 16), (8, 4), (16, 4), (2, 4)])
def test_all_groups_are_added_as_the_row_kernel_adds_them(module: Any, groups: int, warps: int) -> None:
    registers, lanes, others, _, shape = module._all_groups(groups, warps, 4)
    assert shape == [groups] and others == [[0], [0]]
    places = [[0]]
    for (basis,) in registers:
        places += [[at + basis] for (at,) in places]
    x = (10.0 ** np.random.default_rng(groups).uniform(-3, 3, groups)).astype(np.float32)
    lane = np.arange(32)
    first = np.zeros(32, int)
    for bit, (basis,) in enumerate(lanes):
        first ^= np.where(lane >> bit & 1, basis, 0)
    total = np.zeros(32, np.float32)
    for number, (at,) in enumerate(places):
        total = x[first ^ at] if number == 0 else total + x[first ^ at]
    for bit in reversed(range(5)):
        if lanes[bit][0]:
            total = total + total[lane ^ 1 << bit]
    assert (total == _row_kernel_order(x, min(warps, groups // 2))).all()


@pytest.mark.needs_triton
def test_it_compiles_into_one_launch() -> None:
    args = jax.eval_shape(lambda: inputs(EIGHT, jax.random.key(0)))
    call = lambda x, parts, weight, layer: norm_quant.add_norm(x, parts, weight, layer, 1e-5)  # noqa: E731
    assert lowering.lower_for_cuda(call, *args, arch=H200).count("triton_kernel_call") == 1


def test_who_sums_parts() -> None:
    def served(gpu: str = "H200-141", **changes: Any) -> str:
        spec = dataclasses.replace(EIGHT, **changes)
        return registry.resolve("norm_quant", norm_quant.BACKENDS, spec, arch.by_name(gpu)).backend

    assert served() == served(rows=2) == served(width=1024, parts=4) == "gluon"
    for other in (
        {"parts": 0},
        {"parts": 6},
        {"width": 6144 - 128},
        {"quantize": True},
        {"split": True},
        {"gpu": "A100-80"},
    ):
        assert served(**other) == "triton", other
    assert served(dtype="float32") == "reference"
