"""Stores to another block's shared memory in Pallas' GPU interpreter, which has none (JAX 0.11.2)."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import HostAllocationKey
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu

_FIELDS = list(HostAllocationKey.__dataclass_fields__)


def _aside(key: Any, transforms: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """key of the block that a ``cluster_ref`` among the transforms names, and the other transforms."""
    for t in transforms:
        if isinstance(t, core.ClusterRefTransform):
            assert key.ndim == 1, key
            key = _once_allocated(key.at[_FIELDS.index("block_id")].set(t.idxs[0]))
    return key, tuple(t for t in transforms if not isinstance(t, core.ClusterRefTransform))


def _once_allocated(key: Any) -> Any:
    """key, given back when its buffer exists: the blocks of a GPU's cluster start together, the interpreter's do not.

    A loop of short callbacks, because the interpreter has few threads to wait in.
    """

    def there(key: Any) -> Any:
        time.sleep(1e-3)
        return np.bool_(HostAllocationKey.from_array(key) in gpu_callbacks._get_shared_memory().mem)

    def poll(_: Any) -> Any:
        return io_callback(there, jax.ShapeDtypeStruct((), jnp.bool), key)

    done = jax.lax.while_loop(jnp.logical_not, poll, jnp.zeros((), jnp.bool))
    return jax.lax.optimization_barrier((key, done))[0]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels traced from here on store by a write and an arrival, both to the other block, with their races recorded."""
    resolve, barrier_key = jaxpr_interpret.resolve_ref, jaxpr_interpret._get_barrier_allocation_key_from_inval

    def resolve_ref(aval: Any, key: Any, transforms: Any) -> Any:
        return resolve(aval, *_aside(key, transforms))

    def key_of(keys: Any, tree: Any, leaves: Any) -> Any:
        keys, rest = _aside(keys, () if tree is None else jax.tree.unflatten(tree, leaves))
        leaves, tree = jax.tree.flatten(rest)
        return barrier_key(keys, tree, leaves)

    def store(src: Any, ref: Any, barrier: Any, *, cluster_idx: Any, cluster_dim: str, optimized: bool = True) -> None:
        plgpu.cluster_ref(ref, {cluster_dim: cluster_idx})[...] = src
        other: Any = plgpu.cluster_ref(barrier, {cluster_dim: cluster_idx})
        plgpu.barrier_arrive(other)

    monkeypatch.setattr(jaxpr_interpret, "resolve_ref", resolve_ref)
    monkeypatch.setattr(jaxpr_interpret, "_get_barrier_allocation_key_from_inval", key_of)
    monkeypatch.setattr(plgpu, "async_store_smem", store)
