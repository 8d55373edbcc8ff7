"""Batching by step against other policies: clients and traffic; `python -m benchmarks.serving` measures and reports."""
