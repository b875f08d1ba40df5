"""Several ranks that run the peer-pointer kernel in numpy, its assembly included.

Blocks interleave at random; every 64-bit packet becomes visible on its own, at a random time, in order only at the same address.

One call on a rank ends before its next begins, as on a stream. Which thread runs next is drawn from a seed, so a failure repeats.
"""

from __future__ import annotations

import re
import sys
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.collectives import workspace

SOURCE = Path(workspace.__file__).with_name("triton.py")
_BANK = 40  # a rank's memory starts at (rank + 1) << _BANK
_local = threading.local()


class Block(np.ndarray):
    """A block of values; scalars have one element."""

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return self.view(dtype) if bitcast else self.astype(dtype)


def block(x: Any, dtype: Any = None) -> Block:
    return np.atleast_1d(np.asarray(x, dtype)).view(Block)


class Pointer:
    def __init__(self, array: np.ndarray, at: Any = 0) -> None:
        self.array, self.at = array, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.at + np.asarray(offset))

    def to(self, dtype: Any, bitcast: bool = False) -> Pointer:
        return Pointer(self.array.view(dtype))

    def where(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at, mask = np.broadcast_arrays(np.atleast_1d(self.at), mask)
        if np.any(mask & ((at < 0) | (at >= self.array.size))):
            raise IndexError(f"access outside of {self.array.size} elements: {at[mask]}")
        return at, mask


class Ranks:
    """Memory, wires and the order of events. ``silent`` ranks make no calls."""

    def __init__(
        self, world: int, capacity: int, seed: int, epoch: int = 1, source: Callable[[str], str] = str
    ) -> None:
        self.world, self.rng, self.kernels = world, np.random.default_rng(seed), load(source)
        self.units = world * capacity + workspace.PARTIALS
        self.memory = [np.zeros(2 * self.units * 2, np.uint64) for _ in range(world)]
        self.wires: dict[tuple[int, int], deque[int]] = defaultdict(deque)
        self.main, self.waiting, self.failed = threading.Semaphore(0), [], []
        base = [(r + 1) << _BANK for r in range(world)]
        self.work, self.state = [], []
        for rank in range(world):
            row = np.array([*(base[(rank + 1 + r) % world] for r in range(world)), rank], np.uint64)
            words = self.memory[rank].view(np.uint32).reshape(1, 2, self.units, 4)
            self.work.append(workspace.Workspace(words, row.view(np.uint32).reshape(1, -1, 2)))  # type: ignore[arg-type]
            state = np.full((1, 1), epoch, np.uint32), np.zeros((1, 1), np.int32)
            self.state.append(workspace.State(*state))  # type: ignore[arg-type]

    def run(self, calls: Callable[[int], None], silent: tuple[int, ...] = ()) -> None:
        """``calls(rank)`` on every rank that is not silent, until all are done."""
        for rank in set(range(self.world)) - set(silent):
            self.start(rank, lambda rank=rank: calls(rank))
        while self.waiting:
            for at in [at for at in self.wires if self.rng.random() < 0.3]:
                self.deliver(at)
            self.waiting.pop(int(self.rng.integers(len(self.waiting)))).release()
            self.main.acquire()
        if self.failed:
            raise self.failed[0]

    def start(self, rank: int, body: Callable[[], Any], program: int = 0) -> threading.Thread:
        turn = threading.Semaphore(0)

        def go() -> None:
            turn.acquire()
            _local.ranks, _local.rank, _local.program, _local.turn = self, rank, program, turn
            try:
                body()
            except Exception as error:
                self.failed.append(error)
            self.main.release()

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        self.waiting.append(turn)
        return thread

    def pause(self) -> None:
        """Lets others run."""
        self.waiting.append(_local.turn)
        self.main.release()
        _local.turn.acquire()

    def deliver(self, at: tuple[int, int]) -> None:
        self.memory[at[0]][at[1]] = self.wires[at].popleft()
        if not self.wires[at]:
            del self.wires[at]

    def place(self, address: int) -> tuple[int, int]:
        rank, byte = (address >> _BANK) - 1, address & ((1 << _BANK) - 1)
        if byte % 16 or not 0 <= rank < self.world or byte + 16 > self.memory[rank].nbytes:
            raise IndexError(f"address {byte} of rank {rank} is no unit of its workspace")
        return rank, byte // 8


def _store(address: np.ndarray, first: np.ndarray, second: np.ndarray, live: np.ndarray) -> None:
    ranks = _local.ranks
    for i in np.flatnonzero(live):
        rank, at = ranks.place(int(address[i]))
        ranks.wires[rank, at].append(first[i])
        ranks.wires[rank, at + 1].append(second[i])
    ranks.pause()


def _load(address: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.zeros(len(live), np.uint64), np.zeros(len(live), np.uint64)
    for i in np.flatnonzero(live):
        rank, at = _local.ranks.place(int(address[i]))
        assert rank == _local.rank, "polls must stay in the device's own memory"
        first[i], second[i] = _local.ranks.memory[rank][at : at + 2]
    return first, second


def assemble(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """Interprets the PTX that the kernel embeds, one lane an element."""
    assert not is_pure and pack == 1
    lanes = np.broadcast_arrays(*(np.atleast_1d(np.asarray(a)) for a in args))
    size, outputs = lanes[0].size, constraints.count("=")
    registers = {f"${outputs + i}": lane.astype(np.uint64) for i, lane in enumerate(lanes)}
    lines = [line.strip() for line in re.split(r"[;\n]", text.strip()[1:-1]) if line.strip()]
    active, at = np.ones(size, bool), 0
    while at < len(lines):
        line, at = lines[at], at + 1
        guard = active
        if line.startswith("@"):
            name, line = line[1:].split(" ", 1)
            guard = active & registers[name].astype(bool)
        operation, _, rest = line.partition(" ")
        if operation == ".reg" or line.endswith(":"):
            continue
        if operation == "bra":
            if guard.any():
                active, at = guard, lines.index(f"{rest}:")
                _local.ranks.pause()
            else:
                active = np.ones(size, bool)
            continue
        _step(operation, [t.strip(" {}") for t in rest.split(",")], rest, registers, guard)
    found = tuple(block(registers[f"${i}"].astype(np.uint32)) for i in range(outputs))
    return found if isinstance(dtype, tuple) else found[0]


def _step(operation: str, names: list[str], rest: str, registers: dict[str, Any], guard: np.ndarray) -> None:
    def value(name: str) -> np.ndarray:
        return np.full(guard.size, int(name), np.uint64) if name.isdigit() else registers[name]

    def put(name: str, new: np.ndarray) -> None:
        registers[name] = np.where(guard, new, registers.get(name, np.zeros(guard.size, np.uint64))).astype(np.uint64)

    mask, width = np.uint64(0xFFFFFFFF), np.uint64(32)
    if operation.startswith("ld.relaxed.sys.global.v2.b64"):
        base, offset = re.fullmatch(r"\[(\$\d+)\+(\d+)\]", names[2]).groups()  # type: ignore[union-attr]
        for name, new in zip(names, _load(registers[base] + np.uint64(int(offset)), guard), strict=False):
            put(name, new)
    elif operation == "st.relaxed.sys.global.v2.b64":
        _store(value(names[0].strip("[]")), value(names[1]), value(names[2]), guard)
    elif operation == "mov.b64" and rest.startswith("{"):
        whole = value(names[2])
        put(names[0], whole & mask)
        put(names[1], whole >> width)
    elif operation == "mov.b64" and "{" in rest:
        put(names[0], value(names[1]) & mask | (value(names[2]) & mask) << width)
    elif operation in ("mov.b64", "mov.u32"):
        put(names[0], value(names[1]))
    elif operation.startswith("setp.ne"):
        new = (value(names[1]) & mask) != (value(names[2]) & mask)
        if operation != "setp.ne.u32":
            other = value(names[3]).astype(bool)
            new = new | other if ".or." in operation else new & other
        put(names[0], new)
    else:
        a, b = value(names[1]), value(names[2])
        with np.errstate(over="ignore"):
            table = {"and.pred": a & b, "or.pred": a | b, "or.b32": a | b, "sub.u32": a - b}
        put(names[0], np.where(value(names[3]).astype(bool), a, b) if operation == "selp.u32" else table[operation])


def _read(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    at, mask = pointer.where(mask)
    return block(np.where(mask, pointer.array[np.where(mask, at, 0)], other).astype(pointer.array.dtype))


def _write(pointer: Pointer, value: Any, mask: Any = True) -> None:
    at, mask = pointer.where(mask)
    pointer.array[at[mask]] = np.broadcast_to(np.asarray(value), at.shape)[mask].astype(pointer.array.dtype)


def _atomic_or(pointer: Pointer, value: Any, mask: Any, sem: str) -> None:
    at, mask = pointer.where(mask)
    np.bitwise_or.at(pointer.array, at[mask], np.asarray(value)[mask])


def _triton_call(*args: Any, kernel: Any, out_type: Any, grid: Any, name: str, num_warps: int, **meta: Any) -> Any:
    """Launches a thread a block and returns when all are done; outputs start as garbage."""
    ranks, rank = _local.ranks, _local.rank
    outs = [np.frombuffer(b"\xa5" * (o.size * o.dtype.itemsize), o.dtype).reshape(o.shape).copy() for o in out_type]
    pointers = [Pointer(np.ascontiguousarray(a).reshape(-1)) for a in (*args, *outs)]
    blocks = [ranks.start(rank, lambda: kernel(*pointers, **meta), program) for program in range(grid[0])]
    while any(b.is_alive() for b in blocks) and not ranks.failed:
        ranks.pause()
    return outs


def load(source: Callable[[str], str] = str) -> Any:
    """triton.py of the folder on this emulation; ``source`` may change its text, to plant a fault."""
    tl, triton, jax_triton = (types.ModuleType(n) for n in ("triton.language", "triton", "jax_triton"))
    vars(tl).update(
        uint16=np.uint16, uint32=np.uint32, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=ml_dtypes.bfloat16,
        constexpr=lambda x: x, pointer_type=lambda t: t, static_range=range, load=_read, store=_write, atomic_or=_atomic_or,
        program_id=lambda axis: block(_local.program, np.int32), arange=lambda a, b: block(np.arange(a, b, dtype=np.int32)),
        where=lambda c, a, b: block(np.where(c, np.asarray(a), b) if not isinstance(a, float | int) else np.where(c, a, b)),
        sum=lambda x, axis: block(np.sum(x, axis=axis, keepdims=True)), rsqrt=lambda x: 1 / np.sqrt(x),
        zeros_like=np.zeros_like, inline_asm_elementwise=assemble,
    )  # fmt: skip
    vars(triton).update(jit=lambda f: f, language=tl, next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    vars(jax_triton).update(triton_call=_triton_call)
    fakes = {"triton": triton, "triton.language": tl, "jax_triton": jax_triton}
    text = SOURCE.read_text()
    changed = source(text)
    assert source is str or changed != text, "the fault to plant is not in the file any more"
    module = types.ModuleType("collectives_emulated")
    module.__file__ = str(SOURCE)
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        exec(compile(changed, str(SOURCE), "exec"), vars(module))
        vars(module)["triton_options"] = dict  # there is nothing to compile
        # A reference is the array itself, changed in place.
        vars(module)["jax"] = types.SimpleNamespace(
            new_ref=np.copy, freeze=lambda a: a, ShapeDtypeStruct=jax.ShapeDtypeStruct
        )
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module
