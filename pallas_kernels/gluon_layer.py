"""``layer_triton`` for kernels in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def layer_of(layer):
    """int32, from a kernel's argument made by ``layer_index.layer_argument``."""
    if layer.dtype.is_ptr():
        return gl.load(layer)
    else:
        return layer >> 5
