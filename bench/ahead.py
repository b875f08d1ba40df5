"""Compiling what a case needs before the GPU is needed: only shapes are looked at, nothing runs."""

from __future__ import annotations

from typing import Any

import jax

from bench import timing
from bench.check import last_call, small_enough
from bench.operations import Operation


def compile_case(operation: Operation, spec: Any, lengths: dict[str, int]) -> None:
    """Compiles a case's inputs, its checks and its chains (backend -> calls), for an operation that ``remembers`` its functions."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    small = small_enough(operation, spec)
    for made in dict.fromkeys((spec, small)):
        operation.inputs_program(made).lower(key).compile()
    if set(lengths) != {"reference"}:  # which is not checked against itself
        first = jax.eval_shape(operation.inputs_program(small), key)
        calls = [first]
        if operation.rotates:
            out = jax.eval_shape(operation.function(small, "reference"), *first)
            last = last_call(small)
            calls.append(jax.eval_shape(lambda args, out: operation.advance(small, args, out, last), first, out))
        for backend in dict.fromkeys((*lengths, "reference")):
            for call in calls:
                operation.function(small, backend).lower(*call).compile()
    args = jax.eval_shape(operation.inputs_program(spec), key)
    for backend, length in lengths.items():
        timing.chain_program(operation, spec, backend, length).lower(*timing.chain_arguments(operation, args)).compile()
