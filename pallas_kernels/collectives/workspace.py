"""What the peer-pointer kernels share: the workspace on every device, its addresses, the epoch, and which messages fit.

Imports no kernel language. The protocol is in README.md.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.arch import Arch
from pallas_kernels.collectives.message import ADD_NORM, ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, Message
from pallas_kernels.registry import Refusal

WORLDS = (2, 4, 8)
# A unit is what one thread stores at once: two 64-bit packets of 32 bits of payload and 32 bits of epoch.
UNIT_PAYLOAD, UNIT_WORDS = 8, 4
# Units of one parity behind the slots: what the blocks of one device tell each other (the norm's partial sums).
PARTIALS = 2048
# Bytes of payload that a device pushes to its peers in one shot. From about there on two shots (reduce_scatter, all_gather) save
# more than their second launch costs: 4 us, and twice the bytes at 450 GB/s. Computed, not measured.
MOST_PUSHED = 3 << 19
# Beyond this nothing here is better than XLA's collectives.
MOST_MESSAGE = 1 << 20
# All blocks must be resident at once, because they wait for each other: 4 blocks of 256 threads on the 108 SMs of an A100.
MOST_BLOCKS = 4 * 108
# Rounds of polls before a peer counts as missing. A round is a read of the L2, some 0.4-0.7 us: 2 to 3 s. Computed, not measured.
POLLS = 1 << 22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
    """Where peers write. All arrays are split over the devices in their first dimension; never donated, kept while in use.

    words: uint32 [devices, 2, units, 4], by parity of the epoch: a slot of ``capacity`` units for each rank, then PARTIALS units.
    table: uint32 [devices, devices + 1, 2]: on device d the addresses (low and high half) of the ``words`` of ranks d + 1, d + 2
      and so on around to its own, then d: the order in which it pushes, so that not all begin with the same peer.
    """

    words: jax.Array
    table: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a call changes, always donated: epoch uint32 [devices, 1], of the next call; status int32 [devices, 1].

    status: bit r is set once rank r was missed by this device, bit 30 once its own blocks were; it stays set.
    """

    epoch: jax.Array
    status: jax.Array


def limit(devices: int) -> int:
    """Bytes of the largest slot: of what one device sends another in one call."""
    return min(MOST_MESSAGE, MOST_PUSHED // (devices - 1)) // UNIT_PAYLOAD * UNIT_PAYLOAD


def make(mesh: Mesh, capacity: int | None = None, epoch: int = 1) -> tuple[Workspace, State]:
    """A zeroed workspace on every device of the mesh's one axis, and the state of its first call.

    capacity: units of a slot, for the largest message by default. epoch: of the first call, for tests near the wrap; never 0,
      which is what words that nobody wrote carry.
    Raises ValueError for a mesh of other than 2, 4 or 8 devices, of several axes or of several processes.
    """
    devices = list(mesh.devices.flat)
    if mesh.devices.ndim != 1 or len(devices) not in WORLDS:
        raise ValueError(f"a mesh of shape {mesh.devices.shape}: peer pointers are for one axis of 2, 4 or 8 devices")
    if len({device.process_index for device in devices}) > 1:
        raise ValueError("devices of several processes: a device address means nothing in another process")
    if not 0 < epoch < 1 << 32:
        raise ValueError(f"{epoch=} must be within 1 .. 2^32 - 1")
    world = len(devices)
    capacity = limit(world) // UNIT_PAYLOAD if capacity is None else capacity
    shape = (world, 2, world * capacity + PARTIALS, UNIT_WORDS)
    # Made where it stays: no other array is alive at these addresses until the caller lets go of it.
    words = jax.block_until_ready(jax.jit(lambda: jnp.zeros(shape, jnp.uint32), out_shardings=_split(mesh))())
    held = {shard.device: shard.data.unsafe_buffer_pointer() for shard in words.addressable_shards}
    rows = [[*(held[devices[(rank + 1 + r) % world]] for r in range(world)), rank] for rank in range(world)]
    table = np.array(rows, np.uint64).view(np.uint32).reshape(world, world + 1, 2)
    one = np.ones((world, 1), np.uint32)
    state = State(_put(mesh, one * np.uint32(epoch)), _put(mesh, 0 * one.astype(np.int32)))
    return Workspace(words, _put(mesh, table)), state


def _split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


def _put(mesh: Mesh, host: np.ndarray) -> jax.Array:
    return jax.device_put(host, _split(mesh))


def missing(status: int) -> tuple[int, ...]:
    """The ranks that a device missed, first one first; 30 stands for blocks of the device itself."""
    return tuple(rank for rank in range(31) if int(status) >> rank & 1)


class Bound:
    """The workspace and the state as the calls traced so far left it."""

    def __init__(self, workspace: Workspace, state: State) -> None:
        self.workspace, self.state = workspace, state


_BOUND: contextvars.ContextVar[Bound | None] = contextvars.ContextVar("collectives_workspace", default=None)


@contextlib.contextmanager
def bound(workspace: Workspace, state: State) -> Iterator[Bound]:
    """Inside ``shard_map``: collectives traced in here find this device's workspace; ``.state`` is what the body must return."""
    token = _BOUND.set(box := Bound(workspace, state))
    try:
        yield box
    finally:
        _BOUND.reset(token)


def opened() -> bool:
    """Whether a trace is inside of a ``bound``."""
    return _BOUND.get() is not None


def current() -> Bound:
    """The workspace of the innermost ``bound``; ValueError outside of one."""
    box = _BOUND.get()
    if box is None:
        raise ValueError("collectives over peer pointers need a workspace: trace the call inside workspace.bound(...)")
    return box


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a message lies on the grid: ``rows`` rows of ``words`` 32-bit payload words, ``parts`` blocks a row of ``threads``.

    source, target: words that lie together in what is sent to one device and in what came from one; 0 where all is in one run.
    """

    rows: int
    words: int
    parts: int
    threads: int
    source: int
    target: int

    @property
    def units(self) -> int:
        """Of one row; the last one may be half full."""
        return -(-self.words // 2)


def plan(spec: Message) -> Plan:
    """The grid of a message, from static sizes alone: the same on every device."""
    each = spec.nbytes() // 4
    rows = 1
    source = target = 0
    if spec.form == ADD_NORM:
        rows, each = spec.shape[0], each // spec.shape[0]
    if spec.form in (REDUCE_SCATTER, ALL_TO_ALL):
        source = _run(spec, spec.dim) // spec.devices
        each //= spec.devices
    if spec.form == ALL_GATHER:
        target = _run(spec, spec.dim)
    if spec.form == ALL_TO_ALL:
        target = _run(spec, spec.into) // (spec.devices if spec.dim >= spec.into else 1)
    units = -(-each // 2)
    threads = next((t for t in (64, 128) if rows * -(-units // t) <= 108), 256)
    return Plan(rows, each, -(-units // threads), threads, source, target)


def _run(spec: Message, dim: int) -> int:
    """Words of the operand that lie behind one index of the dimensions before ``dim``."""
    return math.prod(spec.shape[dim:]) * jnp.dtype(spec.dtype).itemsize // 4


def slot_bytes(spec: Message) -> int:
    """Payload that one device sends another."""
    return spec.nbytes() // (spec.devices if spec.form in (REDUCE_SCATTER, ALL_TO_ALL) else 1)


def two_shots(spec: Message) -> tuple[Message, Message] | None:
    """What a sum too large for one shot is made of, on the flattened operand; None where one shot serves."""
    if spec.form != ALL_REDUCE or spec.nbytes() <= limit(spec.devices):
        return None
    size = math.prod(spec.shape)
    scatter = Message(REDUCE_SCATTER, (size,), spec.dtype, spec.devices)
    return scatter, Message(ALL_GATHER, (size // spec.devices,), spec.dtype, spec.devices)


def supports(spec: Message, arch: Arch | None) -> Refusal | None:
    """Whether the peer-pointer kernel takes a message; the sentence has the numbers."""
    if arch is None or arch.sm < 80:
        return Refusal("needs NVIDIA GPUs of SM80 or newer")
    if not spec.peers:
        return Refusal("no workspace is open around the call")
    if spec.devices not in WORLDS:
        return Refusal(f"{spec.devices} devices, peer pointers are for 2, 4 or 8")
    size = jnp.dtype(spec.dtype).itemsize
    if spec.form in (ALL_REDUCE, ADD_NORM, REDUCE_SCATTER) and spec.dtype not in ("bfloat16", "float32"):
        return Refusal(f"sums of {spec.dtype}, the kernel adds bfloat16 and float32")
    shots = two_shots(spec)
    if shots is not None and spec.nbytes() <= MOST_MESSAGE:
        if math.prod(spec.shape) % spec.devices:
            return Refusal(f"{math.prod(spec.shape)} numbers in two shots do not divide by {spec.devices}")
        return supports(shots[0], arch) or supports(shots[1], arch)
    if not 0 < slot_bytes(spec) <= limit(spec.devices):
        return Refusal(
            f"{slot_bytes(spec)} bytes to a peer are outside of 1 .. {limit(spec.devices)} for {spec.devices} devices"
        )
    if spec.form == ADD_NORM:
        if spec.dtype != "bfloat16" or len(spec.shape) != 2 or spec.shape[1] % 4:
            return Refusal(f"norm of {spec.dtype} {spec.shape}, the kernel takes bfloat16 [rows, a multiple of 4]")
        if spec.shape[0] * plan(spec).parts > PARTIALS:
            return Refusal(f"{spec.shape[0]} rows of {plan(spec).parts} blocks exceed {PARTIALS} partial sums")
    runs = [spec.nbytes()]
    if spec.form in (REDUCE_SCATTER, ALL_TO_ALL):
        runs.append(math.prod(spec.shape[spec.dim :]) * size // spec.devices)
    if spec.form == ALL_GATHER:
        runs.append(math.prod(spec.shape[spec.dim :]) * size)
    if spec.form == ALL_TO_ALL:
        runs.append(math.prod(spec.shape[spec.into :]) * size // (spec.devices if spec.dim >= spec.into else 1))
    odd = [run for run in runs if run % 4]
    if odd:
        return Refusal(f"runs of {odd[0]} bytes are no multiple of 4")
    if plan(spec).rows * plan(spec).parts > MOST_BLOCKS:
        return Refusal(
            f"{plan(spec).rows * plan(spec).parts} blocks exceed the {MOST_BLOCKS} that are resident at once"
        )
    return None
