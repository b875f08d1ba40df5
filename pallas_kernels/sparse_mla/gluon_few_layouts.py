"""Layouts of the kernel for few heads, and the PTX that moves e4m3 bytes into its products' operands."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS_OF_WORDS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
ROWS_OF_HALVES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


def _moved(*picks: str) -> gl.constexpr:
    """PTX: four prmt that each put a byte and above it its sign into both halves of a word; shifted left by 4, sign and magnitude
    stand where bfloat16 has them (value * 2^-120, subnormals included)."""
    lines = [".reg .b32 t0, t1, t2, t3;"]
    lines += [f"prmt.b32 t{i}, {pick};" for i, pick in enumerate(picks)]
    lines += [f"shl.b32 t{i}, t{i}, 4;" for i in range(4)]
    lines += [f"and.b32 ${i}, t{i}, 0x87f087f0;" for i in range(4)]
    return gl.constexpr("{\n " + "\n ".join(lines) + "\n}")


# Two words of a key ($4, $5) -> pairs of neighbouring latents.
KEY_PAIRS = _moved("$4, 0, 0x9180", "$4, 0, 0xB3A2", "$5, 0, 0x9180", "$5, 0, 0xB3A2")
# Words of two neighbouring keys ($4, $5) -> a pair of keys for each of four latents.
VALUE_PAIRS = _moved("$4, $5, 0xC480", "$4, $5, 0xD591", "$4, $5, 0xE6A2", "$4, $5, 0xF7B3")
# A pair of bfloat16 times 2^100.
TIMES = gl.constexpr("""{
 .reg .b32 u, z;
 mov.b32 u, 0x71807180;
 mov.b32 z, 0x80008000;
 fma.rn.bf16x2 $0, $1, u, z;
}""")


@gluon.constexpr_function
def _powers(first, end):
    """[first, 0], [2 * first, 0], ... below end: rows of a tile."""
    return [[first << i, 0] for i in range((end // first).bit_length() - 1)]


@gluon.constexpr_function
def _spread(own, lanes, N, WORDS):
    """Copies: eight lanes along a row, four rows a warp."""
    return gl.DistributedLinearLayout(
        [*own, *_powers(16, N)], [*lanes, [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [N, WORDS]
    )


@gluon.constexpr_function
def latent_lines(N):
    return _spread([[0, 1], [0, 2], [0, 32], [0, 64]], [[0, 4], [0, 8], [0, 16]], N, 128)


@gluon.constexpr_function
def rope_lines(N):
    return _spread([[0, 1], [0, 2]], [[0, 4], [0, 8], [0, 16]], N, 32)


@gluon.constexpr_function
def scale_lines(N):
    return _spread([[0, 1], [0, 2]], [[0, 0], [0, 0], [0, 0]], N, 4)


@gluon.constexpr_function
def warps_with_keys(N):
    return min(4, N // 16)


@gluon.constexpr_function
def _of_warps(N):
    """Which rows of a product's left operand a warp has: 16 of every 64; of 32 keys two warps have what the others have."""
    return [[16, 0], [32, 0]] if N > 32 else [[16, 0], [0, 0]]


@gluon.constexpr_function
def key_words(N):
    """Words of a group of latents as the left operand's rows: registers 4 words apart, so that two are two steps of k."""
    own = [[0, 4], [0, 8], [0, 16], [8, 0], *_powers(64, N)]
    return gl.DistributedLinearLayout(own, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], _of_warps(N), [], [N, 32])


@gluon.constexpr_function
def scale_column(N):
    own = [[8, 0], *_powers(64, N)]
    return gl.DistributedLinearLayout(own, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], _of_warps(N), [], [N, 1])


@gluon.constexpr_function
def rows_of_heads(H):
    """Weights [keys, H heads], bfloat16: eight rows of sixteen bytes are in different banks."""
    return gl.SwizzledSharedLayout(8, 64 // H, H // 8, [1, 0])


@gluon.constexpr_function
def all_warps(G, H):
    """[G warps, H heads]: a thread has what all warps found for the heads of its accumulators' columns."""
    own = [[0, 1], *([0, step] for step, _ in _powers(8, H)), *_powers(1, G)]
    return gl.DistributedLinearLayout(own, [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [G, H])


@gluon.constexpr_function
def value_words(N):
    """[N keys, words of one group]: pairs of registers are neighbouring keys."""
    own = [[1, 0], [8, 0], *_powers(16, N)]
    return gl.DistributedLinearLayout(own, [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [N, 32])


MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
QUERY_LINES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
QUERY_ROPE_LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


# [H heads, 128 latents]: four latents in a row a thread, of the query and of the accumulators.
@gluon.constexpr_function
def query_words(H):
    own = [[0, 1], [0, 2], [0, 16], [0, 32], [0, 64], *_powers(8, H)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(own, lanes, [[0, 0], [0, 0]], [], [H, 128])


@gluon.constexpr_function
def out_words(H):
    own = [[0, 1], [0, 2], [1, 0], *_powers(8, H)]
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    return gl.DistributedLinearLayout(own, lanes, [[0, 32], [0, 64]], [], [H, 128])
