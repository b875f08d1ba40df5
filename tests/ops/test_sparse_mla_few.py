"""The kernel of sparse MLA for few heads, run in numpy: its PTX, its reordered operands, its softmax; not its layouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layer_index import layer_argument
from pallas_kernels.sparse_mla import reference
from pallas_kernels.sparse_mla.spec import CASES, Spec, inputs
from tests.ops.numpy_gluon import Block, Cluster, Number, Pointer, Programs, copy, in_cluster, language, load, raw


def kernel(now: list[Cluster], program: Programs, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A copy of the kernel's module over numpy."""
    gl = language(program)
    gl.__dict__.update(
        inline_asm_elementwise=in_cluster(now, program), static_range=range, int8=np.int8, uint32=np.uint32,
        maximum=lambda a, b: Block(np.maximum(raw(a), raw(b))),
    )  # fmt: skip
    wait = lambda *a: now[0].barrier.wait()  # noqa: E731
    names = tuple(f"sparse_mla.gluon_few{last}" for last in ("_layouts", "_merge", ""))
    unused = dict.fromkeys(("LATENT_FACTOR", "LOG2E", "merge", "outputs"))
    return load(monkeypatch, names, gl, wait, copy, **{"sparse_mla.triton": unused})


def attend(
    spec: Spec, args: tuple[jax.Array, ...], keys: int, block: int, cluster: int, early: bool, patch: pytest.MonkeyPatch
) -> Any:
    """Runs every program, ``block`` heads each, ``cluster`` at a time; merges the parts in float64. Returns (context, lse).

    The layer is loaded where there is no cluster, else a number of the launch.
    """
    q, cache, layer, slots = (np.array(x) for x in args)
    where = Pointer(layer.reshape(1)) if cluster == 1 else Number(layer_argument(int(layer)))
    splits = -(-spec.k // (keys * cluster)) * cluster
    context = np.full((spec.rows, splits // cluster, spec.heads, 512), np.nan, np.float32)
    lse = np.full((spec.rows, splits // cluster, spec.heads), np.nan, np.float32)
    now, program, failures = [Cluster(1, 0)], Programs(), list[BaseException]()
    run = kernel(now, program, patch).few_kernel
    first, *others = (Pointer(x.reshape(-1)) for x in (q, cache, slots, context, lse))
    memory = [first, others[0], where, *others[1:]]

    def one(index: tuple[int, ...]) -> None:
        program.index = index
        try:
            with np.errstate(all="ignore"):
                run(
                    *memory, HEADS=spec.heads, K=spec.k, CAPACITY=spec.capacity, LSE_FACTOR=math.log(2), OUT_FACTOR=2.0**20,
                    SCALE_LOG2=spec.scale * 1.4426950408889634 * 2.0**20, SPLITS=splits, N=keys, H=block, CLUSTER=cluster,
                    EARLY=early,
                )  # fmt: skip
        except BaseException as error:
            failures.append(error)
            now[0].barrier.abort()

    for split, *rest in itertools.product(range(0, splits, cluster), range(spec.rows), range(-(-spec.heads // block))):
        now[0] = Cluster(cluster, block * 513)
        threads = [threading.Thread(target=one, args=((split + i, *rest),)) for i in range(cluster)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
    weight = np.exp(lse.astype(np.float64))[..., None]
    total = weight.sum(1)
    merged = (context * weight).sum(1) / np.where(total > 0, total, 1)
    return merged, np.log(total)[..., 0]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    ("keys", "heads", "block", "cluster", "early"),
    [
        *((32, 8, 8, 1, False), (64, 8, 8, 1, True), (64, 5, 8, 1, False), (32, 1, 8, 1, False), (128, 8, 8, 1, False)),
        *((32, 13, 8, 8, False), (64, 16, 16, 1, True), (32, 16, 16, 4, False)),
    ],
)
def test_every_tile_and_its_merge(
    keys: int, heads: int, block: int, cluster: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last tile that is not full, slots out of the cache, a row with nothing selected, scales from 1e-9 to 1e5."""
    spec = dataclasses.replace(CASES["h8_k2048_fp8"], rows=3, heads=heads, k=200, layers=2, pages=12)
    q, cache, _, slots = inputs(spec, jax.random.key(keys + heads))
    slots = slots.at[1, 7:90].set(jnp.asarray([-1, spec.capacity, 2**31 - 1] * 28)[:83]).at[2].set(-1)
    scaled = np.array(cache)
    rows = scaled.reshape(-1, 656)
    rows[:, 512:528] = (rows[:, 512:528].view(np.float32) * np.array([1e-9, 1.0, 0.3, 1e5], np.float32)).view(np.uint8)
    q = q.at[..., 384:512].multiply(1e-5)
    args = (q, jnp.asarray(scaled), jnp.asarray(1, jnp.int32), slots)
    with np.errstate(all="ignore"):
        context, lse = attend(spec, args, keys, block, cluster, early, monkeypatch)
    want, want_lse = reference.attend(q.astype(jnp.float32), *args[1:3], slots, 512, spec.scale)
    for group in range(4):
        part = slice(group * 128, group * 128 + 128)
        error = np.linalg.norm(context[..., part] - want[..., part]) / np.linalg.norm(want[..., part])
        assert error < 4e-3, (group, error)
    np.testing.assert_allclose(lse[:2], np.asarray(want_lse)[:2], atol=1e-3)
    assert np.isneginf(lse[2]).all() and not context[2].any()
