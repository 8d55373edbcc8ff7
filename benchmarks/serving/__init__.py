"""Is it right to batch by step? Clients, traffic and policies; `python -m benchmarks.serving` measures and reports."""
