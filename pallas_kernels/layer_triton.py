"""The index of a layer in a Triton launch: a number of the launch where it is known, else one that the kernel loads.

Loading it is a memory latency before the first address of a weight is known: 0.3 us of a launch of 3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_of(layer):
    """int32, from a kernel's argument made by ``layer_index.layer_argument``."""
    if layer.dtype.is_ptr():
        return tl.load(layer)
    else:
        return layer >> 5
