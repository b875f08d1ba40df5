"""Benchmarks of the operations: `python -m bench`."""
