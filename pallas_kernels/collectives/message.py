"""Static sizes of a collective, and the real ones by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

ALL_REDUCE, ADD_NORM, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_reduce_add_norm", "all_gather", "reduce_scatter"
ALL_TO_ALL = "all_to_all"
Form = Literal["all_reduce", "all_reduce_add_norm", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Message:
    """One call on every device of a mesh axis.

    form: which collective. shape, dtype: of the operand on one device. devices: along the axis. dim: the dimension along which
    devices' parts are joined or split (``all_to_all``: split), ``into`` the one along which ``all_to_all`` joins. eps: of the norm.
    peers: whether a workspace is open where the call is traced.
    """

    form: Form
    shape: tuple[int, ...]
    dtype: str
    devices: int
    dim: int = 0
    into: int = 0
    eps: float = 0.0
    peers: bool = True

    def nbytes(self) -> int:
        """Bytes of the operand on one device."""
        size = jnp.dtype(self.dtype).itemsize
        for n in self.shape:
            size *= n
        return size

    def sent(self) -> int:
        """Bytes that each device must at least send, however the peers are connected: what the others do not have yet.

        all_gather: the operand to every peer; reduce_scatter and all_to_all: every peer's part of it; all_reduce: both of these on
        parts (twice (n - 1) / n of the operand), or, in one shot, the operand to every peer.
        """
        others, size = self.devices - 1, self.nbytes()
        if self.form == ALL_GATHER:
            return others * size
        return (2 if self.form in (ALL_REDUCE, ADD_NORM) else 1) * others * size // self.devices


# Of one decode step at GLM-5.2's sizes, by mesh size where it matters; bfloat16 unless it says otherwise.
CASES: dict[str, Message] = {
    "decode_b1_n2": Message(ALL_REDUCE, (1, 6144), "bfloat16", 2),
    "decode_b1_n4": Message(ALL_REDUCE, (1, 6144), "bfloat16", 4),
    "decode_b1_n8": Message(ALL_REDUCE, (1, 6144), "bfloat16", 8),
    "decode_b64_n8": Message(ALL_REDUCE, (64, 6144), "bfloat16", 8),
    "decode_b1_n4_norm": Message(ADD_NORM, (1, 6144), "bfloat16", 4, eps=1e-5),
    "ep_rows_out_b64_n4": Message(ALL_GATHER, (16, 6144), "bfloat16", 4),
    "ep_rows_back_b64_n4": Message(REDUCE_SCATTER, (64, 6144), "bfloat16", 4),
    "logits_b1_n8": Message(ALL_GATHER, (1, 19360), "float32", 8, dim=1),
    "ep_logits_b64_n4": Message(ALL_TO_ALL, (64, 38720), "float32", 4, dim=0, into=1),
}
