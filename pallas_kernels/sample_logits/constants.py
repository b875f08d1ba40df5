"""Fixed-point formats and polynomials that the reference and the kernels share; both compute with 32-bit integers only.

Polynomials are of Q0.32 arguments r, least squares on Chebyshev nodes, coefficients from the constant term up.
"""

from __future__ import annotations

# Distances from the best token in log2 units and the scores that are compared have 25 fraction bits.
FRACTION = 25
# A weight is 2^28 times a token's probability over the best one's, in two digits of 14 bits whose sums fit 32.
WEIGHT = 28
DIGIT = 14
# A token this many powers of two less likely than the best has weight 0 and is never drawn.
SPAN = 29
MOST_VOCAB = 2**18 - 1
# Bits of a row's flags.
HAS_NAN, HAS_INF, EMPTY = 1, 2, 4

# 2^-r for r in [0, 1), Q1.31, alternating signs; error 1.1e-7.
EXP2 = (2147483648, 1488513691, 515781526, 118755002, 19780205, 2034856)
# log2(1 + r) / r for r in [0, 1), Q2.30, alternating signs; error 4e-8.
LOG2 = (1549081959, 774533280, 516142836, 384859663, 296051740, 211833397, 121388650, 45835024, 8138037)
# log2(-log2(1 - r) / r) for r in [0, 1/2], Q2.30, no signs; error 8e-8.
RATIO = (567758569, 774542963, 322597866, 196002177, 116634864, 166916373, 0, 0, 270369353)

# Threefry-2x32, twenty rounds.
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA

LOG2_E = 1.4426950216293335  # as float32
