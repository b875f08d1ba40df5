"""Words in which the programs of a launch meet, in Gluon; SM80 to SM120.

A word is zero until it is written, once and never as zero. So one word needs no order with another: no fence, no counter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GONE = gl.constexpr(-(2**31))
# About 0.5 us each.
_MOST_LOOKS = 1 << 22
KEEP = gl.constexpr("mov.b32 $0, $1;")


@gluon.jit
def word(number):
    """A number's bits, never zero: +0 becomes -0, which makes no difference to a sum of others or to a sigmoid."""
    bits = number.to(gl.int32, bitcast=True)
    return gl.where(bits == 0, GONE, bits)


@gluon.jit
def keys_of(number, known):
    """Integers in the order of the numbers, NaN first; the least where nothing is known."""
    # A float's bits order as an integer's do, once those of negative ones are inverted below the sign.
    bits = number.to(gl.int32, bitcast=True)
    return gl.where(known, gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), GONE)


def wait_for_sums(count: int, slices: int, stride: int, clear: bool) -> str:
    """PTX of one thread: sums over the slices of its ``count`` neighbouring words (float32), once all are written.

    Operands: ``count`` sums, the address of the first word, whether to wait at all (sums are 0 otherwise). count: 1, 2 or 4;
    stride: words of a slice; clear: the words are zeros then, which nobody else may be waiting for.
    """
    words = [f"w{i}" for i in range(count * slices)]
    address, live = f"${count}", f"${count + 1}"
    kind = f"v{count}.b32" if count > 1 else "b32"
    pieces = [words[i : i + count] for i in range(0, len(words), count)]
    listed = [f"{{{', '.join(piece)}}}" if count > 1 else piece[0] for piece in pieces]
    zeros = f"{{{', '.join(['z'] * count)}}}" if count > 1 else "z"
    at = [f"[{address} + {4 * s * stride}]" for s in range(slices)]
    looks = " ".join(f"ld.relaxed.gpu.global.{kind} {piece}, {a};" for piece, a in zip(listed, at, strict=True))
    cleared = " ".join(f"st.global.{kind} {a}, {zeros};" for a in at) if clear else ""
    adds = " ".join(
        f"mov.b32 ${e}, w{e};" + "".join(f" add.f32 ${e}, ${e}, w{count * s + e};" for s in range(1, slices))
        for e in range(count)
    )
    least, smallest = _least(words)
    return f"""{{
.reg .pred p; .reg .b32 n, z; .reg .b32 w<{len(words)}>; .reg .b32 m<{len(words)}>;
mov.b32 n, 0; mov.b32 z, 0;
{" ".join(f"mov.b32 ${e}, 0;" for e in range(count))}
setp.eq.s32 p, {live}, 0; @p bra DONE;
LOOK: {looks}
{least}
setp.ne.b32 p, {smallest}, 0; @p bra THERE;
add.u32 n, n, 1; setp.lt.u32 p, n, {_MOST_LOOKS}; @p bra LOOK;
trap;
THERE: {cleared}
{adds}
DONE:
bar.warp.sync 0xffffffff;
}}"""


def _least(words: list[str]) -> tuple[str, str]:
    """PTX of the least of registers, and its name: zero while one of them is."""
    lines: list[str] = []
    while len(words) > 1:
        pairs = [(words[i], words[i + 1]) for i in range(0, len(words) - 1, 2)]
        named = [f"m{len(lines) + i}" for i in range(len(pairs))]
        lines += [f"min.u32 {into}, {x}, {y};" for into, (x, y) in zip(named, pairs, strict=True)]
        words = named + words[2 * len(pairs) :]
    return " ".join(lines), words[0]


def wait_for_each(count: int) -> str:
    """PTX of one thread: so many words, once all that are asked for are written; they are zeros then.

    Operands: ``count`` words (0 where not asked for), ``count`` addresses, ``count`` times whether to wait.
    """
    asked = [f"setp.ne.s32 p, ${2 * count + i}, 0;" for i in range(count)]
    looks = " ".join(
        f"mov.b32 ${i}, 1; {asked[i]} @p ld.relaxed.gpu.global.b32 ${i}, [${count + i}];" for i in range(count)
    )
    least = " ".join(f"min.u32 m, m, ${i};" for i in range(count))
    clear = " ".join(f"{asked[i]} @p st.global.b32 [${count + i}], z; @!p mov.b32 ${i}, 0;" for i in range(count))
    return f"""{{
.reg .pred p; .reg .b32 n, m, z;
mov.b32 n, 0; mov.b32 z, 0;
LOOK: {looks}
mov.b32 m, 1; {least}
setp.ne.b32 p, m, 0; @p bra THERE;
add.u32 n, n, 1; setp.lt.u32 p, n, {_MOST_LOOKS}; @p bra LOOK;
trap;
THERE: {clear}
bar.warp.sync 0xffffffff;
}}"""


def operands(outputs: int, addresses: int) -> str:
    """Constraints of the asm: words out, addresses and whether to wait in."""
    return ",".join(["=&r"] * outputs + ["l"] * addresses + ["r"] * addresses)
