"""Several devices: the mesh, what each logical axis of the weights means on it, and the only shard_map.

Inside ``spread`` the model's functions see one device's slices and exchange through ``pallas_kernels.collectives``; outside of it
arrays are global, with the shardings stated here. Weights that no rule splits lie whole on every device: the norms, q_a, kv_a, the
router, the embedding and the indexer, whose scores are needed whole on every device.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm52_jax.cache import Cache, make_cache
from glm52_jax.config import Config
from glm52_jax.plan import Parallel, Plan
from glm52_jax.weights import Leaf, Weights, weight_leaves
from pallas_kernels import collectives
from pallas_kernels.blocks import BLOCK
from pallas_kernels.collectives import workspace

# Logical axes that are split over all devices, by mode; every other axis is whole.
RULES: dict[str, frozenset[str]] = {
    "tp": frozenset({"heads", "width", "expert_width", "vocab", "mtp_hidden"}),
    "ep": frozenset({"heads", "width", "experts", "vocab", "mtp_hidden"}),
    "ep+dp": frozenset({"width", "experts", "vocab"}),
}


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis over the first ``devices`` devices, all of them by default; ValueError where there are fewer."""
    found = jax.devices()
    if devices is not None and not 1 <= devices <= len(found):
        raise ValueError(
            f"{devices=} must be between 1 and {len(found)}, the {found[0].platform} devices that JAX sees"
        )
    if jax.process_count() > 1 and devices not in (None, len(found)):
        raise ValueError(
            f"{devices=}: {jax.process_count()} processes have {len(found)} devices together, and all must take part"
        )
    return Mesh(np.array(found[:devices]), ("devices",))


def share(mesh: Mesh | None, mode: str | None) -> Parallel | None:
    """What ``load``'s two arguments mean: a mode alone takes all devices, a mesh alone is "tp", neither is one device."""
    if mesh is None and mode is None:
        return None
    # jax.make_mesh gives axes whose shardings are part of types; here they are shard_map's business.
    mesh = make_mesh() if mesh is None else Mesh(mesh.devices, mesh.axis_names)
    return Parallel(mesh, "tp" if mode is None else mode)


def partition(axes: Iterable[str], parallel: Parallel) -> PartitionSpec:
    """Which dimension of an array with these logical axes is split over the devices."""
    rules = RULES[parallel.mode]
    return PartitionSpec(*(parallel.axis if axis in rules else None for axis in axes))


@cache
def weight_specs(config: Config, mtp: bool, plan: Plan) -> Weights | None:
    """PartitionSpecs of all weights, None for one device. An FP8 leaf has one for its values and its scales."""
    parallel = plan.parallel
    if parallel is None:
        return None
    is_leaf = {"is_leaf": lambda node: isinstance(node, Leaf)}
    return jax.tree.map(lambda leaf: partition(leaf.axes, parallel), weight_leaves(config, mtp), **is_leaf)


def check_split(leaves: dict[str, Leaf], fp8: frozenset[str], parallel: Parallel) -> None:
    """Refuses a model whose sizes do not split over the devices.

    leaves: by name; fp8: those that the checkpoint stores as FP8 blocks, whose slices must begin and end between blocks.
    Raises ValueError with the numbers of every leaf that does not fit.
    """
    problems = []
    for name, leaf in leaves.items():
        spec = partition(leaf.axes, parallel)
        for dim, (axis, size) in enumerate(zip(leaf.axes, leaf.shape, strict=True)):
            if spec[dim] is None:
                continue
            each, rest = divmod(size, parallel.devices)
            if rest:
                problems.append(f"{name}: {axis} {size} does not divide by {parallel.devices}")
            elif name in fp8 and dim >= len(leaf.shape) - 2 and leaf.kind == "linear" and each % BLOCK:
                problems.append(
                    f"{name}: {axis} {size} / {parallel.devices} = {each} is no multiple of the FP8 block, {BLOCK}"
                )
    if problems:
        raise ValueError(
            f"parallel={parallel.mode!r} over {parallel.devices} devices does not fit this model: {'; '.join(problems)}"
        )


def batch_spec(plan: Plan) -> PartitionSpec:
    """Of arrays [batch, ...]: split where devices have sequences of their own, else whole."""
    parallel = plan.parallel
    return PartitionSpec(parallel.axis) if parallel is not None and parallel.own_sequences else PartitionSpec()


def cache_spec(plan: Plan) -> PartitionSpec:
    """Of the caches [layers, pages, ...]: pages are split with the sequences that own them, else whole on every device."""
    return PartitionSpec(None, *batch_spec(plan))


def spread[**Args, Out](
    run: Callable[Args, Out], parallel: Parallel | None, in_specs: Any, out_specs: Any
) -> Callable[Args, Out]:
    """``run`` on every device with its slices of the arguments; ``run`` itself where there is one device.

    in_specs, out_specs: PartitionSpecs, a prefix of the arguments' tree and of the result's. A result that is said to be whole
    must be the same on every device: the model's are, because whatever they are computed from went through a collective.
    Inside of ``exchanging`` collectives go over peer pointers where they can.
    """
    if parallel is None:
        return run
    # Kernels called through the FFI do not say over which devices their results vary, so JAX cannot check it.
    shard = partial(jax.shard_map, mesh=parallel.mesh, check_vma=False)
    split = PartitionSpec(parallel.axis)

    def opened(work: workspace.Workspace, state: workspace.State, *args: Args.args, **more: Args.kwargs) -> Any:
        with workspace.bound(work, state) as inner:
            return run(*args, **more), inner.state

    def spreading(*args: Args.args, **more: Args.kwargs) -> Out:
        box = _PEERS.get()  # Where it is called, not where it was made.
        if box is None:
            return shard(run, in_specs=in_specs, out_specs=out_specs)(*args, **more)
        exchanged = shard(opened, in_specs=(split, split, *in_specs), out_specs=(out_specs, split))
        out, box.state = exchanged(box.workspace, box.state, *args, **more)
        return out

    return spreading


@contextlib.contextmanager
def exchanging(work: workspace.Workspace, state: workspace.State) -> Iterator[workspace.Bound]:
    """While a program is traced: every ``spread`` in it opens this workspace; ``.state`` is what the program must return.

    work: an argument that is not donated; state: one that is. ``glm52_jax.exchange`` keeps both. A jitted function in it would keep
    its trace, and in that this workspace's tracers: trace the function that it wraps.
    """
    token = _PEERS.set(box := workspace.Bound(work, state))
    try:
        yield box
    finally:
        _PEERS.reset(token)


def repeated[Carry](run: Callable[[Carry], Carry], carry: Carry, times: int, loop: bool = True) -> Carry:
    """Inside ``spread``: ``run`` applied that often, traced once in a loop of the program or once for each time."""
    if not loop:
        for _ in range(times):
            carry = run(carry)
        return carry
    if not workspace.opened():
        return jax.lax.fori_loop(0, times, lambda _, current: run(current), carry)
    box = workspace.current()

    def again(_: Any, current: tuple[Carry, workspace.State]) -> tuple[Carry, workspace.State]:
        with workspace.bound(box.workspace, current[1]) as inner:
            return run(current[0]), inner.state

    carry, box.state = jax.lax.fori_loop(0, times, again, (carry, box.state))
    return carry


_PEERS: contextvars.ContextVar[workspace.Bound | None] = contextvars.ContextVar("peers", default=None)


def own_rows(array: jax.Array, rows: int, plan: Plan) -> jax.Array:
    """Inside ``spread``: this device's ``rows`` rows of an array that every device has whole."""
    if plan.parallel is None or not plan.parallel.own_sequences:
        return array
    return jax.lax.dynamic_slice_in_dim(array, collectives.rank(plan.parallel.axis) * rows, rows)


def all_tokens(tokens: jax.Array, plan: Plan) -> jax.Array:
    """Inside ``spread``: the drawn tokens of all sequences, whole on every device."""
    if plan.parallel is None or not plan.parallel.own_sequences:
        return tokens
    return collectives.all_gather(tokens, plan.parallel.axis)


def sequences(batch: int, plan: Plan) -> int:
    """The smallest batch of at least ``batch`` sequences that splits over the devices; what is added are empty sequences."""
    parallel = plan.parallel
    return (
        -(-batch // parallel.devices) * parallel.devices if parallel is not None and parallel.own_sequences else batch
    )


def place[Tree](tree: Tree, plan: Plan, spec: PartitionSpec) -> Tree:
    """Arrays that every process has alike, as global arrays; unchanged where the plan has one device."""
    if plan.parallel is None:
        return tree
    sharding = NamedSharding(plan.parallel.mesh, spec)

    def put(array: jax.Array) -> jax.Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda where: host[where])

    return jax.tree.map(put, tree)


def new_cache(config: Config, plan: Plan, pages: int, mtp: bool = False) -> Cache:
    """``make_cache``, made where it stays; ``pages`` counts those of all devices."""
    return make_cache(config, plan, pages, mtp) if plan.parallel is None else _new_cache(config, plan, pages, mtp)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _new_cache(config: Config, plan: Plan, pages: int, mtp: bool) -> Cache:
    assert plan.parallel is not None
    sharding = NamedSharding(plan.parallel.mesh, cache_spec(plan))
    return jax.lax.with_sharding_constraint(make_cache(config, plan, pages, mtp), sharding)


def first_rows(array: jax.Array, count: int, plan: Plan) -> jax.Array:
    """array[0, :count], whole on every device and so in every process."""
    return array[0, :count] if plan.parallel is None else _first_rows(array, count, plan)


@partial(jax.jit, static_argnums=(1, 2))
def _first_rows(array: jax.Array, count: int, plan: Plan) -> jax.Array:
    assert plan.parallel is not None
    return jax.lax.with_sharding_constraint(array[0, :count], NamedSharding(plan.parallel.mesh, PartitionSpec()))
