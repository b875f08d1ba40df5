"""A context in parts: the reference's merge, and the kernel that merges inside W_UV's launch, in numpy with a thread a block."""

from __future__ import annotations

import dataclasses
import re
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arch, lowering, mla_out, registry, sparse_mla
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.mla_out.spec import CASES, inputs
from pallas_kernels.sparse_mla import spec as attention
from tests.ops import numpy_gluon
from tests.ops.numpy_gluon import BF16, Block, Number, Pointer, Programs, Shared, raw

H200 = arch.by_name("H200-141")
PARTS = {1: 6, 3: 5, 8: 32, 9: 2}


def parts_of(rows: int, count: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts with natural log-sums: an empty part in row 0; of several rows the last has nothing at all."""
    rng = np.random.default_rng(rows)
    parts = rng.standard_normal((rows, count, heads, 512)).astype(np.float32)
    lse = (3 * rng.standard_normal((rows, count, heads))).astype(np.float32)
    empty = [(0, 1)] + ([(rows - 1, slice(None))] if rows > 1 else [])
    for at in empty:
        parts[at], lse[at] = 0.0, -np.inf
    return parts, lse


def merged(parts: np.ndarray, lse: np.ndarray) -> np.ndarray:
    weight = np.exp(lse.astype(np.float64))[..., None]
    total = weight.sum(1)
    return (parts * weight).sum(1) / np.where(total > 0, total, 1)


def values(parts: np.ndarray, lse: np.ndarray, w_uv: np.ndarray) -> np.ndarray:
    context = merged(parts, lse).astype(BF16).astype(np.float64)
    return np.einsum("rhc,hvc->rhv", context, w_uv.astype(np.float64)).reshape(len(parts), -1)


@pytest.mark.parametrize("rows", PARTS)
def test_the_reference_merges_before_it_rounds(rows: int) -> None:
    parts, lse = parts_of(rows, PARTS[rows], 2)
    _, w_uv, o_proj, layer, *_ = inputs(CASES["h8_w8a16_parts"], jax.random.key(rows))
    w_uv, o_proj = w_uv[:, :2], jnp.eye(512, dtype=jnp.bfloat16)[None]
    got = mla_out.output(jnp.asarray(parts), w_uv, o_proj, layer, lse=jnp.asarray(lse))
    assert got.dtype == jnp.bfloat16 and got.shape == (rows, 512)
    want = values(parts, lse, np.asarray(w_uv[0]))
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 4e-3 * np.linalg.norm(want)
    assert rows == 1 or not np.asarray(got)[-1].any()
    one = jnp.asarray(merged(parts, lse).astype(BF16))
    alone = mla_out.output(one, w_uv, o_proj, layer)
    np.testing.assert_array_equal(alone, mla_out.output(one[:, None], w_uv, o_proj, layer, lse=jnp.asarray(lse[:, :1])))


def test_parts_of_another_shape_are_refused() -> None:
    context, w_uv, o_proj, layer, lse = inputs(CASES["h8_w8a16_parts"], jax.random.key(0))
    with pytest.raises(ValueError, match="lse"):
        mla_out.output(context, w_uv, o_proj, layer, lse=lse[:, :3])


def test_attention_in_parts_is_one_part_of_the_reference() -> None:
    spec = attention.Spec(3, 2, 20, 16, 8, 1, 4, "float32", "float32", 0.3)
    args = attention.inputs(spec, jax.random.key(0))
    whole = sparse_mla.attend(*args, kv_lora_rank=16, scale=0.3)
    apart = sparse_mla.attend(*args, kv_lora_rank=16, scale=0.3, apart=True)
    for a, b in zip(whole, apart, strict=True):
        np.testing.assert_array_equal(a, b[:, 0])
        assert b.shape[1] == 1


class Cluster:
    """Eight threads as blocks: their shared memory, and one barrier for both waits."""

    def __init__(self, size: int) -> None:
        self.memory = np.full((8, size // 2), np.nan, BF16)
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(8)
        self.received = np.zeros(8, int)


def _asm(now: list[Cluster], program: Programs) -> Callable[..., Block]:
    def run(text: str, constraints: str, args: list[Block], dtype: Any, is_pure: bool, pack: int) -> Block:
        cluster = now[0]
        if text.startswith("ld.shared"):
            return Block(cluster.memory[program[0], raw(args[0]) // 2])
        assert "st.async" in text, text
        x, at, barrier = (raw(arg) for arg in args)
        found = re.search(r"shr.u32 t, t, (\d);\n shl.b32 t, t, (\d);\n add.u32 t, t, (\d);", text)
        assert found
        lanes, blocks, first = (int(x) for x in found.groups())
        assert (32 >> lanes) << blocks == 8  # groups of lanes times blocks that each sends to
        for block in range(first, 8, 1 << blocks):
            cluster.memory[block, at // 2] = x
            with cluster.lock:
                cluster.received[block] += 2 * x.size
        assert (barrier == 2 * cluster.memory.shape[1]).all()
        return Block(np.zeros(1, np.uint32))

    return run


def kernel(now: list[Cluster], program: Programs, patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The kernel over numpy; the cluster's functions are threads' barriers."""
    gl = numpy_gluon.language([0])
    gl.__dict__.update(
        static_range=range, uint32=np.uint32, int8=np.int8, inline_asm_elementwise=_asm(now, program),
        expand_dims=lambda x, axis: Block(np.expand_dims(x.a, axis)), minimum=lambda a, b: Block(np.minimum(raw(a), raw(b))),
        program_id=lambda axis: Block(np.asarray(program[axis], np.int32)),
    )  # fmt: skip
    copy: Callable[..., None] = lambda target, pointer, mask=True: numpy_gluon.copy(target, pointer, mask)  # noqa: E731
    wait = lambda *a: now[0].barrier.wait()  # noqa: E731
    patch.setattr(Shared, "reshape", lambda self, shape: Shared(self.a.reshape(shape)), raising=False)
    patch.setattr(Block, "type", types.SimpleNamespace(layout=None), raising=False)
    return numpy_gluon.load(patch, ("mla_out.gluon_parts",), gl, wait, copy).up_project_parts_kernel


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("each", [4, 8])
@pytest.mark.parametrize("rows", PARTS)
def test_the_kernel_that_merges(rows: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count, heads = PARTS[rows], 2
    parts, lse = parts_of(rows, count, heads)
    w_uv = (0.04 * np.random.default_rng(0).standard_normal((2, heads, 256, 512))).astype(BF16)
    out = np.full((rows, heads * 256), np.nan, BF16)
    now, program, failures = [Cluster(0)], Programs(), list[BaseException]()
    run = kernel(now, program, monkeypatch)
    parts_lse_w = [Pointer(x.reshape(-1)) for x in (parts, lse, w_uv)]
    layer = Pointer(np.ones(1, np.int32)) if rows < 8 else Number(layer_argument(1))
    memory = [*parts_lse_w, layer, Pointer(out.reshape(-1))]
    slots = max(16 // each, 1 << (count - 1).bit_length())

    def one(index: tuple[int, ...]) -> None:
        program.index = index
        try:
            with np.errstate(all="ignore"):
                run(*memory, ROWS=rows, HEADS=heads, PARTS=count, S=slots, EACH=each)
        except BaseException as error:
            failures.append(error)
            now[0].barrier.abort()

    for head in range(heads):
        for group in range(-(-rows // each)):
            now[0] = Cluster(each * 1040)
            threads = [threading.Thread(target=one, args=((i, head, group),)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures, failures[0]
            assert (now[0].received == each * 1024).all()
    want = values(parts, lse, w_uv[1])
    assert np.linalg.norm(out.astype(np.float64) - want) < 3e-3 * np.linalg.norm(want)
    assert rows == 1 or not out[-1].any()


@pytest.mark.needs_triton
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("heads", [8, 16])
def test_parts_compile_into_one_launch_with_w_uv(heads: int, rows: int) -> None:
    shape = jax.ShapeDtypeStruct
    bf16 = jnp.bfloat16

    def call(q: jax.Array, cache: jax.Array, slots: jax.Array, w_uv: jax.Array, o_proj: jax.Array) -> jax.Array:
        context, lse = sparse_mla.attend(q, cache, 0, slots, kv_lora_rank=512, scale=0.1, apart=True)
        return mla_out.output(context, w_uv, o_proj, 0, lse=lse)

    text = lowering.lower_for_cuda(
        call,
        *(shape((rows, heads, 576), bf16), shape((1, 64, 64, 656), jnp.uint8), shape((rows, 2048), jnp.int32)),
        *(shape((1, heads, 256, 512), bf16), shape((1, 6144, heads * 256), bf16)),
        arch=H200,
    )
    # The splits, and W_UV with their merge; o_proj in bfloat16 is XLA's.
    assert text.count("triton_kernel_call") == 2


def test_who_merges() -> None:
    def served(rows: int, gpu: str, case: str = "h8_w8a16_parts") -> str:
        spec = dataclasses.replace(CASES[case], rows=rows)
        return registry.resolve("mla_out", mla_out.BACKENDS, spec, arch.by_name(gpu)).backend

    found = {rows: served(rows, "H200-141") for rows in (1, 2, 8, 9)}
    assert found == {1: "triton", 2: "gluon", 8: "gluon", 9: "triton"}
    assert served(1, "A100-80") == "triton" and served(1, "H200-141", "h8_w8a16") == "triton"


@pytest.mark.needs_triton
def test_what_a_kernel_of_a_cluster_asks_for_is_in_its_ptx() -> None:
    from pallas_kernels.jax_gluon import BEHIND, clustered

    ptx = f".entry k()\n.reqntid 128\n{{\n// blocks of a cluster: 8\n// bytes behind: 100\nadd.u32 %r1, %r1, {BEHIND};\n}}"
    text, shared = clustered(ptx, 1001)
    assert (
        ".reqntid 128\n.explicitcluster\n.reqnctapercluster 8, 1, 1\n{" in text
        and "%r1, 1008;" in text
        and shared == 1108
    )
    assert clustered(".reqntid 128\n{}", 5) == (".reqntid 128\n{}", 5)
    with pytest.raises(ValueError, match="threads"):
        clustered("// blocks of a cluster: 8", 0)
