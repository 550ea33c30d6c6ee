"""Benchmarks of the kernels and of whole towers: `python -m vitgraph.bench --help`."""
