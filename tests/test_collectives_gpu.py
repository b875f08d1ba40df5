"""Peer-pointer collectives on 2, 4 and 8 real GPUs, as far as there are. Run with -m "gpu and multigpu"."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bench import collectives as bench
from pallas_kernels import collectives
from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import ADD_NORM, ALL_REDUCE, Message

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

COUNTS = (2, 4, 8)
SPLIT, WHOLE = PartitionSpec(bench.AXIS), PartitionSpec()


def mesh_of(devices: int) -> Any:
    if jax.device_count() < devices:
        pytest.skip(f"{devices} GPUs are needed, JAX sees {jax.device_count()}")
    return bench.mesh_of(devices)


def same_on_all(array: jax.Array) -> np.ndarray:
    host = np.asarray(array)
    assert all(part.tobytes() == host[0].tobytes() for part in host[1:]), "not the same bits on every device"
    return host[0].astype(np.float32)


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("form", [ALL_REDUCE, ADD_NORM])
@pytest.mark.parametrize("devices", COUNTS)
def test_equals_xla_on_every_device(devices: int, form: Any, rows: int) -> None:
    spec = Message(form, (rows, 6144), "bfloat16", devices, eps=1e-5)
    mesh = mesh_of(devices)
    x, residual, weight = bench.operands(mesh, spec)
    work, state = workspace.make(mesh)
    got = {}
    for name in ("triton", "reference"):
        y, state = bench.step(mesh, form, spec, name, 1)(jnp.copy(x), state, work, residual, weight)
        got[name] = same_on_all(y)
    assert np.asarray(state.status).tolist() == [[0]] * devices
    np.testing.assert_allclose(got["triton"], got["reference"], rtol=2**-7, atol=2**-7)
    # In the order of ranks, to the bit.
    if form == ALL_REDUCE:
        total = np.zeros(spec.shape, np.float32)
        for part in np.asarray(x).astype(np.float32):
            total = total + part
        assert np.array_equal(got["triton"], total.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("devices", COUNTS)
def test_other_forms(devices: int) -> None:
    mesh = mesh_of(devices)
    x = jnp.arange(devices * 8 * 12, dtype=jnp.float32).reshape(devices, 8, 12)
    work, state = workspace.make(mesh)
    results = []
    for name in ("triton", "reference"):

        def body(x: jax.Array, state: Any, work: Any, name: str = name) -> Any:
            with workspace.bound(work, state) as box:
                out = (
                    collectives.all_gather(x[0], bench.AXIS, 1, backend=name),
                    collectives.reduce_scatter(x[0], bench.AXIS, 0, backend=name),
                    collectives.all_to_all(x[0], bench.AXIS, 0, 1, backend=name),
                )
            return jax.tree.map(lambda a: a[None], out), box.state

        run = jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
        out, state = jax.jit(run)(x, state, work)
        results.append(jax.tree.map(np.asarray, out))
    for got, want in zip(*results, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("devices", COUNTS)
def test_thousand_replays(devices: int) -> None:
    """Op by op, recorded, replayed: ten calls a step, each on what the one before left, and the epoch counts every call."""
    mesh, steps, calls = mesh_of(devices), 1000, 10
    x, _, _ = bench.operands(mesh, Message(ALL_REDUCE, (1, 6144), "bfloat16", devices))
    work, state = workspace.make(mesh)

    def body(x: jax.Array, state: Any, work: Any) -> Any:
        with workspace.bound(work, state) as box:
            for _ in range(calls):
                # Sums of equal numbers over a power of two of devices are exact: the first sum stays what it is.
                x = collectives.all_reduce(x, bench.AXIS, backend="triton") * jnp.bfloat16(1 / devices)
        return x, box.state

    shard = jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
    run = jax.jit(shard, donate_argnums=(0, 1))
    y, state = run(jnp.copy(x), state, work)
    want = same_on_all(y)
    for i in range(steps):
        y, state = run(y, state, work)
        if i % 100 == 99:
            assert np.array_equal(same_on_all(y), want)
    assert np.asarray(state.epoch).tolist() == [[calls * (steps + 1) + 1]] * devices
    assert not np.asarray(state.status).any()


@pytest.mark.parametrize("devices", COUNTS)
def test_random_delays_on_one_rank(devices: int) -> None:
    mesh = mesh_of(devices)
    work, state = workspace.make(mesh)
    x = jax.random.normal(jax.random.key(0), (devices, 2, 6144), jnp.bfloat16)

    def body(x: jax.Array, rounds: jax.Array, state: Any, work: Any) -> Any:
        y, out = x[0], []
        with workspace.bound(work, state) as box:
            for i in range(6):
                spun = jax.lax.fori_loop(0, rounds[0, i], lambda _, a: jnp.sin(a) + 1, jnp.float32(1))
                y, _ = jax.lax.optimization_barrier((y, spun))
                y = collectives.all_reduce(y, bench.AXIS, backend="triton") * jnp.bfloat16(1 / devices)
                out.append(y)
        return jnp.stack(out)[None], box.state

    run = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False), donate_argnums=2
    )  # fmt: skip
    rng, want = np.random.default_rng(0), None
    for trial in range(20):
        rounds = np.zeros((devices, 6), np.int32)
        rounds[trial % devices] = rng.integers(0, 300, 6)
        y, state = run(x, rounds, state, work)
        same_on_all(y)
        want = np.asarray(y) if want is None else want
        assert np.array_equal(np.asarray(y), want)
    assert not np.asarray(state.status).any()


@pytest.mark.parametrize("devices", COUNTS)
def test_a_missing_peer_is_named(devices: int) -> None:
    """The last rank is one epoch ahead, so it writes where nobody waits; a spin ends after some 2 s."""
    spec = Message(ALL_REDUCE, (1, 6144), "bfloat16", devices)
    mesh = mesh_of(devices)
    x, residual, weight = bench.operands(mesh, spec)
    work, state = workspace.make(mesh)
    ahead = np.ones((devices, 1), np.uint32)
    ahead[-1] = 2
    state = dataclasses.replace(state, epoch=jax.device_put(ahead, state.epoch.sharding))
    y, state = bench.step(mesh, ALL_REDUCE, spec, "triton", 1)(x, state, work, residual, weight)
    assert np.isnan(np.asarray(y).astype(np.float32)).all()
    status = [workspace.missing(int(s)) for s in np.asarray(state.status)[:, 0]]
    assert status[:-1] == [(devices - 1,)] * (devices - 1)
    assert status[-1] == tuple(range(devices - 1))
