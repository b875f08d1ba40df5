"""ptxas is asked for its version once, and not in every conversion of an 8-bit type that Mosaic lowers.

JAX 0.11.2 starts a process each time, 5 to 35 ms: 670 times for a decode step of one row, 1500 times for one of 64 rows, which was
more than half of the time that lowering took there. Every file whose kernels convert 8-bit types calls ``install`` on import.
Source: FragmentedArray.astype in jax/experimental/mosaic/gpu/fragmented_array.py.
"""

from __future__ import annotations

import functools
from typing import Any

from jax.experimental.mosaic.gpu import fragmented_array


def install() -> None:
    """Once for the process; nothing to do where JAX's CUDA plugin is missing."""
    library: Any = vars(fragmented_array)["mgpu_lib"]
    if library is None:
        return
    extension = library._mosaic_gpu_ext
    if not hasattr(extension._get_ptxas_isa_version, "cache_info"):
        extension._get_ptxas_isa_version = functools.cache(extension._get_ptxas_isa_version)
