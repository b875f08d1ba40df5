"""GPU operations of GLM-5.2 decode, each a folder with its contract, its reference and its backends.

An operation takes arrays and static sizes: no config, no mesh, no model. Every one works under ``jax.jit``.
"""
