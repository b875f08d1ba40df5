"""Collectives over peer pointers in Triton: every rank pushes to all, polls its own memory and combines in the order of ranks.

Relaxed accesses of system scope go past the L1 and are never torn within 64 bits, so a packet proves by its epoch that its payload
is there: no fence, no flag. What makes two buffers enough is in README.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.collectives import workspace
from pallas_kernels.collectives.message import ADD_NORM, ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, Message
from pallas_kernels.collectives.workspace import PARTIALS, UNIT_PAYLOAD, Bound, State, Workspace
from pallas_kernels.lowering import triton_options

# $0 unused, $1 address, $2 and $3 payload, $4 epoch, $5 live.
_PUSH: tl.constexpr = tl.constexpr("""{
.reg .pred live;
.reg .b64 first, second;
mov.b64 first, {$2, $4};
mov.b64 second, {$3, $4};
setp.ne.u32 live, $5, 0;
@live st.relaxed.sys.global.v2.b64 [$1], {first, second};
mov.u32 $0, 0;
}""")
_PUSH_CONSTRAINTS: tl.constexpr = tl.constexpr("=r,l,r,r,r,r")


def poll_text(slots: int, stride: int, polls: int) -> str:
    """Reads one unit of every slot until all carry the epoch, at most ``polls`` times; a slot that does is not read again.

    Outputs: two payload words a slot, then the set of slots that never did. Inputs: address in slot 0, epoch, live.
    """
    out = 2 * slots + 1
    address, epoch, live = (f"${out + i}" for i in range(3))
    each = range(slots)
    lines = ["{", f".reg .pred late<{slots}>, again, more;", f".reg .b64 first<{slots}>, second<{slots}>;"]
    lines += [".reg .b32 one, two, stamp, left;", f"mov.u32 left, {polls};"]
    lines += [f"setp.ne.u32 late{r}, {live}, 0; mov.b64 first{r}, 0; mov.b64 second{r}, 0;" for r in each]
    lines += ["POLL:"]
    lines += [f"@late{r} ld.relaxed.sys.global.v2.b64 {{first{r}, second{r}}}, [{address}+{r * stride}];" for r in each]
    for r in each:
        lines += [f"mov.b64 {{one, stamp}}, first{r}; setp.ne.u32 again, stamp, {epoch};"]
        lines += [f"mov.b64 {{two, stamp}}, second{r}; setp.ne.or.u32 again, stamp, {epoch}, again;"]
        lines += [f"and.pred late{r}, late{r}, again;"]
    lines += ["or.pred more, late0, late0;", *(f"or.pred more, more, late{r};" for r in each)]
    lines += ["sub.u32 left, left, 1;", "setp.ne.and.u32 again, left, 0, more;", "@again bra POLL;"]
    for r in each:
        lines += [f"mov.b64 {{${2 * r}, stamp}}, first{r}; mov.b64 {{${2 * r + 1}, stamp}}, second{r};"]
    lines += [f"mov.u32 ${out - 1}, 0;"]
    lines += [f"selp.u32 one, {1 << r}, 0, late{r}; or.b32 ${out - 1}, ${out - 1}, one;" for r in each]
    return "\n".join([*lines, "}"])


_TYPES1: tl.constexpr = tl.constexpr((tl.uint32,) * 3)
_TYPES2: tl.constexpr = tl.constexpr((tl.uint32,) * 5)
_TYPES4: tl.constexpr = tl.constexpr((tl.uint32,) * 9)
_TYPES8: tl.constexpr = tl.constexpr((tl.uint32,) * 17)


def poll_constraints(slots: int) -> str:
    return ",".join(["=&r"] * (2 * slots + 1) + ["l", "r", "r"])


@triton.jit
def place(word, part, RUN: tl.constexpr, WORLD: tl.constexpr):
    """Where a word of part ``part`` is in an array of WORLD parts that alternate by runs of RUN words; 0: no parts."""
    if RUN == 0:
        return word
    return word // RUN * (WORLD * RUN) + part * RUN + word % RUN


@triton.jit
def low(word):
    """The first of two bfloat16 in 32 bits."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(word):
    return (word & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def pack(first, second):
    """Two float32, rounded to bfloat16, in 32 bits."""
    first = first.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return first | (second.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def total(words, FIRST: tl.constexpr, WORLD: tl.constexpr, missed, NARROW: tl.constexpr):
    """The sum over ranks of one word: (first bfloat16, second) where NARROW, else (float32, unused); NaN where one is missing."""
    nan = float("nan")
    if NARROW:
        a, b = low(words[FIRST]), high(words[FIRST])
        for r in tl.static_range(1, WORLD):
            a += low(words[FIRST + 2 * r])
            b += high(words[FIRST + 2 * r])
    else:
        a = words[FIRST].to(tl.float32, bitcast=True)
        for r in tl.static_range(1, WORLD):
            a += words[FIRST + 2 * r].to(tl.float32, bitcast=True)
        b = a
    return tl.where(missed != 0, nan, a), tl.where(missed != 0, nan, b)


@triton.jit
def report(status, missed):
    """Adds missing ranks to the status; nothing is executed where none is missing."""
    missed = missed.to(tl.int32)
    tl.atomic_or(status + tl.zeros_like(missed), missed, mask=missed != 0, sem="relaxed")


@triton.jit
def row_square_sum(square, area, row, part, epoch, status, PARTS: tl.constexpr, PADDED: tl.constexpr, TEXT: tl.constexpr,
                   CONSTRAINTS: tl.constexpr):  # fmt: skip
    """The sum over the blocks of a row: each leaves its own in the workspace of its device, with the epoch, and reads all."""
    if PARTS == 1:
        return square
    bits = square.to(tl.uint32, bitcast=True)
    index = tl.arange(0, PADDED)
    own = area + (row * PARTS + part) * 16 + 0 * index
    tl.inline_asm_elementwise(
        _PUSH,
        _PUSH_CONSTRAINTS,
        [own, bits, bits, epoch, (index == 0).to(tl.int32)],
        dtype=tl.uint32,
        is_pure=False,
        pack=1,
    )
    inside = index < PARTS
    answer = tl.inline_asm_elementwise(
        TEXT, CONSTRAINTS, [area + (row * PARTS + index) * 16, epoch, inside.to(tl.int32)], dtype=_TYPES1, is_pure=False,
        pack=1,
    )  # fmt: skip
    report(status, answer[2] << 30)
    value = tl.where(answer[2] != 0, float("nan"), answer[0].to(tl.float32, bitcast=True))
    return tl.sum(tl.where(inside, value, 0.0), 0)


@triton.jit
def add_norm(
    words, missed, held, out, normed, area, row, part, first, second, both, epoch, status,
    WORDS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, WORLD: tl.constexpr, TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Sum, residual and the norm of one block's part of a row; a unit is four bfloat16. held: two words of residual, four gains."""
    a, b = total(words, 0, WORLD, missed, True)
    c, d = total(words, 1, WORLD, missed, True)
    h0, h1 = pack(a + low(held[0]), b + high(held[0])), pack(c + low(held[1]), d + high(held[1]))
    tl.store(out + first, h0, mask=both)
    tl.store(out + second, h1, mask=both)
    # Of the rounded sum, as the reference does.
    a, b, c, d = low(h0), high(h0), low(h1), high(h1)
    square = tl.sum(tl.where(both, (a * a + b * b) + (c * c + d * d), 0.0), 0)
    square = row_square_sum(square, area, row, part, epoch, status, PARTS, PADDED, TEXT, CONSTRAINTS)
    scale = tl.rsqrt(square / (2 * WORDS) + EPS)
    n0 = pack(a * scale * held[2].to(tl.float32), b * scale * held[3].to(tl.float32))
    n1 = pack(c * scale * held[4].to(tl.float32), d * scale * held[5].to(tl.float32))
    tl.store(normed + first, n0, mask=both)
    tl.store(normed + second, n1, mask=both)


@triton.jit
def exchange_kernel(
    x, residual, weight, layer, words, table, epoch_in, status, out, normed, epoch_out,
    WORLD: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr, PARITY: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, REDUCE: tl.constexpr,
    NORM: tl.constexpr, NARROW: tl.constexpr, EPS: tl.constexpr, TYPES: tl.constexpr, TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr, PART_TEXT: tl.constexpr, PART_CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows * parts,): each block moves BLOCK units of 8 bytes. ``words`` keeps the workspace alive; status changes in place.

    PARITY: units of one parity in the workspace. SOURCE, TARGET: see workspace.Plan. A variant's unused arrays are dummies.
    """
    block = tl.program_id(0)
    row, part = block // PARTS, block % PARTS
    epoch = tl.load(epoch_in)
    peers = table.to(tl.pointer_type(tl.int64), bitcast=True)
    rank = tl.load(peers + WORLD).to(tl.int32)
    # All of them before the first push: loads and the embedded stores stay in the order they are written in.
    bases = ()
    for r in tl.static_range(WORLD):
        bases += (tl.load(peers + r),)
    number = tl.load(layer).to(tl.int64) if NORM else 0
    # A row's units are counted by themselves, so that the last one of a row may be half full.
    index = part * BLOCK + tl.arange(0, BLOCK)
    live = 2 * index < WORDS
    both = 2 * index + 1 < WORDS
    first = row * WORDS + 2 * index
    second = first + 1
    bank = (epoch & 1).to(tl.int64) * (PARITY * 16)
    slot = (row * ((WORDS + 1) // 2) + index).to(tl.int64) * 16
    source = x.to(tl.pointer_type(tl.uint32), bitcast=True)
    if SOURCE == 0:
        a, b = tl.load(source + first, mask=live, other=0), tl.load(source + second, mask=both, other=0)
    for r in tl.static_range(WORLD):
        peer = (rank + 1 + r) % WORLD
        if SOURCE != 0:
            a = tl.load(source + place(first, peer, SOURCE, WORLD), mask=live, other=0)
            b = tl.load(source + place(second, peer, SOURCE, WORLD), mask=both, other=0)
        address = bases[r] + bank + rank.to(tl.int64) * (CAPACITY * 16) + slot
        tl.inline_asm_elementwise(
            _PUSH, _PUSH_CONSTRAINTS, [address, a, b, epoch, live.to(tl.int32)], dtype=tl.uint32, is_pure=False, pack=1
        )
    if NORM:
        # On their way while this block waits for its peers.
        before = residual.to(tl.pointer_type(tl.uint32), bitcast=True)
        gain = weight + number * (2 * WORDS) + 2 * (first - row * WORDS)
        held = (tl.load(before + first, mask=both, other=0), tl.load(before + second, mask=both, other=0))
        for i in tl.static_range(4):
            held += (tl.load(gain + i, mask=both, other=0.0),)
    mine = bases[WORLD - 1] + bank
    got = tl.inline_asm_elementwise(
        TEXT, CONSTRAINTS, [mine + slot, epoch, live.to(tl.int32)], dtype=TYPES, is_pure=False, pack=1
    )
    missed = got[2 * WORLD]
    report(status, missed)
    target = out.to(tl.pointer_type(tl.uint32), bitcast=True)
    if NORM:
        after = normed.to(tl.pointer_type(tl.uint32), bitcast=True)
        area = mine + WORLD * CAPACITY * 16
        add_norm(
            got, missed, held, target, after, area, row, part, first, second, both, epoch, status,
            WORDS, PARTS, PADDED, EPS, WORLD, PART_TEXT, PART_CONSTRAINTS,
        )  # fmt: skip
    elif REDUCE:
        a0, a1 = total(got, 0, WORLD, missed, NARROW)
        b0, b1 = total(got, 1, WORLD, missed, NARROW)
        if NARROW:
            tl.store(target + first, pack(a0, a1), mask=live)
            tl.store(target + second, pack(b0, b1), mask=both)
        else:
            tl.store(target + first, a0.to(tl.uint32, bitcast=True), mask=live)
            tl.store(target + second, b0.to(tl.uint32, bitcast=True), mask=both)
    else:
        # All bits set is NaN in every float format and -1 in the signed integers.
        lost = (missed == 0).to(tl.uint32) - 1
        for r in tl.static_range(WORLD):
            tl.store(target + place(first, r, TARGET, WORLD), got[2 * r] | lost, mask=live)
            tl.store(target + place(second, r, TARGET, WORLD), got[2 * r + 1] | lost, mask=both)
    if block == 0:
        # 0 is what words carry that nobody wrote; after it comes 2, because parities must alternate and 2^32 - 1 is odd.
        tl.store(epoch_out, tl.where(epoch == 0xFFFFFFFF, 2, epoch + 1))


def exchange(
    spec: Message, x: jax.Array, work: Workspace, state: State, residual: jax.Array | None = None,
    weight: jax.Array | None = None, layer: jax.Array | None = None, *, polls: int = workspace.POLLS,
) -> tuple[Any, State]:  # fmt: skip
    """One collective inside ``shard_map``: (what reference.run returns, the state of the next call).

    work, state: this device's part of what ``workspace.make`` made. After a timeout the outputs that lack a peer are NaN (all
    bits set where bits are copied) and ``state.status`` names it. Make the workspace anew then: ranks disagree on the epoch.
    """
    shots = workspace.two_shots(spec)
    if shots is not None:
        own, state = exchange(shots[0], x.reshape(-1), work, state, polls=polls)
        whole, state = exchange(shots[1], own, work, state, polls=polls)
        return whole.reshape(x.shape), state
    world, plan = spec.devices, workspace.plan(spec)
    units = work.words.shape[2]
    capacity = (units - PARTIALS) // world
    if plan.rows * plan.units > capacity:
        raise ValueError(
            f"{spec} needs {plan.rows * plan.units} units of {UNIT_PAYLOAD} bytes a slot, the workspace has {capacity}"
        )
    norm = spec.form == ADD_NORM
    unused = jax.ShapeDtypeStruct((1,), x.dtype)
    shape = list(spec.shape)
    if spec.form in (REDUCE_SCATTER, ALL_TO_ALL):
        shape[spec.dim] //= world
    if spec.form in (ALL_GATHER, ALL_TO_ALL):
        shape[spec.dim if spec.form == ALL_GATHER else spec.into] *= world
    out_type = (
        jax.ShapeDtypeStruct(tuple(shape), x.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype) if norm else unused,
        jax.ShapeDtypeStruct(state.epoch.shape, jnp.uint32),
    )  # fmt: skip
    # Not the status where there is no layer: XLA copies what a call both reads and changes in place, 1 us each time.
    index = work.table if layer is None else layer.reshape(1)
    status = jax.new_ref(state.status)  # changed in place, and only where a peer is missing
    out, normed, epoch = jax_triton.triton_call(
        x, x if residual is None else residual, x if weight is None else weight, index, work.words, work.table,
        state.epoch, status, kernel=exchange_kernel, out_type=out_type, grid=(plan.rows * plan.parts,),
        name="collectives", num_warps=plan.threads // 32, **triton_options(),
        WORLD=world, WORDS=plan.words, PARTS=plan.parts, PADDED=triton.next_power_of_2(plan.parts), BLOCK=plan.threads,
        CAPACITY=capacity, PARITY=units, SOURCE=plan.source, TARGET=plan.target,
        REDUCE=spec.form not in (ALL_GATHER, ALL_TO_ALL), NORM=norm, NARROW=spec.dtype == "bfloat16", EPS=spec.eps,
        TYPES={2: _TYPES2, 4: _TYPES4, 8: _TYPES8}[world], TEXT=poll_text(world, capacity * 16, polls),
        CONSTRAINTS=poll_constraints(world), PART_TEXT=poll_text(1, 0, polls), PART_CONSTRAINTS=poll_constraints(1),
    )  # fmt: skip
    return (out, normed) if norm else out, State(epoch, jax.freeze(status))


def run(
    spec: Message, axis: str, x: jax.Array, residual: jax.Array | None = None, weight: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> Any:  # fmt: skip
    """As reference.run, with the workspace of the innermost ``workspace.bound``, whose state it advances."""
    box: Bound = workspace.current()
    out, box.state = exchange(spec, x, box.workspace, box.state, residual, weight, layer)
    return out
