"""Places for small arrays in a GPU's memory, apart from where steps have their temporaries.

XLA's allocator gives an array the smallest free piece that holds it, cut to size. Between two steps their temporaries are free, and
a token that is copied for the host may be cut off their front: the next step finds its temporaries elsewhere, and XLA updates the
step's graph. So there are pieces of a small array's size between arrays that stay, and nothing to cut.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import Sharding

# Bytes of a piece, and how many: tokens and positions of a batch, a piece of a prompt, a row of hidden states.
PIECES = {256: 64, 4096: 16, 32768: 8}


@functools.lru_cache(maxsize=16)
def small_places(where: Sharding) -> tuple[jax.Array, ...]:
    """Makes the places on the devices of a sharding that has every device hold the whole; returns what stands between them.

    They last as long as the process does: 0.4 MB a device.
    """
    kept = list[jax.Array]()
    for size, count in PIECES.items():
        # One more, so that there is a neighbour on either side of each place.
        made = [jax.device_put(np.zeros(size, np.uint8), where) for _ in range(2 * count + 1)]
        kept += jax.block_until_ready(made)[::2]
    return tuple(kept)
