"""Benchmarks of hisa_compile, each a module that is run with ``python -m benchmarks.<name>``."""
